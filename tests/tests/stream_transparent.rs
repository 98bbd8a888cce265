//! `source_address = "client"` where the daemon dials: the backend sees the client, and the way back leads through the
//! daemon's socket.

use std::{
    io::Write,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use proxy_userspace::kernel::return_path::ReturnPath;
use shunt_lab::{
    Host, Lab, Shunt,
    dialog::{End, echo, end_of, read_some, turned_away},
    hello::Hello,
    kernel, pattern, proxy_header,
    scripted::{Behaviour, Start, TcpServer},
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);
const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 1, 1));
const GATEWAY6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd88, 1, 0, 0, 0, 0, 0, 1));
const ENGINES: [(&str, u16); 2] = [("copy", 8000), ("splice", 8001)];

/// A transparent route on both of the gateway's addresses, to backend 1 by both of its own.
fn route(name: &str, port: u16, rest: &str) -> String {
    format!(
        "[[route]]\nname = \"{name}\"\nlisten = [\"{}\", \"{}\"]\nbackends = [\"10.88.2.2:{port}\", \"[fd88:2::2]:{port}\"]\n\
         source_address = \"client\"\n{rest}\n",
        SocketAddr::new(GATEWAY, port),
        SocketAddr::new(GATEWAY6, port),
    )
}

fn engines() -> String {
    ENGINES.map(|(engine, port)| route(engine, port, &format!("engine = \"{engine}\""))).concat()
}

fn peers(server: &TcpServer, count: usize) -> Result<Vec<IpAddr>> {
    Ok(server.wait_records(count, SOON)?.iter().map(|record| record.peer.ip().to_canonical()).collect())
}

/// Counts what reaches the client from backends themselves: nothing that belongs to the daemon may.
fn watch_strays(lab: &Lab) -> Result<()> {
    kernel::nft_load(
        lab.client(),
        lab.dir(),
        "table inet strays { chain in { type filter hook input priority 0; \
         ip saddr 10.88.2.0/24 counter; ip6 saddr fd88:2::/64 meta l4proto tcp counter; }; }",
    )
}

fn no_strays(lab: &Lab) -> Result<()> {
    let listing = lab.client().sh("nft list table inet strays")?;
    ensure!(listing.matches("counter packets 0 bytes 0").count() == 2, "backends reached the client: {listing}");
    Ok(())
}

/// Everything of the way back that `host` has: the table, the rules and the routes.
fn way_back(host: &Host) -> Result<[String; 3]> {
    Ok([
        host.sh("nft list tables | grep transparent || true")?,
        host.sh("(ip rule; ip -6 rule) | grep 0x10000000 || true")?,
        host.sh("(ip route show table 29544; ip -6 route show table 29544) 2>/dev/null || true")?,
    ])
}

fn is_there(host: &Host) -> Result<bool> {
    let [table, rules, routes] = way_back(host)?;
    Ok(table.lines().count() == 1 && rules.lines().count() == 2 && routes.lines().count() == 2)
}

fn is_gone(host: &Host) -> Result<bool> {
    Ok(way_back(host)?.iter().all(|part| part.trim().is_empty()))
}

#[test]
fn the_backend_sees_the_client_in_both_families_and_bytes_go_both_ways() -> Result<()> {
    const BYTES: u64 = 20 << 20;
    let lab = Lab::new()?;
    watch_strays(&lab)?;
    let _shunt = Shunt::start(&lab, &engines())?;
    for (engine, port) in ENGINES {
        let behaviour = Behaviour::Exchange { seed: 7, bytes: BYTES, start: Start::AtOnce };
        let server = TcpServer::start(lab.backend(1), port, behaviour)?;
        for gateway in [GATEWAY, GATEWAY6] {
            let mut stream = lab.client().connect(SocketAddr::new(gateway, port))?;
            let mut reader = stream.try_clone()?;
            let got = thread::spawn(move || pattern::receive(&mut reader));
            let sent = pattern::send(&mut stream, 3, BYTES)?;
            stream.shutdown(Shutdown::Write)?;
            let got = got.join().expect("reader")?;
            ensure!(got == pattern::send(&mut std::io::sink(), 7, BYTES)?, "{engine}: other bytes came back");
            let count = if gateway.is_ipv4() { 1 } else { 2 };
            let record = server.wait_records(count, SOON)?.remove(count - 1);
            assert_eq!(record.peer.ip().to_canonical(), lab.client().address_like(gateway), "{engine}");
            ensure!(record.received == sent, "{engine}: the backend got other bytes");
        }
    }
    no_strays(&lab)
}

