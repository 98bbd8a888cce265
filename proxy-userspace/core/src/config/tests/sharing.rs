//! Routes on the same ports: which may be, which may not, and what each knows of the others.

use super::*;

fn route(name: &str, listen: &str, more: &str) -> String {
    format!("[[route]]\nname = \"{name}\"\nlisten = [\"{listen}\"]\nbackends = [\"10.0.0.2\"]\n{more}\n")
}

fn two(first: (&str, &str), second: (&str, &str)) -> String {
    route("a", first.0, first.1) + &route("b", second.0, second.1)
}

const PORT: &str = "0.0.0.0:443";

#[test]
fn routes_that_cannot_be_told_apart_are_an_error_that_names_both() {
    let default = "neither has a match; give one of them a match, or another port";
    let other = "give one of them another match, or another port";
    for (text, expected) in [
        (two((PORT, ""), (PORT, "")), format!("0.0.0.0:443/tcp is claimed by route \"a\" (line 1) too, and {default}")),
        (
            two((PORT, "protocol = \"udp\""), (PORT, "protocol = \"udp\"")),
            format!("0.0.0.0:443/udp is claimed by route \"a\" (line 1) too, and {default}"),
        ),
        (
            two(("0.0.0.0:400-500", ""), (PORT, "")),
            format!("0.0.0.0:443/tcp overlaps 0.0.0.0:400-500/tcp of route \"a\" (line 1), and {default}"),
        ),
        (
            two((PORT, ""), ("0.0.0.0:400-500", "")),
            format!("0.0.0.0:400-500/tcp overlaps 0.0.0.0:443/tcp of route \"a\" (line 1), and {default}"),
        ),
        (
            two(("[::]:1-9", ""), ("[::]:9-12", "")),
            format!("[::]:9-12/tcp overlaps [::]:1-9/tcp of route \"a\" (line 1), and {default}"),
        ),
        (
            two((PORT, "match.sni = [\"x\", \"y\"]"), (PORT, "match.sni = [\"z\", \"Y\"]")),
            format!("0.0.0.0:443/tcp is claimed by route \"a\" (line 1) too, and both match sni \"y\"; {other}"),
        ),
        (
            two(
                (PORT, "match = { sni = [\"x\"], alpn = [\"h2\"] }"),
                (PORT, "match = { sni = [\"x\"], alpn = [\"h3\", \"h2\"] }"),
            ),
            format!(
                "0.0.0.0:443/tcp is claimed by route \"a\" (line 1) too, and both match sni \"x\", alpn \"h2\"; {other}"
            ),
        ),
        (
            two((PORT, "match.client = [\"10.0.0.0/8\"]"), (PORT, "match.client = [\"10.0.0.0/8\"]")),
            format!(
                "0.0.0.0:443/tcp is claimed by route \"a\" (line 1) too, and both match client 10.0.0.0/8; {other}"
            ),
        ),
    ] {
        assert_eq!(bad(&text), [format!("8: route \"b\": listen[0]: {expected}")], "for\n{text}");
    }
}

#[test]
fn routes_that_can_be_told_apart_share_a_port() {
    for text in [
        two((PORT, ""), (PORT, "match.sni = [\"x\"]")),
        two((PORT, "match.sni = [\"x\"]"), (PORT, "match = { sni = [\"x\"], alpn = [\"h2\"] }")),
        two((PORT, "match.sni = [\"*.x\"]"), (PORT, "match.sni = [\"x\"]")),
        two((PORT, "match.client = [\"10.0.0.0/8\"]"), (PORT, "match.client = [\"10.1.0.0/16\"]")),
        two(("0.0.0.0:400-500", ""), (PORT, "match.sni = [\"x\"]")),
    ] {
        let config = good(&text);
        assert_eq!(*config.routes[0].shares_port_with, [0, 1], "{text}");
        assert_eq!(*config.routes[1].shares_port_with, [0, 1], "{text}");
    }
}

#[test]
fn routes_on_one_port_agree_on_who_sends_a_proxy_header() {
    let from = |net: &str| format!("proxy_protocol.accept_from = {net}\nmatch.sni = [\"x\"]");
    let expected = "8: route \"b\": listen[0]: 0.0.0.0:443/tcp is shared with route \"a\" (line 1), whose \
                    proxy_protocol.accept_from is another: the PROXY header comes before what tells the two apart; give \
                    both the same, or another port";
    let b = from("[\"10.0.0.0/8\", \"fd00::/8\"]");
    for listen in [PORT, "0.0.0.0:400-500"] {
        assert_eq!(bad(&two((listen, ""), (PORT, &b))), [expected], "{listen}");
    }
    let a = "proxy_protocol.accept_from = [\"fd00::/8\", \"10.0.0.0/8\"]\nmatch.alpn = [\"h2\"]";
    good(&two((PORT, a), (PORT, &b)));
}

