//! Both kernels in memory: what comes before what, and what happens when one of them refuses.

use std::{path::Path, time::Duration};

use proxy_core::{
    config::parse,
    reason::Reason,
    ruleset::{Counter, Key, KeyPart, names},
    view::BackendAdmin,
};

use super::{counters::WHOLE, start::Found, *};
use crate::{
    kernel::nft::MemoryNft,
    stream::{StreamError, memory::MemoryStreams},
};

type Both = Reconciler<MemoryNft, MemoryStreams>;

fn route(name: &str, port: u16, more: &str) -> String {
    format!("[[route]]\nname = \"{name}\"\nlisten = [\"10.0.0.1:{port}\"]\nbackends = [\"10.0.1.1:80\"]\n{more}\n")
}

fn config(text: &str) -> Config {
    parse(text, Path::new("/t.toml")).unwrap_or_else(|problems| panic!("{problems}"))
}

fn open(text: &str, nft: MemoryNft) -> (Both, Found) {
    let streams = MemoryStreams::default();
    Reconciler::open(Some(nft), streams, config(text), Capabilities::all(), Instant::now()).expect("plan")
}

fn begin(text: &str) -> Both {
    let (mut both, found) = open(text, MemoryNft::new());
    both.install(&found).expect("installed");
    both
}

fn reload(both: &mut Both, text: &str) -> Result<Outcome, ReconcileError> {
    let prepared = both.prepare(config(text))?;
    both.carry_out(prepared, Instant::now())
}

impl Both {
    fn kernel(&mut self) -> &mut MemoryNft {
        self.nft.as_mut().expect("open")
    }

    fn daemon(&mut self) -> &mut MemoryStreams {
        self.streams.as_mut().expect("not stopping")
    }

    fn id(&self, name: &str) -> u32 {
        self.served[&RouteName::new(name).expect("valid")].id
    }

    /// Who is behind a port of 10.0.0.1, by name.
    fn behind(&self, port: u16) -> Vec<String> {
        let ports = &self.streams.as_ref().expect("not stopping").ports;
        let ids = ports.get(&([10, 0, 0, 1], port).into()).cloned().unwrap_or_default();
        let name = |id: u32| self.served.values().find(|s| s.id == id).map(|s| s.plan.route.name.to_string());
        ids.into_iter().map(|id| name(id).unwrap_or_else(|| format!("nobody with id {id}"))).collect()
    }

    /// Marks the kernel sets for a port of 10.0.0.1.
    fn forwards(&mut self, port: u16) -> bool {
        let Some(ruleset) = self.kernel().ruleset() else { return false };
        let port = port.to_be_bytes();
        let key = |key: &Key| key.bytes().windows(2).any(|two| two == port);
        ruleset.sets[names::EXACT[0]].elements.keys().any(key)
    }

    fn in_use(&self) -> bool {
        self.ids.id(&RouteName::new("a").expect("valid")).is_some()
    }
}

fn refused_by_nft() -> NftError {
    NftError::LostAnswers
}

fn refused_by_streams() -> StreamError {
    StreamError::Start { call: "test", error: std::io::Error::other("refused") }
}

const COPY: &str = "engine = \"copy\"";

#[test]
fn without_a_route_for_the_kernel_there_is_no_table_until_one_comes() {
    let mut both = begin(&route("a", 80, COPY));
    assert!(both.kernel().ruleset().is_none() && !both.has_table());
    assert_eq!(both.behind(80), ["a"]);
    assert!(!both.repair().expect("nothing to mend"));
    let text = route("a", 80, COPY) + &route("b", 81, "");
    let outcome = reload(&mut both, &text).expect("accepted");
    assert!(outcome.changes > 0 && both.has_table() && both.forwards(81));
    assert_eq!(both.verify().expect("read"), 0);
    reload(&mut both, &route("a", 80, COPY)).expect("accepted");
    assert!(both.has_table(), "it stays for the connections it has");
}