#[test]
fn many_clients_at_once_keep_their_addresses_beside_routes_that_the_kernel_forwards() -> Result<()> {
    const CLIENTS: u8 = 5;
    const EACH: usize = 60;
    let lab = Lab::builder().client_addresses(CLIENTS).build()?;
    watch_strays(&lab)?;
    let shop =
        "balance = \"least-connections\"\nmatch = { sni = [\"shop.example.com\"] }\ntls = { mode = \"passthrough\" }";
    let plain = "[[route]]\nname = \"plain\"\nlisten = [\"10.88.1.1:80\"]\nbackends = [\"10.88.2.3:80\"]\n";
    let shunt = Shunt::start(&lab, &format!("{}{plain}", route("shop", 443, shop)))?;
    let server = TcpServer::start(lab.backend(1), 443, Behaviour::Echo)?;
    let _plain = TcpServer::start(lab.backend(2), 80, Behaviour::Echo)?;
    assert_eq!(shunt.route("plain")?["engine"], "nft");
    let hello = Hello::to("shop.example.com").build();
    let work = |from: Ipv4Addr| -> Result<()> {
        let mut kept = Vec::new();
        for n in 0..EACH {
            let mut stream = lab.client().connect_from((from, 0), (GATEWAY, 443))?;
            stream.write_all(&hello)?;
            ensure!(read_some(&mut stream, hello.len())? == hello, "another hello");
            echo(&mut lab.client().connect_from((from, 0), (GATEWAY, 80))?, b"forwarded")?;
            if n % 2 == 0 {
                kept.push(stream);
            }
        }
        kept.iter_mut().try_for_each(|stream| echo(stream, b"still here"))
    };
    thread::scope(|scope| {
        let threads: Vec<_> = lab.client_addresses().into_iter().map(|from| scope.spawn(move || work(from))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("client"))
    })?;
    let peers = peers(&server, usize::from(CLIENTS) * EACH)?;
    for client in lab.client_addresses() {
        assert_eq!(peers.iter().filter(|peer| **peer == IpAddr::V4(client)).count(), EACH, "{client}");
    }
    no_strays(&lab)
}

#[test]
fn what_a_backend_sends_after_the_end_does_not_reach_the_client() -> Result<()> {
    let lab = Lab::new()?;
    watch_strays(&lab)?;
    let shunt = Shunt::start(&lab, &engines())?;
    let behaviour = Behaviour::Exchange { seed: 7, bytes: 1000, start: Start::AfterClientFinished };
    let _server = TcpServer::start(lab.backend(1), 8000, behaviour)?;
    // The backend hears no acknowledgement and sends its end again, to a socket that is in TIME_WAIT by then.
    let deaf = "table inet deaf { chain in { type filter hook input priority 0; tcp flags & (fin|syn|psh|ack) == ack drop; }; }";
    kernel::nft_load(lab.backend(1), lab.dir(), deaf)?;
    let mut stream = lab.client().connect((GATEWAY, 8000))?;
    stream.write_all(b"hello")?;
    stream.shutdown(Shutdown::Write)?;
    assert_eq!(pattern::receive(&mut stream)?.bytes, 1000);
    shunt.wait_ended("copy", &[("finished_client_first", 1)], SOON)?;
    let resent = || -> Result<u64> {
        let counters = lab.backend(1).sh("nstat -asz TcpRetransSegs | awk '/Retrans/ {print $2}'")?;
        counters.trim().parse().context(counters)
    };
    let before = resent()?;
    wait_until("the backend sends again", SOON, || resent().is_ok_and(|now| now >= before + 2))?;
    no_strays(&lab)?;
    lab.backend(1).sh("nft delete table inet deaf")?;
    let gone = || kernel::tcp_sockets(lab.backend(1), &["last-ack"]).is_ok_and(|left| left == 0);
    wait_until("the backend is answered", Duration::from_secs(30), gone)?;
    no_strays(&lab)
}

#[test]
fn an_icmp_error_about_a_dial_reaches_the_daemon() -> Result<()> {
    let lab = Lab::new()?;
    let shunt = Shunt::start(&lab, &engines())?;
    let refuse = "table inet wall { chain in { type filter hook input priority 0; \
                  tcp dport 8000 reject with icmpx type admin-prohibited; }; }";
    kernel::nft_load(lab.backend(1), lab.dir(), refuse)?;
    for gateway in [GATEWAY, GATEWAY6] {
        let from = lab.client().address_like(gateway);
        assert_eq!(turned_away(lab.client(), from, SocketAddr::new(gateway, 8000), SOON)?, End::Reset);
    }
    // Unheard, it would be a timeout after 30 s.
    shunt.wait_ended("copy", &[("connect_unreachable", 2)], SOON)
}

