//! Every kind of mistake and the exact line it yields.

use super::*;

#[track_caller]
pub(super) fn each(cases: &[(&str, &str)]) {
    for (text, expected) in cases {
        assert_eq!(bad(text), [*expected], "for\n{text}");
    }
}

/// Each case is a line in a good route.
#[track_caller]
fn each_in_a_route(cases: &[(&str, &str)]) {
    for (line, expected) in cases {
        assert_eq!(bad(&route_with(line)), [format!("5: route \"web\": {expected}")], "for\n{line}");
    }
}

/// Each case is a listen address.
#[test]
fn a_bad_listen_address_says_what_is_allowed() {
    for (address, expected) in [
        ("0.0.0.0:0", "port 0 is not a port (1–65535)"),
        ("0.0.0.0:65536", "port 65536 is not a port (1–65535)"),
        ("0.0.0.0:+80", "port \"+80\" is not a port (1–65535)"),
        ("0.0.0.0:http", "port \"http\" is not a port (1–65535)"),
        ("0.0.0.0:", "port \"\" is not a port (1–65535)"),
        ("0.0.0.0:1-0", "port 0 is not a port (1–65535)"),
        ("0.0.0.0:1-2-3", "port \"2-3\" is not a port (1–65535)"),
        ("0.0.0.0:200-100", "ports 200-100 run backwards; write 100-200"),
        ("0.0.0.0", "\"0.0.0.0\" has no port; address:port or address:first-last is expected"),
        ("::1", "\"::1\" has no port; address:port or address:first-last is expected"),
        ("*:80", "\"*:80\": write \"0.0.0.0:80\" for every IPv4 address, \"[::]:80\" for every IPv6 address"),
        (":80", "\":80\": write \"0.0.0.0:80\" for every IPv4 address, \"[::]:80\" for every IPv6 address"),
        ("localhost:80", "\"localhost:80\": \"localhost\" is a name; an IP address is expected"),
        ("10.0.0:80", "\"10.0.0:80\": \"10.0.0\" is not an IP address"),
        ("10.0.0.256:80", "\"10.0.0.256:80\": \"10.0.0.256\" is not an IP address"),
        ("[::1:80", "\"[::1:80\" lacks the closing ]"),
        ("[::1]80", "\"[::1]80\": a colon and a port are expected after ]"),
        ("[10.0.0.1]:80", "\"[10.0.0.1]:80\": \"10.0.0.1\" is not an IPv6 address"),
        ("[fe80::1%eth0]:80", "\"[fe80::1%eth0]:80\": \"fe80::1%eth0\" is not an IPv6 address"),
        ("fd88:::1:80", "\"fd88:::1:80\": an IPv6 address with a port is written [address]:port"),
        ("[::ffff:10.0.0.1]:80", "\"[::ffff:10.0.0.1]:80\": write the IPv4 address itself, 10.0.0.1"),
        ("224.0.0.1:80", "\"224.0.0.1:80\": a route cannot listen on a multicast address"),
        ("", "\"\" has no port; address:port or address:first-last is expected"),
    ] {
        let text =
            format!("[[route]]\nname = \"web\"\nbackends = [\"10.0.0.2\"]\nlisten = [\"10.0.0.1:1\", {address:?}]");
        assert_eq!(bad(&text), [format!("4: route \"web\": listen[1]: {expected}")]);
    }
}

