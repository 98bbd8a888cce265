//! The table against a model of the kernel: random connections, random order of what the table gets to see.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use proptest::prelude::*;

use super::*;
use crate::{
    config::{MarkMask, Protocol},
    conntrack::{Entry, Event, TcpState, Traffic, Tuple},
    reason::Reason,
};

/// What happens in the kernel.
#[derive(Debug, Clone)]
enum Happening {
    /// A first packet; a client port that is in use does nothing.
    Begin {
        port: u16,
        udp: bool,
    },
    Packets {
        port: u16,
        count: u64,
    },
    /// The ruleset writes end bits; final ones make an `Update`.
    End {
        port: u16,
        end: usize,
    },
    Destroy {
        port: u16,
    },
}

#[derive(Debug, Clone)]
enum Step {
    Kernel(Happening),
    /// The table reads some of what is queued.
    Deliver {
        count: usize,
    },
    /// The event queue overflows: the newest are gone.
    Overrun {
        count: usize,
    },
    /// The kernel goes on after the queue was read and before the entries are, and again before it is read once more.
    Dump {
        full: bool,
        before: Vec<Happening>,
        after: Vec<Happening>,
    },
    Kill {
        port: u16,
    },
    /// The last update once more.
    Repeat,
    Wait {
        seconds: u64,
    },
}