#[test]
fn without_nftables_relayed_routes_are_served_all_the_same() {
    let unprivileged = Capabilities { net_admin: false, ..Capabilities::all() };
    let opened = Reconciler::<MemoryNft, _>::open(
        None,
        MemoryStreams::default(),
        config(&route("a", 8080, "")),
        unprivileged,
        Instant::now(),
    );
    let (mut both, found) = opened.expect("plan");
    both.install(&found).expect("installed");
    assert_eq!(both.behind(8080), ["a"]);
    assert!(both.counters(&[], Instant::now()).expect("none").is_empty());
    let udp = route("a", 8080, "") + &route("dns", 53, "protocol = \"udp\"");
    assert!(matches!(reload(&mut both, &udp), Err(ReconcileError::Unserved(_))));
}

#[test]
fn when_a_socket_cannot_be_bound_the_table_is_not_touched() {
    let mut both = begin(&route("a", 80, ""));
    let before = both.kernel().ruleset().cloned();
    both.daemon().fail_next = Some(refused_by_streams());
    let text = route("a", 80, "allow = [\"10.0.0.0/8\"]") + &route("b", 81, COPY);
    assert!(matches!(reload(&mut both, &text), Err(ReconcileError::Streams(_))));
    assert_eq!(both.kernel().ruleset().cloned(), before);
    assert!(both.behind(81).is_empty() && both.daemon().routes.is_empty());
    reload(&mut both, &text).expect("accepted the second time");
    assert_eq!(both.behind(81), ["b"]);
}

#[test]
fn when_nftables_refuses_nothing_is_listened_on() {
    let mut both = begin(&route("a", 80, ""));
    both.kernel().fail_next(refused_by_nft());
    let text = route("a", 80, "allow = [\"10.0.0.0/8\"]") + &route("b", 81, COPY);
    assert!(matches!(reload(&mut both, &text), Err(ReconcileError::Nft(_))));
    assert!(both.behind(81).is_empty() && both.daemon().routes.is_empty());
    assert_eq!(both.plan().routes().len(), 1);
    assert!(both.status.last_error.is_some());
    reload(&mut both, &text).expect("accepted the second time");
    assert_eq!(both.behind(81), ["b"]);
}

#[test]
fn a_route_that_changes_its_engine_keeps_its_connections_with_both() {
    let mut both = begin(&route("a", 80, ""));
    let id = both.id("a");
    let outcome = reload(&mut both, &route("a", 80, COPY)).expect("accepted");
    assert!(outcome.effects.is_empty(), "its forwarded connections go on: {:?}", outcome.effects);
    assert!(!both.forwards(80));
    assert_eq!((both.behind(80), both.id("a")), (vec!["a".to_owned()], id));
    let ruleset = both.kernel().ruleset().expect("a table");
    assert_eq!(ruleset.sets[names::CONNECTIONS].elements.len(), 1, "they are still counted");
    reload(&mut both, &route("a", 80, "")).expect("accepted");
    assert!(both.forwards(80) && both.behind(80).is_empty());
    assert!(both.daemon().gone.is_empty() && both.daemon().routes.contains_key(&id), "its relayed ones go on too");
}

#[test]
fn a_route_is_forgotten_when_nothing_is_left_with_either() {
    let mut both = begin(&route("a", 80, ""));
    let id = both.id("a");
    reload(&mut both, &route("a", 80, COPY)).expect("accepted");
    let outcome = reload(&mut both, &route("b", 81, "")).expect("accepted");
    assert_eq!(both.daemon().gone, [id]);
    assert!(matches!(outcome.effects[..], [Effect::Drain { id: drained, .. }] if drained == id));
    assert!(both.drained(id, Carrier::Daemon).expect("known").is_empty() && both.in_use());
    assert_eq!(both.drained(id, Carrier::Kernel).expect("known"), [Effect::Forget { id }]);
    assert!(!both.in_use() && both.draining().is_empty());
    assert_eq!(both.verify().expect("read"), 0);
}