#[test]
fn a_bad_backend_says_what_is_allowed() {
    for (backend, expected) in [
        ("\"10.0.0.2:0\"", ": port 0 is not a port (1–65535)"),
        (
            "\"10.0.0.2:80-90\"",
            ": \"10.0.0.2:80-90\": a backend has one port, or none to keep the port that the client dialled",
        ),
        ("\"10.0.0.300:80\"", ": \"10.0.0.300:80\" is neither an IP address nor a host name"),
        ("\"0.0.0.0:80\"", ": \"0.0.0.0:80\": nothing can be reached at 0.0.0.0"),
        ("\"224.0.0.1:80\"", ": \"224.0.0.1:80\": nothing can be reached at 224.0.0.1"),
        ("\"::ffff:10.0.0.1\"", ": \"::ffff:10.0.0.1\": write the IPv4 address itself, 10.0.0.1"),
        ("\"\"", ": \"\" is neither an IP address nor a host name: it must have 1–253 characters"),
        (
            "\"a..b\"",
            ": \"a..b\" is neither an IP address nor a host name: the parts between its dots must have 1–63 characters",
        ),
        ("\"a b\"", ": \"a b\" is neither an IP address nor a host name: only a–z, 0–9, -, _ and . may be in it"),
        ("\"-a\"", ": \"-a\" is neither an IP address nor a host name: none of its parts may begin or end with -"),
        (
            "\"bücher.example\"",
            ": \"bücher.example\" is neither an IP address nor a host name: write names with other letters than a–z in their xn-- form",
        ),
        ("5", ": 5 is an integer; an address such as \"10.0.0.2:8080\" is expected"),
        ("\"10.0.0.1:80\"", ": \"10.0.0.1:80\" is in this list already, at [0]; nothing may be in it twice"),
        (
            "{ address = \"10.0.0.1:80\", weight = 2 }",
            ": \"10.0.0.1:80\" is in this list already, at [0]; nothing may be in it twice",
        ),
        ("{ address = \"a\", weight = 0 }", ".weight: 0 is out of range (1–256)"),
        ("{ address = \"a\", weight = 257 }", ".weight: 257 is out of range (1–256)"),
        ("{ address = \"a\", weigth = 2 }", ".weigth: unknown key; did you mean \"weight\"?"),
        ("{ weight = 2 }", ".address: missing; an address such as \"10.0.0.2:8080\" is required"),
    ] {
        let text =
            format!("[[route]]\nname = \"web\"\nlisten = [\"0.0.0.0:80\"]\nbackends = [\"10.0.0.1:80\", {backend}]");
        assert_eq!(bad(&text), [format!("4: route \"web\": backends[1]{expected}")]);
    }
}

#[test]
fn a_bad_duration_says_what_is_allowed() {
    each_in_a_route(&[
        ("timeouts.connect = 30", "timeouts.connect: 30 has no unit; write \"30s\" for seconds (ms, s, m, h, d)"),
        (
            "timeouts.connect = \"30\"",
            "timeouts.connect: \"30\" has no unit; write \"30s\" for seconds (ms, s, m, h, d)",
        ),
        ("timeouts.connect = \"5min\"", "timeouts.connect: \"5min\": \"min\" is not a unit of time (ms, s, m, h, d)"),
        (
            "timeouts.connect = \"\"",
            "timeouts.connect: \"\" is not a duration; a number and a unit (ms, s, m, h, d) are expected, such as \"30s\"",
        ),
        (
            "timeouts.connect = \"1.5s\"",
            "timeouts.connect: \"1.5s\" is not a duration; a number and a unit (ms, s, m, h, d) are expected, such as \"30s\"",
        ),
        (
            "timeouts.connect = \"-1s\"",
            "timeouts.connect: \"-1s\" is not a duration; a number and a unit (ms, s, m, h, d) are expected, such as \"30s\"",
        ),
        ("timeouts.connect = \"0s\"", "timeouts.connect: \"0s\" is out of range (1ms–365d)"),
        ("timeouts.idle = \"0s\"", "timeouts.idle: \"0s\" is out of range (1ms–365d, or \"never\")"),
        ("timeouts.idle = \"366d\"", "timeouts.idle: \"366d\" is out of range (1ms–365d, or \"never\")"),
        (
            "timeouts.idle = \"99999999999999999999d\"",
            "timeouts.idle: \"99999999999999999999d\" is out of range (1ms–365d, or \"never\")",
        ),
        (
            "timeouts.idle = false",
            "timeouts.idle: false is a boolean; a duration such as \"30s\", or \"never\", is expected",
        ),
        (
            "timeouts.connect = \"never\"",
            "timeouts.connect: \"never\" is not allowed here; a duration such as \"30s\" is expected",
        ),
        (
            "timeouts.drain = \"never\"",
            "timeouts.drain: \"never\" is not allowed here; a duration such as \"30s\" is expected",
        ),
        ("health.interval = \"1ms\"", "health.interval: \"1ms\" is out of range (10ms–1d)"),
    ]);
}