#[test]
fn other_addresses_protocols_and_ports_are_not_shared() {
    for text in [
        two((PORT, ""), ("10.0.0.1:443", "")),
        two((PORT, ""), ("[::]:443", "")),
        two((PORT, ""), (PORT, "protocol = \"udp\"")),
        two((PORT, ""), ("0.0.0.0:444", "")),
        two(("0.0.0.0:1-10", ""), ("0.0.0.0:11-20", "")),
    ] {
        assert!(good(&text).routes.iter().all(|route| route.shares_port_with.is_empty()), "{text}");
    }
}

#[test]
fn sharing_reaches_over_a_route_that_is_on_both_ports() {
    let text = route("a", "0.0.0.0:80", "match.client = [\"10.0.0.0/8\"]")
        + &route("b", "0.0.0.0:80\", \"0.0.0.0:90", "")
        + &route("c", "0.0.0.0:90", "match.client = [\"10.0.0.0/8\"]")
        + &route("d", "0.0.0.0:91", "");
    let config = good(&text);
    for route in &config.routes[..3] {
        assert_eq!(*route.shares_port_with, [0, 1, 2]);
    }
    assert!(config.routes[3].shares_port_with.is_empty());
}

#[test]
fn a_route_may_not_overlap_itself() {
    assert_eq!(
        bad(&route("a", "0.0.0.0:80-90\", \"0.0.0.0:85", "")),
        ["3: route \"a\": listen[1]: 0.0.0.0:85/tcp overlaps listen[0], 0.0.0.0:80-90/tcp",]
    );
    assert_eq!(
        bad(&route("a", "0.0.0.0:80\", \"0.0.0.0:80", "")),
        ["3: route \"a\": listen[1]: \"0.0.0.0:80\" is in this list already, at [0]; nothing may be in it twice",]
    );
}

#[test]
fn each_pair_is_reported_once_at_the_later_route() {
    let listen = "0.0.0.0:443\", \"[::]:443";
    let problems = bad(&(route("a", listen, "") + &route("b", listen, "") + &route("c", listen, "")));
    assert_eq!(problems.len(), 2, "{problems:#?}");
    assert!(
        problems[0].starts_with("8: route \"b\": listen[0]: ")
            && problems[1].starts_with("13: route \"c\": listen[0]: ")
    );
}

#[test]
fn a_mistyped_match_is_not_also_an_overlap() {
    assert_eq!(bad(&two((PORT, ""), (PORT, "match.sni = [\"*\"]"))).len(), 1);
    assert_eq!(bad(&two((PORT, ""), (PORT, "match.snl = [\"x\"]"))).len(), 1);
    assert_eq!(bad(&two((PORT, ""), (PORT, "protocol = \"ucp\""))).len(), 1);
}

#[test]
fn a_route_may_not_take_the_port_of_the_admin_away() {
    let takes = |listen: &str| {
        format!(
            "3: route \"a\": listen[0]: {listen}/tcp takes admin.listen, 127.0.0.1:9900, away; give one of them another port"
        )
    };
    assert_eq!(bad(&route("a", "127.0.0.1:9900", "")), [takes("127.0.0.1:9900")]);
    assert_eq!(bad(&route("a", "0.0.0.0:9000-9999", "")), [takes("0.0.0.0:9000-9999")]);
    good(&route("a", "127.0.0.1:9900", "protocol = \"udp\""));
    good(&route("a", "10.0.0.1:9900", ""));
    good(&route("a", "[::]:9900", ""));
    good(&format!("[admin]\nlisten = \"off\"\n{}", route("a", "127.0.0.1:9900", "")));
}

#[test]
fn a_fingerprint_changes_exactly_when_something_that_concerns_the_route_does() {
    let of = |text: &str| good(text).routes.iter().map(|route| route.fingerprint).collect::<Vec<_>>();
    let before = of(&two((PORT, "match.sni = [\"x\"]"), ("0.0.0.0:80", "")));
    // A comment, another order of keys, a default written out, a route elsewhere: nothing.
    let same = "# hello\n".to_owned()
        + &route("z", "0.0.0.0:1", "")
        + &two((PORT, "balance = \"round-robin\"\nmatch.sni = [\"x\"]"), ("0.0.0.0:80", ""));
    assert_eq!(of(&same)[1..], before);
    // A route of its own: only that one.
    let other = of(&two((PORT, "match.sni = [\"x\"]"), ("0.0.0.0:80", "engine = \"copy\"")));
    assert_eq!(other[0], before[0]);
    assert_ne!(other[1], before[1]);
    // A route on the same port: both.
    let shared = of(&two((PORT, "match.sni = [\"x\"]"), (PORT, "")));
    assert_ne!(shared[0], before[0]);
    let changed = of(&two((PORT, "match.sni = [\"x\"]"), (PORT, "engine = \"copy\"")));
    assert_ne!(changed[0], shared[0]);
    assert_ne!(changed[1], shared[1]);
}

#[test]
fn routes_that_listen_alike_hold_one_list() {
    let config = good(&two((PORT, ""), (PORT, "match.sni = [\"x\"]")));
    assert!(Arc::ptr_eq(&config.routes[0].shares_port_with, &config.routes[1].shares_port_with));
}
