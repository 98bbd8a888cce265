# Runs in the machine as its first process, on the host's files: the checks of /mnt/checks, one after the other.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=dumb LC_ALL=C.UTF-8
trap '' HUP
. /mnt/settings
mkdir -p /lib/modules
mount -t tmpfs none /lib/modules
mkdir -p "/lib/modules/$(uname -r)"
mount --bind "$MODULES" "/lib/modules/$(uname -r)"
mkdir -p /dev/pts /dev/shm /run/netns /run/lock
mount -t devpts devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
hostname vm
ip link set lo up
# Loaded on demand, one at a time, they take longer here than tests wait.
modprobe -aq veth nf_tables nf_conntrack_netlink nfnetlink_cttimeout nft_chain_nat nft_nat nft_masq nft_ct nft_fib_inet \
    nft_reject_inet nft_limit nft_numgen nft_hash nft_connlimit nft_socket nft_counter nft_objref nf_flow_table_inet sch_ingress \
    cls_bpf tcp_diag
ulimit -n 65536
uname -a > /mnt/uname
while IFS=$'\t' read -r name folder limit command; do
    echo "vm: $name"
    cd "$folder" || continue
    begin=$SECONDS
    timeout --kill-after=10 "$limit" bash -c "$command" > "/mnt/$name.log" 2>&1 < /dev/null
    echo "$? $((SECONDS - begin))" > "/mnt/$name.exit"
    echo "vm: $name: exit code and seconds $(cat "/mnt/$name.exit")"
done < /mnt/checks
dmesg > /mnt/dmesg
sync
echo o > /proc/sysrq-trigger
sleep 60