#[test]
fn a_bad_limit_says_what_is_allowed() {
    each_in_a_route(&[
        ("limits.connections = -1", "limits.connections: -1 is out of range (0–4294967295)"),
        ("limits.connections = 4294967296", "limits.connections: 4294967296 is out of range (0–4294967295)"),
        (
            "limits.connections = \"5\"",
            "limits.connections: \"5\" is a string; an integer from 0 to 4294967295 is expected",
        ),
        (
            "limits.rate_per_client = \"300\"",
            "limits.rate_per_client: \"300\" is not a rate; N/second, N/minute or N/hour is expected, such as \"300/minute\"",
        ),
        (
            "limits.rate_per_client = \"300/day\"",
            "limits.rate_per_client: \"300/day\" is not a rate; N/second, N/minute or N/hour is expected, such as \"300/minute\"",
        ),
        (
            "limits.rate_per_client = \"99999999999/hour\"",
            "limits.rate_per_client: \"99999999999/hour\": \"99999999999\" is out of range (0–4294967295)",
        ),
        (
            "limits.rate_per_client = []",
            "limits.rate_per_client: this is an array; a rate such as \"300/minute\" is expected",
        ),
        ("health.rise = 0", "health.rise: 0 is out of range (1–1000)"),
    ]);
}

#[test]
fn a_bad_word_or_type_says_what_is_allowed() {
    each_in_a_route(&[
        ("protocol = \"tpc\"", "protocol: \"tpc\" is not one of \"tcp\", \"udp\"; did you mean \"tcp\"?"),
        ("protocol = \"sctp\"", "protocol: \"sctp\" is not one of \"tcp\", \"udp\""),
        (
            "balance = \"leastconn\"",
            "balance: \"leastconn\" is not one of \"round-robin\", \"random\", \"source-hash\", \"maglev\", \"least-connections\"",
        ),
        (
            "balance = \"round_robin\"",
            "balance: \"round_robin\" is not one of \"round-robin\", \"random\", \"source-hash\", \"maglev\", \"least-connections\"; did you mean \"round-robin\"?",
        ),
        (
            "engine = 1",
            "engine: 1 is an integer; one of \"auto\", \"nft\", \"handoff\", \"sockmap\", \"splice\", \"copy\" is expected",
        ),
        ("allow = \"10.0.0.0/8\"", "allow: \"10.0.0.0/8\" is a string; an array such as [\"10.0.0.0/8\"] is expected"),
        ("allow = [1.5]", "allow[0]: 1.5 is a decimal number; a network such as \"10.0.0.0/8\" is expected"),
        (
            "allow = [2020-01-01]",
            "allow[0]: 2020-01-01 is a date or time; a network such as \"10.0.0.0/8\" is expected",
        ),
        ("match = \"x\"", "match: \"x\" is a string; a table such as { client = [\"10.0.0.0/8\"] } is expected"),
        ("tls = { mode = \"x\" }", "tls.mode: \"x\" is not one of \"passthrough\", \"terminate\""),
        ("tls = {}", "tls.mode: missing; one of \"passthrough\", \"terminate\" is required"),
    ]);
}

#[test]
fn a_bad_network_says_what_is_allowed() {
    each_in_a_route(&[
        (
            "allow = [\"10.0.0.1/8\"]",
            "allow[0]: \"10.0.0.1/8\" has bits beyond its prefix; write \"10.0.0.0/8\" or \"10.0.0.1/32\"",
        ),
        ("deny = [\"10.0.0.0/33\"]", "deny[0]: \"10.0.0.0/33\": prefix 33 is out of range (0–32)"),
        ("deny = [\"fd00::/129\"]", "deny[0]: \"fd00::/129\": prefix 129 is out of range (0–128)"),
        (
            "deny = [\"10.0.0.0/+8\"]",
            "deny[0]: \"10.0.0.0/+8\" is not a network; address/prefix is expected, such as \"10.0.0.0/8\" or \"fd00::/8\"",
        ),
        (
            "deny = [\"lan\"]",
            "deny[0]: \"lan\" is not a network; address/prefix is expected, such as \"10.0.0.0/8\" or \"fd00::/8\"",
        ),
        (
            "deny = [\"::ffff:10.0.0.0/104\"]",
            "deny[0]: \"::ffff:10.0.0.0/104\": write the IPv4 address itself, 10.0.0.0",
        ),
        (
            "deny = [\"10.0.0.1\", \"10.0.0.1/32\"]",
            "deny[1]: \"10.0.0.1/32\" is in this list already, at [0]; nothing may be in it twice",
        ),
        (
            "proxy_protocol = { accept_from = [\"x\"] }",
            "proxy_protocol.accept_from[0]: \"x\" is not a network; address/prefix is expected, such as \"10.0.0.0/8\" or \"fd00::/8\"",
        ),
    ]);
}

