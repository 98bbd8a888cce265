use super::*;

/// A folder in the place of `/proc/sys`, removed at the end.
struct Tree {
    root: PathBuf,
}

impl Tree {
    fn new(name: &str, values: &[(&str, &str)]) -> Self {
        let root = std::env::temp_dir().join(format!("shunt-sysctl-{}-{name}", std::process::id()));
        for (path, value) in values {
            let file = root.join(path);
            fs::create_dir_all(file.parent().expect("a folder")).expect("folder");
            fs::write(file, format!("{value}\n")).expect("file");
        }
        Self { root }
    }

    fn settings(&self) -> Settings {
        Settings::below(&self.root)
    }

    fn record(&self) -> PathBuf {
        self.root.join("run/restore.json")
    }

    fn value(&self, path: &str) -> String {
        self.settings().read(&Sysctl::new(path)).expect("value")
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.root).ok();
    }
}

const FORWARD: &str = "net/ipv4/ip_forward";
const ACCT: &str = "net/netfilter/nf_conntrack_acct";

fn ipv4() -> Vec<Needed> {
    needed(Routes { ipv4: true, ..Routes::default() })
}

#[test]
fn what_is_only_better_to_have_is_a_warning_where_it_may_not_be_set() {
    const REUSE: &str = "net/ipv4/tcp_tw_reuse";
    let relayed = needed(Routes { relayed: true, ..Routes::default() });
    let tree = Tree::new("optional", &[(REUSE, "2")]);
    let applied =
        tree.settings().apply(&relayed, Path::new("/proc/no/such/restore.json")).expect("served all the same");
    assert!(applied.changed.is_empty() && applied.warnings[0].contains("TIME_WAIT"), "{applied:?}");
    assert_eq!(tree.value(REUSE), "2");
    tree.settings().apply(&relayed, &tree.record()).expect("apply");
    assert_eq!(tree.value(REUSE), "1");
    restore(&tree.settings(), &tree.record()).expect("restore");
    assert_eq!(tree.value(REUSE), "2");
}

#[test]
fn only_what_is_not_as_needed_is_changed_and_all_of_it_is_put_back() {
    let tree = Tree::new("basic", &[(FORWARD, "0"), (ACCT, "1")]);
    let applied = tree.settings().apply(&ipv4(), &tree.record()).expect("apply");
    assert_eq!(applied.changed.len(), 1);
    assert_eq!(tree.value(FORWARD), "1");
    let restored = restore(&tree.settings(), &tree.record()).expect("restore");
    assert_eq!(restored, [Restored::PutBack { name: Sysctl::new(FORWARD), from: "1".into(), to: "0".into() }]);
    assert_eq!((tree.value(FORWARD), tree.value(ACCT)), ("0".into(), "1".into()));
    assert!(!tree.record().exists());
}

#[test]
fn a_second_start_does_not_take_its_own_value_for_the_old_one() {
    let tree = Tree::new("twice", &[(FORWARD, "0"), (ACCT, "0")]);
    tree.settings().apply(&ipv4(), &tree.record()).expect("first start");
    assert_eq!(tree.settings().apply(&ipv4(), &tree.record()).expect("second start"), Applied::default());
    restore(&tree.settings(), &tree.record()).expect("restore");
    assert_eq!((tree.value(FORWARD), tree.value(ACCT)), ("0".into(), "0".into()));
}

#[test]
fn a_setting_that_somebody_else_changed_since_is_left_alone() {
    let tree = Tree::new("foreign", &[(FORWARD, "0"), (ACCT, "1")]);
    tree.settings().apply(&ipv4(), &tree.record()).expect("apply");
    tree.settings().write(&Sysctl::new(FORWARD), "2").expect("foreign write");
    let restored = restore(&tree.settings(), &tree.record()).expect("restore");
    assert!(matches!(&restored[..], [Restored::Foreign { .. }]), "{restored:?}");
    assert!(tree.value(FORWARD).starts_with('2'));
}

#[test]
fn restoring_without_a_record_does_nothing() {
    let tree = Tree::new("none", &[(FORWARD, "1")]);
    assert_eq!(restore(&tree.settings(), &tree.record()).expect("restore"), []);
    assert_eq!(tree.value(FORWARD), "1");
}

#[test]
fn a_broken_record_is_an_error_that_names_the_file() {
    let tree = Tree::new("broken", &[(FORWARD, "0"), (ACCT, "1")]);
    fs::create_dir_all(tree.root.join("run")).expect("folder");
    fs::write(tree.record(), "no json").expect("record");
    let error = tree.settings().apply(&ipv4(), &tree.record()).expect_err("an error");
    assert!(error.mend().contains("restore.json"), "{error}");
    assert_eq!(tree.value(FORWARD), "0");
}

#[test]
fn what_is_already_right_needs_no_permission() {
    let tree = Tree::new("right", &[(FORWARD, "1"), (ACCT, "1")]);
    let applied = tree.settings().apply(&ipv4(), Path::new("/proc/no/such/restore.json")).expect("nothing to write");
    assert_eq!(applied, Applied::default());
}

#[test]
fn a_refused_write_names_the_command_that_mends_it() {
    let error = SysctlError::Write {
        name: Sysctl::new(FORWARD),
        value: "1".into(),
        source: io::Error::from_raw_os_error(libc::EROFS),
    };
    assert!(error.mend().contains("sysctl -w net.ipv4.ip_forward=1"), "{}", error.mend());
}

#[test]
fn a_dot_in_an_interface_name_is_written_as_sysctl_does() {
    assert_eq!(Sysctl::new("net/ipv4/conf/eth0.100/rp_filter").to_string(), "net.ipv4.conf.eth0/100.rp_filter");
}

#[test]
fn interfaces_with_advertised_routes_are_found() {
    let table = "\
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000001 00000000 00450003 eth0\n\
fe800000000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001 eth1\n\
broken line\n";
    assert_eq!(learnt_from_advertisements(table), ["eth0"]);
}