#[test]
fn the_client_that_a_proxy_header_names_is_the_one_the_backend_sees() -> Result<()> {
    let lab = Lab::new()?;
    let rest = "proxy_protocol = { accept_from = [\"10.88.1.0/24\"] }";
    let shunt = Shunt::start(&lab, &route("mail", 25, rest))?;
    let server = TcpServer::start(lab.backend(1), 25, Behaviour::Echo)?;
    let dial = |source: SocketAddr| -> Result<TcpStream> {
        let mut stream = lab.client().connect((GATEWAY, 25))?;
        let to = if source.is_ipv4() { GATEWAY } else { GATEWAY6 };
        stream.write_all(&proxy_header::v2(source, SocketAddr::new(to, 25), &[]))?;
        Ok(stream)
    };
    // Nobody has these addresses.
    let named = ["192.0.2.7:4000", "[2001:db8::7]:4000"].map(|text| text.parse::<SocketAddr>().expect("address"));
    for source in named {
        echo(&mut dial(source)?, b"through the header")?;
    }
    let mut seen = peers(&server, 2)?;
    seen.sort();
    assert_eq!(seen, named.map(|source| source.ip()));
    // Addresses that nobody can have are not dialled from, and nothing is held against the backends.
    for nonsense in ["0.0.0.0:1", "255.255.255.255:1", "224.0.0.1:1"] {
        let end = end_of(&mut dial(nonsense.parse()?)?, SOON).with_context(|| nonsense.to_owned())?;
        assert_eq!(end, End::Reset, "{nonsense}");
    }
    shunt.wait_ended("mail", &[("connect_unreachable", 3), ("finished_client_first", 2)], SOON)?;
    echo(&mut dial(named[0])?, b"as before")
}

#[test]
fn a_client_of_a_family_that_no_backend_has_is_told_unreachable() -> Result<()> {
    let lab = Lab::new()?;
    let config = route("one", 80, "engine = \"copy\"").replace(", \"[fd88:2::2]:80\"", "");
    let shunt = Shunt::start(&lab, &config)?;
    let _server = TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    for _ in 0..10 {
        let client6 = lab.client().address_like(GATEWAY6);
        assert_eq!(turned_away(lab.client(), client6, SocketAddr::new(GATEWAY6, 80), SOON)?, End::Reset);
    }
    shunt.wait_ended("one", &[("connect_unreachable", 10)], SOON)?;
    echo(&mut lab.client().connect((GATEWAY, 80))?, b"the backend is not out of use")
}