#[test]
fn a_bad_match_says_what_is_allowed() {
    each_in_a_route(&[
        ("match.sni = [\"*\"]", "match.sni[0]: \"*\": a route for every server name is one without match.sni"),
        ("match.sni = [\"10.0.0.1\"]", "match.sni[0]: \"10.0.0.1\": clients send no server name for an IP address"),
        (
            "match.sni = [\"a.*.example\"]",
            "match.sni[0]: \"a.*.example\" is not a server name: only a–z, 0–9, -, _ and . may be in it",
        ),
        ("match.sni = [\"a.example.\"]", "match.sni[0]: \"a.example.\" is not a server name: leave the last dot away"),
        (
            "match.sni = [\"A.example\", \"a.example\"]",
            "match.sni[1]: \"a.example\" is in this list already, at [0]; nothing may be in it twice",
        ),
        ("match.alpn = [\"\"]", "match.alpn[0]: \"\" is 0 bytes long; a protocol name has 1–255"),
    ]);
    let many = |count: u32| (0..count).map(|n| format!("\"n{n}\"")).collect::<Vec<_>>().join(", ");
    let line = format!("match = {{ sni = [{}], alpn = [{}] }}", many(300), many(300));
    assert_eq!(
        bad(&route_with(&line)),
        [
            "5: route \"web\": match: 300 sni × 300 alpn × 0 client are 90000 combinations; at most 65536 are allowed in one route"
        ]
    );
}

#[test]
fn keys_that_need_each_other_name_each_other() {
    let terminate = "tls = { mode = \"terminate\", certificates = [{ cert = \"c\", key = \"k\" }] }";
    good(&route_with(&format!("{terminate}\nbackend_tls = {{}}")));
    for (lines, expected) in [
        (
            "protocol = \"udp\"\nmatch.sni = [\"a\"]",
            "6: route \"web\": match.sni: needs protocol = \"tcp\"; this route is udp",
        ),
        (
            "protocol = \"udp\"\nmatch.alpn = [\"a\"]",
            "6: route \"web\": match.alpn: needs protocol = \"tcp\"; this route is udp",
        ),
        (
            "protocol = \"udp\"\ntls.mode = \"passthrough\"",
            "6: route \"web\": tls: needs protocol = \"tcp\"; this route is udp",
        ),
        (
            "protocol = \"udp\"\nproxy_protocol.send = \"v2\"",
            "6: route \"web\": proxy_protocol: needs protocol = \"tcp\"; this route is udp",
        ),
        (
            "protocol = \"udp\"\nbackend_tls.ca = \"a\"",
            "6: route \"web\": backend_tls: needs protocol = \"tcp\"; this route is udp",
        ),
        (
            "tls.mode = \"terminate\"",
            "5: route \"web\": tls.certificates: missing; mode = \"terminate\" needs at least one, such as [{ cert = \"api.pem\", key = \"api.key\" }], or \"acme\"",
        ),
        (
            "tls.mode = \"terminate\"\ntls.certificates = []",
            "6: route \"web\": tls.certificates: [] is empty; mode = \"terminate\" needs at least one, such as { cert = \"api.pem\", key = \"api.key\" }",
        ),
        (
            "tls.mode = \"terminate\"\ntls.certificates = [{ cert = \"c\" }]",
            "6: route \"web\": tls.certificates[0].key: missing; a file name is required",
        ),
        (
            "tls.mode = \"passthrough\"\ntls.client_ca = \"c\"",
            "6: route \"web\": tls.client_ca: needs mode = \"terminate\"; with \"passthrough\" the backend does TLS",
        ),
        (
            "tls.mode = \"passthrough\"\ntls.min_version = \"1.3\"",
            "6: route \"web\": tls.min_version: needs mode = \"terminate\"; with \"passthrough\" the backend does TLS",
        ),
        (
            "tls.mode = \"passthrough\"\nbackend_tls.ca = \"a\"",
            "6: route \"web\": backend_tls: TLS is passed through to the backend already; it needs tls.mode = \"terminate\"",
        ),
        (
            "match.sni = [\"a\"]\nbackend_tls.ca = \"a\"",
            "6: route \"web\": backend_tls: a route that matches by sni or alpn passes TLS through unless tls.mode = \"terminate\"",
        ),
        ("backend_tls.cert = \"a\"", "5: route \"web\": backend_tls.key: missing; cert needs it"),
        ("backend_tls.key = \"a\"", "5: route \"web\": backend_tls.cert: missing; key needs it"),
        ("backend_tls.ca = \"\"", "5: route \"web\": backend_tls.ca: \"\" is not a file name"),
        (
            "backend_tls.server_name = \"a b\"",
            "5: route \"web\": backend_tls.server_name: \"a b\" is not a host name: only a–z, 0–9, -, _ and . may be in it",
        ),
    ] {
        assert_eq!(bad(&route_with(lines)), [expected]);
    }
}