#[test]
fn a_relayed_route_that_is_removed_drains_in_the_daemon_alone() {
    let mut both = begin(&(route("a", 80, COPY) + &route("b", 81, "")));
    let id = both.id("a");
    let outcome = reload(&mut both, &route("b", 81, "")).expect("accepted");
    assert_eq!((both.daemon().gone.clone(), both.behind(80).len()), (vec![id], 0));
    assert!(outcome.effects.is_empty(), "the flow table has never heard of it");
    let views = both.route_views();
    assert_eq!((views[1].name.as_str(), views[1].engine), ("a", Engine::Copy));
    assert!(both.drained(id, Carrier::Daemon).expect("known").is_empty());
    assert!(!both.in_use() && both.daemon().gone.is_empty(), "its counters are forgotten too");
}

#[test]
fn a_relayed_route_hears_of_its_backends_and_the_table_does_not() {
    let two = "backends = [\"10.0.1.1:80\", \"10.0.1.2:80\"]";
    let text = route("a", 80, COPY).replace("backends = [\"10.0.1.1:80\"]", two) + &route("b", 81, "");
    let mut both = begin(&text);
    let id = both.id("a");
    let before = both.kernel().ruleset().cloned();
    let up = |both: &mut Both| -> Vec<bool> { both.daemon().routes[&id].endpoints.iter().map(|e| e.up).collect() };
    assert_eq!(up(&mut both), [true, true]);
    both.set_backend("a", "10.0.1.2:80", BackendAdmin::Drain).expect("told").expect("known");
    assert_eq!(up(&mut both), [true, false]);
    both.daemon().fail_next = Some(refused_by_streams());
    assert!(both.set_backend("a", "10.0.1.2:80", BackendAdmin::Ready).is_err());
    assert!(
        !both
            .backend_is_up(
                &RouteName::new("a").expect("valid"),
                &both.targets(&RouteName::new("a").expect("valid"))[1].0
            )
            .expect("known")
    );
    assert_eq!(both.kernel().ruleset().cloned(), before);
}

#[test]
fn a_port_is_told_its_whole_membership_whenever_it_changes() {
    let sni =
        |name: &str| route(name, 443, &format!("match.sni = [\"{name}.example\"]\ntls = {{ mode = \"passthrough\" }}"));
    let mut both = begin(&(sni("a") + &sni("b")));
    assert_eq!(both.behind(443), ["a", "b"]);
    let outcome = reload(&mut both, &(sni("a") + &sni("b") + &sni("c"))).expect("accepted");
    assert_eq!((outcome.added.len(), outcome.changed.len()), (1, 0), "one more name changes no other route");
    assert_eq!(both.behind(443), ["a", "b", "c"]);
    reload(&mut both, &(sni("c") + &sni("a") + &sni("b") + &route("d", 80, COPY))).expect("accepted");
    assert_eq!(
        (both.behind(443), both.behind(80)),
        (["c", "a", "b"].map(str::to_owned).to_vec(), vec!["d".to_owned()])
    );
    reload(&mut both, &(sni("b") + &sni("a") + &route("d", 80, COPY))).expect("accepted");
    assert_eq!(both.behind(443), ["b", "a"], "the order of the file counts");
    reload(&mut both, &route("d", 80, COPY)).expect("accepted");
    assert!(both.behind(443).is_empty());
    assert_eq!(both.behind(80), ["d"]);
}

#[test]
fn ranges_that_overlap_are_told_port_by_port() {
    let range = route("a", 80, COPY).replace("10.0.0.1:80\"", "10.0.0.1:80-82\"");
    let inside = route("b", 81, "match.client = [\"10.9.0.0/16\"]\nengine = \"copy\"");
    let both = begin(&(range + &inside));
    assert_eq!([80, 81, 82].map(|port| both.behind(port).concat()), ["a", "ab", "a"]);
}

#[test]
fn a_range_that_comes_to_overlap_another_route_leaves_the_table_right() {
    let range = route("a", 80, COPY).replace("10.0.0.1:80\"", "10.0.0.1:80-82\"");
    let inside = route("b", 81, "match.client = [\"10.9.0.0/16\"]\nengine = \"copy\"");
    let plain = route("c", 90, "");
    let mut both = begin(&(range.clone() + &plain));
    for text in [range.clone() + &inside + &plain, range + &plain] {
        reload(&mut both, &text).expect("accepted");
        let fresh = begin(&text);
        let elements = |both: &Both| {
            let nft = both.nft.as_ref().expect("open");
            nft.ruleset().expect("a table").sets[names::SHARED[0]].elements.len()
        };
        assert_eq!(elements(&both), elements(&fresh));
        assert_eq!(both.verify().expect("read"), 0);
    }
}