fn happening() -> impl Strategy<Value = Happening> {
    let port = 1u16..12;
    prop_oneof![
        4 => (port.clone(), any::<bool>()).prop_map(|(port, udp)| Happening::Begin { port, udp }),
        3 => (port.clone(), 1u64..100).prop_map(|(port, count)| Happening::Packets { port, count }),
        3 => (port.clone(), 1usize..8).prop_map(|(port, end)| Happening::End { port, end }),
        3 => port.prop_map(|port| Happening::Destroy { port }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let meanwhile = || prop::collection::vec(happening(), 0..5);
    prop_oneof![
        12 => happening().prop_map(Step::Kernel),
        4 => (1usize..8).prop_map(|count| Step::Deliver { count }),
        1 => (1usize..6).prop_map(|count| Step::Overrun { count }),
        2 => (any::<bool>(), meanwhile(), meanwhile())
            .prop_map(|(full, before, after)| Step::Dump { full, before, after }),
        1 => (1u16..12).prop_map(|port| Step::Kill { port }),
        1 => Just(Step::Repeat),
        1 => (1u64..40).prop_map(|seconds| Step::Wait { seconds }),
    ]
}

struct Kernel {
    entries: BTreeMap<u16, Entry>,
    queue: VecDeque<Event>,
    last: Option<Event>,
    begun: u64,
    /// Beginnings are told, not only ends.
    tells_new: bool,
    /// Overruns may happen; they have not so far.
    lossy: bool,
    lossless: bool,
    now: Now,
    table: FlowTable,
    ended: Vec<Ended>,
}

impl Kernel {
    fn new(max: usize, tells_new: bool, lossy: bool) -> Self {
        let layout = MarkLayout::new(MarkMask::DEFAULT);
        let mut table = FlowTable::new(layout, max);
        let now = Now { mono: Duration::from_secs(1 << 20), wall: Duration::from_secs(1 << 30) };
        let info = RouteInfo {
            name: "r".into(),
            protocol: Protocol::Tcp,
            idle: Some(Duration::from_secs(20)),
            idle_warning: None,
            half_closed: Some(Duration::from_secs(10)),
            lifetime: Some(Duration::from_secs(60)),
            kernel_timeouts: false,
            drain_until: None,
        };
        table.set_routes(&RouteTable::from([(1, Arc::new(info))]), now);
        let mut kernel = Self {
            entries: BTreeMap::new(),
            queue: VecDeque::new(),
            last: None,
            begun: 0,
            tells_new,
            lossy,
            lossless: true,
            now,
            table,
            ended: Vec::new(),
        };
        kernel.dump(DumpKind::Full);
        kernel
    }

    /// The id depends on the port alone: the kernel gives ids again.
    fn begin(&mut self, port: u16, udp: bool) {
        if self.entries.contains_key(&port) {
            return;
        }
        self.begun += 1;
        let client = ([10, 0, 0, 1], port).into();
        let entry = Entry {
            id: u32::from(port),
            protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
            original: Tuple { source: client, destination: ([10, 0, 0, 2], 80).into() },
            reply: Tuple { source: ([10, 0, 1, (port % 3) as u8], 80).into(), destination: client },
            mark: self.table.layout().route_mark(1).expect("fits"),
            status: 0,
            timeout: Some(5),
            tcp_state: (!udp).then_some(TcpState::SynSent),
            traffic_in: Some(Traffic { packets: 1, bytes: 60 }),
            traffic_out: Some(Traffic::default()),
            started_ns: None,
            stopped_ns: None,
            event_ns: None,
        };
        let told = Entry { traffic_in: None, traffic_out: None, ..entry.clone() };
        self.entries.insert(port, entry);
        if self.tells_new {
            self.tell(Event::New(told));
        }
    }

    fn tell(&mut self, event: Event) {
        self.last = Some(event.clone());
        self.queue.push_back(event);
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Begin { port, udp } => self.begin(port, udp),
            Happening::Packets { port, count } => {
                // What is over carries nothing any more.
                let layout = self.table.layout();
                if let Some(entry) = self.entries.get_mut(&port).filter(|entry| lives(layout, entry)) {
                    entry.tcp_state = entry.tcp_state.map(|_| TcpState::Established);
                    entry.status |= 0b110;
                    for traffic in [&mut entry.traffic_in, &mut entry.traffic_out].into_iter().flatten() {
                        traffic.packets += count;
                        traffic.bytes += count * 100;
                    }
                }
            }
            Happening::End { port, end } => self.end(port, End::ALL[end]),
            Happening::Destroy { port } => {
                if let Some(entry) = self.entries.remove(&port) {
                    self.tell(Event::Destroy(entry));
                }
            }
        }
    }

    fn run(&mut self, step: Step) {
        self.now.mono += Duration::from_millis(10);
        self.now.wall += Duration::from_millis(10);
        match step {
            Step::Kernel(happening) => self.happen(happening),
            Step::Deliver { count } => self.deliver(count),
            Step::Overrun { count } if self.lossy => {
                let kept = self.queue.len().saturating_sub(count);
                self.queue.truncate(kept);
                self.queue.push_back(Event::Lost);
                self.lossless = false;
            }
            Step::Overrun { .. } => {}
            Step::Dump { full, before, after } => {
                self.dump_meanwhile(if full { DumpKind::Full } else { DumpKind::Live }, before, after);
            }
            Step::Kill { port } => self.kill(port),
            Step::Repeat => {
                // Only where no loss explains it: a table that misses events must believe what it is told.
                if !self.table.is_stale()
                    && self.lossless
                    && self.queue.is_empty()
                    && let Some(event) = self.last.clone().filter(|event| matches!(event, Event::Update(_)))
                {
                    self.table.apply(&event, self.now);
                }
            }
            Step::Wait { seconds } => {
                self.now.mono += Duration::from_secs(seconds);
                self.now.wall += Duration::from_secs(seconds);
                for key in self.table.expire(self.now) {
                    self.mark_cut(key);
                }
            }
        }
        self.check();
    }

    fn end(&mut self, port: u16, end: End) {
        let layout = self.table.layout();
        let Some(entry) = self.entries.get_mut(&port).filter(|entry| entry.protocol == Protocol::Tcp) else { return };
        if lives(layout, entry) {
            entry.mark = entry.mark & !layout.end_mask() | layout.end_bits(end);
            let told = Entry { traffic_in: None, traffic_out: None, ..entry.clone() };
            if !matches!(end, End::ClientFinished | End::BackendFinished) {
                self.tell(Event::Update(told));
            }
        }
    }

    fn kill(&mut self, port: u16) {
        let Some(id) = self.entries.get(&port).map(FlowId::of) else { return };
        if let Some(key) = self.table.cut(id, Reason::Killed, self.now) {
            self.mark_cut(key);
        }
    }

    fn mark_cut(&mut self, key: EntryKey) {
        let layout = self.table.layout();
        if let Some(entry) = self.entries.values_mut().find(|entry| EntryKey::from(&**entry) == key) {
            entry.mark = entry.mark & !layout.end_mask() | layout.end_bits(End::Cut);
        }
    }

    fn deliver(&mut self, count: usize) {
        for event in self.queue.drain(..count.min(self.queue.len())) {
            self.table.apply(&event, self.now);
        }
    }

    fn dump(&mut self, kind: DumpKind) {
        self.dump_meanwhile(kind, Vec::new(), Vec::new());
    }

    fn dump_meanwhile(&mut self, kind: DumpKind, before: Vec<Happening>, after: Vec<Happening>) {
        self.deliver(usize::MAX);
        before.into_iter().for_each(|happening| self.happen(happening));
        self.table.begin_dump(kind, self.now.mono + Duration::from_secs(2), self.now);
        let layout = self.table.layout();
        for entry in self.entries.values() {
            if lives(layout, entry) || kind == DumpKind::Full {
                self.table.observe(entry, self.now);
            }
        }
        after.into_iter().for_each(|happening| self.happen(happening));
        self.deliver(usize::MAX);
        self.table.end_dump(kind, self.now);
    }

    fn check(&mut self) {
        let tally = self.table.tally(1).expect("route");
        let terminated: u64 = tally.terminated_in_all();
        assert_eq!(tally.seen, tally.active + terminated);
        assert_eq!(tally.active, tally.backends.values().sum::<u64>());
        let active = self.table.records().filter(|record| record.state.is_active()).count() as u64;
        assert_eq!(tally.active, active);
        assert_eq!(tally.terminated(Reason::InternalError), 0);
    }

    /// All is delivered and dumped: the table must agree with the kernel.
    fn settle(&mut self) {
        self.dump(DumpKind::Full);
        self.dump(DumpKind::Full);
        self.check();
        let layout = self.table.layout();
        let expected: u64 = self.entries.values().filter(|entry| lives(layout, entry)).count() as u64;
        assert_eq!(self.table.tally(1).expect("route").active, expected);
        assert_eq!(self.table.len(), self.entries.len());
        let seen = self.table.tally(1).expect("route").seen;
        if self.lossless {
            assert_eq!(seen, self.begun);
        }
        for port in self.entries.keys().copied().collect::<Vec<_>>() {
            self.happen(Happening::Destroy { port });
        }
        self.deliver(usize::MAX);
        self.table.take_ended(&mut self.ended);
        let tally = self.table.tally(1).expect("route");
        assert_eq!((tally.active, self.ended.len() as u64), (0, tally.seen), "one line per connection");
        let logged: u64 = self.ended.iter().map(|ended| ended.traffic_in.bytes).sum();
        assert_eq!(logged, tally.traffic_in.bytes, "bytes of the lines are the bytes of the route");
    }
}

fn lives(layout: MarkLayout, entry: &Entry) -> bool {
    matches!(layout.end(entry.mark), End::Open | End::ClientFinished | End::BackendFinished)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_connection_ends_once_and_the_table_agrees_with_the_kernel(
        tells_new: bool,
        lossy: bool,
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut kernel = Kernel::new(1000, tells_new, lossy);
        for step in steps {
            kernel.run(step);
        }
        kernel.settle();
    }

    #[test]
    fn a_table_that_is_too_small_never_counts_twice(
        tells_new: bool,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut kernel = Kernel::new(3, tells_new, true);
        for step in steps {
            kernel.run(step);
        }
        kernel.dump(DumpKind::Full);
        kernel.check();
        prop_assert!(kernel.table.len() <= 3);
    }
}