#[test]
fn a_health_check_needs_a_port_to_check() {
    let route = |listen: &str, backend: &str| {
        format!("[[route]]\nname = \"web\"\nlisten = {listen}\nbackends = [\"{backend}\"]\nhealth = {{}}")
    };
    let message = "5: route \"web\": health: backend \"10.0.0.2\" has no port to check, and the route listens on more than one; give the backend a port or leave health away";
    assert_eq!(bad(&route("[\"0.0.0.0:80-81\"]", "10.0.0.2")), [message]);
    assert_eq!(bad(&route("[\"0.0.0.0:80\", \"[::]:81\"]", "10.0.0.2")), [message]);
    good(&route("[\"0.0.0.0:80\", \"[::]:80\"]", "10.0.0.2"));
    good(&route("[\"0.0.0.0:80-81\"]", "10.0.0.2:80"));
}

#[test]
fn a_bad_section_says_what_is_allowed() {
    let long = format!("[admin]\nsocket = \"/{}\"", "x".repeat(107));
    let too_long = format!(
        "2: admin.socket: \"/{}\" is 108 bytes long; the path of a Unix socket has at most 107",
        "x".repeat(107)
    );
    each(&[
        (
            "[admin]\nlisten = \"localhost:9900\"",
            "2: admin.listen: \"localhost:9900\": \"localhost\" is a name; an IP address is expected",
        ),
        (
            "[admin]\nlisten = \"127.0.0.1\"",
            "2: admin.listen: \"127.0.0.1\" has no port; address:port or \"off\" is expected",
        ),
        (
            "[admin]\nlisten = false",
            "2: admin.listen: false is a boolean; an address and port such as \"127.0.0.1:9900\", or \"off\", is expected",
        ),
        ("[admin]\nsock = \"a\"", "2: admin.sock: unknown key; did you mean \"socket\"?"),
        (&long, &too_long),
        (
            "[log]\nlevel = \"inof\"",
            "2: log.level: \"inof\": \"inof\" is not a level (trace, debug, info, warn, error, off)",
        ),
        (
            "[log]\nlevel = \"info,=debug\"",
            "2: log.level: \"info,=debug\": \"\" is not the name of a module, such as \"shunt::health\"",
        ),
        ("[log]\nformat = \"jsn\"", "2: log.format: \"jsn\" is not one of \"text\", \"json\"; did you mean \"json\"?"),
        ("[log]\naccess = true", "2: log.access: true is a boolean; one of \"all\", \"errors\", \"off\" is expected"),
        (
            "[kernel]\nmark_mask = \"0xff00ff00\"",
            "2: kernel.mark_mask: \"0xff00ff00\" is not one contiguous run of 8 to 32 bits, such as \"0xffffff00\"",
        ),
        (
            "[kernel]\nmark_mask = 0x7f",
            "2: kernel.mark_mask: \"0x7f\" is not one contiguous run of 8 to 32 bits, such as \"0xffffff00\"",
        ),
        (
            "[kernel]\nmark_mask = \"all\"",
            "2: kernel.mark_mask: \"all\" is not a mask of 32 bits, such as \"0xffffff00\"",
        ),
        ("[kernel]\nlock_table = \"yes\"", "2: kernel.lock_table: \"yes\" is a string; true or false is expected"),
        (
            "[defaults]\nbackends = []",
            "2: defaults.backends: unknown key; known here: balance, engine, keepalive, limits, timeouts",
        ),
        ("[default]\nengine = \"nft\"", "1: default: unknown key; did you mean \"defaults\"?"),
        ("[route]\nname = \"a\"", "1: route: this is a table; [[route]], in double brackets, is expected"),
    ]);
}