#[test]
fn what_is_dialled_at_an_address_of_its_own_passes_a_route_for_every_address() {
    let every = route("a", 80, "").replace("10.0.0.1:80", "0.0.0.0:80");
    let mut both = begin(&(every.clone() + &route("b", 80, COPY)));
    let passes = |both: &mut Both| both.kernel().ruleset().expect("a table").sets[names::SHARED[0]].elements.len();
    assert_eq!(passes(&mut both), 1);
    reload(&mut both, &every).expect("accepted");
    assert_eq!(passes(&mut both), 0);
    assert_eq!(both.verify().expect("read"), 0);
}

#[test]
fn a_restart_knows_the_connections_of_a_route_that_is_relayed_now() {
    let mut both = begin(&route("a", 80, ""));
    let (id, table) = (both.id("a"), both.kernel().clone());
    let (mut next, found) = open(&route("a", 80, COPY), table);
    assert_eq!(found.serves.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [id]);
    next.install(&found).expect("installed");
    assert!(next.has_table() && !next.forwards(80));
    assert_eq!((next.behind(80), next.id("a")), (vec!["a".to_owned()], id));
}

#[test]
fn while_stopping_nothing_changes() {
    let mut both = begin(&route("a", 80, COPY));
    assert_eq!(both.longest_drain(), Duration::from_secs(30));
    assert!(both.take_streams().is_some());
    assert!(matches!(reload(&mut both, &route("b", 81, COPY)), Err(ReconcileError::Stopping)));
}

#[test]
fn of_many_routes_only_those_that_move_are_read_and_all_of_them_now_and_then() {
    let many = (0..1100).map(|n| route(&format!("r{n}"), 1000 + n, "")).collect::<String>();
    let text =
        many + &route("seen", 80, "") + &route("unseen", 81, "") + &route("strict", 82, "deny = [\"10.9.0.0/16\"]");
    let mut both = begin(&text);
    let ids = ["seen", "unseen", "strict"].map(|name| both.id(name));
    let keys = ids.map(|id| Key::new(&[KeyPart::Mark(both.mark(id))]));
    let read = |both: &mut Both, moving: &[u32], at: Instant| {
        let counters = both.counters(moving, at).expect("read");
        counters
            .into_iter()
            .map(|(id, c)| (id, (c.connections, c.outbound.bytes, c.refused.clone())))
            .collect::<HashMap<_, _>>()
    };
    let begun = Instant::now();
    assert!(read(&mut both, &[], begun).is_empty());

    let more = Counter { packets: 2, bytes: 100 };
    for key in &keys {
        both.kernel().count(names::CONNECTIONS, key, more);
        both.kernel().count(names::TRAFFIC_OUT, key, more);
    }
    both.kernel().count(names::DENIED, &keys[2], more);
    let [seen, unseen, strict] = ids;
    let second = read(&mut both, &[seen], begun + Duration::from_secs(1));
    let denied = (2, 100, vec![(Reason::Denied, 2)]);
    assert_eq!(second, HashMap::from([(seen, (2, 100, Vec::new())), (strict, denied.clone())]));
    both.kernel().count(names::CONNECTIONS, &keys[2], more);
    let third = read(&mut both, &[strict], begun + Duration::from_secs(2));
    assert_eq!(
        third,
        HashMap::from([(strict, (4, 100, vec![(Reason::Denied, 2)]))]),
        "what was refused is not forgotten"
    );
    // Somebody moves that the table does not have: the whole is read.
    assert_eq!(read(&mut both, &[seen, 1_000_000], begun + Duration::from_secs(3)).len(), 3);
    assert!(read(&mut both, &[], begun + Duration::from_secs(4)).is_empty());
    assert!(read(&mut both, &[], begun + WHOLE + Duration::from_secs(4)).contains_key(&unseen));
}