#[test]
fn cleanup_leaves_no_table_rule_or_route_also_after_a_kill() -> Result<()> {
    let lab = Lab::new()?;
    let before = lab.gateway().sh("ip rule; ip -6 rule; nft list ruleset")?;
    let mut shunt = Shunt::start(&lab, &engines())?;
    let server = TcpServer::start(lab.backend(1), 8000, Behaviour::Echo)?;
    ensure!(is_there(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    for life in 1..=3 {
        echo(&mut lab.client().connect((GATEWAY, 8000))?, b"alive")?;
        ensure!(peers(&server, life)?.iter().all(|peer| *peer == IpAddr::from(lab.client().ip)));
        shunt.kill9();
        ensure!(is_there(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
        shunt.restart()?;
        ensure!(is_there(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    }
    shunt.kill9();
    let said = String::from_utf8(shunt.cli(&["cleanup"])?.stdout)?;
    ensure!(said.contains("shunt_transparent") && said.contains("29544") && said.contains("954"), "{said}");
    ensure!(is_gone(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    assert_eq!(lab.gateway().sh("ip rule; ip -6 rule; nft list ruleset")?, before);
    Ok(())
}

#[test]
fn the_first_such_route_may_come_with_a_reload_and_one_that_is_refused_leaves_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let plain = "[[route]]\nname = \"plain\"\nlisten = [\"10.88.1.1:80\"]\nbackends = [\"10.88.2.3:80\"]\n";
    let shunt = Shunt::start(&lab, plain)?;
    let _plain = TcpServer::start(lab.backend(2), 80, Behaviour::Echo)?;
    let server = TcpServer::start(lab.backend(1), 8001, Behaviour::Echo)?;
    ensure!(is_gone(lab.gateway())?);
    let both = format!("{plain}{}", engines());
    shunt.write_config(&both)?;
    for (taken, freed) in [
        ("ip rule add fwmark 0x30000000 lookup 77", "ip rule del lookup 77"),
        ("ip -6 rule add pref 954 lookup 77", "ip -6 rule del pref 954"),
        ("ip -6 route add unreachable 2001:db8::/32 table 29544", "ip -6 route flush table 29544"),
        // The kernel would drop what the backends answer.
        ("sysctl -w net.ipv4.conf.all.src_valid_mark=1", "sysctl -w net.ipv4.conf.all.src_valid_mark=0"),
    ] {
        lab.gateway().sh(taken)?;
        let before = way_back(lab.gateway())?;
        let refused = shunt.cli(&["reload"])?;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        let why = said.contains("somebody else's") || said.contains("src_valid_mark is 1");
        ensure!(!refused.status.success() && why && said.contains("mend:"), "{taken}: {said}");
        assert_eq!(way_back(lab.gateway())?, before, "{taken}");
        ensure!(lab.client().connect((GATEWAY, 8001)).is_err(), "nobody listens yet");
        echo(&mut lab.client().connect((GATEWAY, 80))?, b"forwarded")?;
        lab.gateway().sh(freed)?;
    }
    shunt.reload(&both)?;
    ensure!(is_there(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    let said = shunt.cli_json(&["explain", "copy"])?.to_string();
    ensure!(
        said.contains("from the client's address") && said.contains("must come back through this machine"),
        "{said}"
    );
    let mut kept = lab.client().connect((GATEWAY, 8001))?;
    echo(&mut kept, b"through the new route")?;
    // The last one goes: its connections drain, so the way back stays.
    shunt.reload(plain)?;
    echo(&mut kept, b"while it drains")?;
    drop(kept);
    assert_eq!(peers(&server, 1)?, [IpAddr::from(lab.client().ip)]);
    Ok(())
}

#[test]
fn a_way_back_that_is_not_kept_is_taken_back_and_one_from_before_stays() -> Result<()> {
    let lab = Lab::new()?;
    let set_up = || lab.gateway().run(|| ReturnPath::set_up(false));
    let made = set_up()?;
    ensure!(is_there(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    drop(made);
    ensure!(is_gone(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    // Of what was there in part, only the rest is taken back.
    drop(set_up()?.keep());
    lab.gateway().sh("ip -6 rule del pref 954")?;
    let before = way_back(lab.gateway())?;
    let made = set_up()?;
    ensure!(is_there(lab.gateway())?, "{:?}", way_back(lab.gateway())?);
    drop(made);
    assert_eq!(way_back(lab.gateway())?, before);
    Ok(())
}

#[test]
fn a_way_back_that_others_take_away_is_put_back() -> Result<()> {
    let lab = Lab::new()?;
    let shunt = Shunt::start(&lab, &format!("[kernel]\nlock_table = false\n{}", engines()))?;
    let _server = TcpServer::start(lab.backend(1), 8000, Behaviour::Echo)?;
    for damage in [
        "nft flush ruleset",
        "nft flush chain inet shunt_transparent pre",
        "ip rule del pref 954",
        "ip -6 route flush table 29544",
    ] {
        let whole = way_back(lab.gateway())?;
        let rules = lab.gateway().sh("nft list ruleset")?;
        lab.gateway().sh(damage)?;
        wait_until(&format!("repaired after {damage}"), SOON, || {
            lab.gateway().sh("nft list ruleset").is_ok_and(|now| now == rules)
                && way_back(lab.gateway()).is_ok_and(|now| now == whole)
        })?;
        echo(&mut lab.client().connect((GATEWAY, 8000))?, b"again")?;
    }
    ensure!(shunt.log().contains("is repaired"), "{}", shunt.log());
    Ok(())
}

#[test]
fn a_locked_way_back_survives_a_foreign_flush() -> Result<()> {
    let lab = Lab::new()?;
    let _shunt = Shunt::start(&lab, &engines())?;
    let _server = TcpServer::start(lab.backend(1), 8000, Behaviour::Echo)?;
    let mut stream = lab.client().connect((GATEWAY, 8000))?;
    lab.gateway().sh("nft flush ruleset")?;
    ensure!(lab.gateway().sh("nft delete table inet shunt_transparent").is_err(), "others may not delete it");
    echo(&mut stream, b"undisturbed")
}