#[test]
fn a_key_in_the_wrong_place_is_told_where_it_belongs() {
    each_in_a_route(&[
        ("backend = []", "backend: unknown key; did you mean \"backends\"?"),
        ("timeout = \"4h\"", "timeout: unknown key; did you mean \"timeouts\"?"),
        ("idle = \"4h\"", "idle: unknown key; did you mean \"timeouts.idle\"?"),
        ("alpn = []", "alpn: unknown key; did you mean \"match.alpn\" or \"tls.alpn\"?"),
        (
            "\"odd key\" = 1",
            "\"odd key\": unknown key; known here: name, listen, protocol, match, backends, balance, engine, source_address, allow, deny, keepalive, limits, timeouts, health, tls, backend_tls, proxy_protocol",
        ),
    ]);
}

#[test]
fn a_route_without_a_good_name_is_still_told_apart() {
    let rest = "listen = [\"0.0.0.0:80\"]\nbackends = [\"a\"]\nallow = [\"x\"]";
    let network = "is not a network; address/prefix is expected, such as \"10.0.0.0/8\" or \"fd00::/8\"";
    assert_eq!(
        bad(&format!("[[route]]\n{rest}")),
        [
            "1: route[0]: name: missing; a name of 1 to 63 of a–z, 0–9 and - is required".to_owned(),
            format!("4: route[0]: allow[0]: \"x\" {network}"),
        ]
    );
    assert_eq!(
        bad(&format!("[[route]]\nname = \"Web\"\n{rest}")),
        [
            "2: route \"Web\": name: \"Web\" is not a route name; 1 to 63 of a–z, 0–9 and - are allowed".to_owned(),
            format!("5: route \"Web\": allow[0]: \"x\" {network}"),
        ]
    );
    assert_eq!(
        bad("[[route]]\nname = \"web\"\nlisten = []\nbackends = []"),
        [
            "3: route \"web\": listen: [] is empty; at least one address:port is required",
            "4: route \"web\": backends: [] is empty; at least one backend is required",
        ]
    );
}

#[test]
fn a_name_is_taken_once() {
    let second = "[[route]]\nname = \"web\"\nlisten = [\"0.0.0.0:81\"]\nbackends = [\"a\"]";
    assert_eq!(
        bad(&format!("{}{second}", route_with(""))),
        ["7: route \"web\": name: \"web\" is the name of the route in line 1 already"]
    );
}

#[test]
fn ten_mistakes_are_ten_lines_in_the_order_of_the_file() {
    let text = r#"
[log]
format = "xml"
[admin]
listen = "127.0.0.1:0"
[defaults]
timeouts = { connect = "soon" }
[[route]]
name = "Web"
listen = ["0.0.0.0:80", "0.0.0.0:99999"]
backends = ["10.0.0.2:8080", "10.0.0.2:8080"]
limits = { connections = -5 }
colour = "red"
[[route]]
name = "db"
listen = ["0.0.0.0:80"]
backends = []
"#;
    let problems = read(text).unwrap_err();
    let lines: Vec<usize> = problems.problems.iter().map(|problem| problem.line).collect();
    assert_eq!(lines, [3, 5, 7, 9, 10, 11, 12, 13, 16, 17]);
    let text = problems.to_string();
    assert_eq!(text.lines().count(), 10);
    assert!(text.lines().all(|line| line.starts_with("/etc/shunt/shunt.toml:")), "{text}");
    assert!(
        text.contains("/etc/shunt/shunt.toml:10: route \"Web\": listen[1]: port 99999 is not a port (1–65535)\n"),
        "{text}"
    );
}

#[test]
fn a_column_counts_characters() {
    let problems = read("[log]\n\"é\" = 1").unwrap_err();
    assert_eq!((problems.problems[0].line, problems.problems[0].column), (2, 1));
    let problems = read("log = { format = \"é\", access = \"x\" }").unwrap_err();
    assert_eq!((problems.problems[1].line, problems.problems[1].column), (1, 32));
}
