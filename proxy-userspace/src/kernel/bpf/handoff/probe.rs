//! The self-probe: packets of every kind through the program in the kernel and through the same translation here. They must agree.

mod packet;

use aya::{
    TestRun, TestRunOptions,
    maps::{HashMap, MapData},
    programs::{SchedClassifier, TcAttachType},
};
use proxy_abi::handoff::{HandoffEntry, HandoffFlow, HandoffKey};
use proxy_translate::{
    bytes::Bytes,
    segment::{Context, Verdict},
    whole,
};

use super::{Gate, HandoffError, Sizes, flows::Flows, object};
use crate::kernel::bpf::BpfError;
pub use packet::Case;

/// What a successful self-probe saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HandoffProbe {
    /// Packets that came out as they should.
    pub packets: usize,
    /// Instructions that the verifier walked (v5.16+).
    pub verified_instructions: Option<u32>,
    /// Programs can be attached by tcx (v6.6+); else by clsact.
    pub tcx: bool,
}

/// `TC_ACT_UNSPEC`, -1.
const STACK: u32 = u32::MAX;
const TC_ACT_SHOT: u32 = 2;
const TC_ACT_REDIRECT: u32 = 7;
/// Where packets of a test run come in: the loopback interface.
const LOOPBACK: u32 = 1;
/// The Ethernet addresses are the next hop's, which depends on where the probe runs.
const ADDRESSES: usize = 12;

/// Runs every case.
pub fn run() -> Result<HandoffProbe, HandoffError> {
    let mut bench = Bench::new()?;
    // Once the program is loaded, which takes its time: clocks go on in the packets.
    let cases = packet::all();
    bench.run_all(&cases)?;
    let info = object::program(&mut bench.object)?.info().map_err(BpfError::from_program)?;
    let verified_instructions = info.verified_instruction_count();
    let tcx = SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok();
    Ok(HandoffProbe { packets: cases.len(), verified_instructions, tcx })
}

/// The program, loaded, with a table of its own.
pub struct Bench {
    object: aya::Ebpf,
    entries: HashMap<MapData, HandoffKey, HandoffEntry>,
    flows: Flows,
}

impl Bench {
    pub fn new() -> Result<Self, HandoffError> {
        let sizes = Sizes { flows: 1, events: 4096 };
        let mut object = object::load(sizes)?;
        let flows = object::map_flows(&mut object, sizes.flows)?;
        Ok(Self { entries: object::take(&mut object, "ENTRIES")?, flows, object })
    }

    pub fn run_all(&mut self, cases: &[Case]) -> Result<(), HandoffError> {
        cases.iter().try_for_each(|case| self.run(case))
    }

    /// Runs one case in the kernel and here.
    pub fn run(&mut self, case: &Case) -> Result<(), HandoffError> {
        let told = |what: String| HandoffError::Probe { packet: case.name.clone(), what };
        for (key, entry) in &case.entries {
            self.entries.insert(key, entry, 0).map_err(|source| BpfError::Map { map: "ENTRIES", source })?;
        }
        self.flows.set(Gate(0), case.flow);
        let (verdict, bytes) = test_run(object::program(&mut self.object)?, &case.bytes)?;
        let in_kernel = self.flows.get(Gate(0)).unwrap_or(HandoffFlow::EMPTY);
        let left: Vec<bool> = case.entries.iter().map(|(key, _)| self.entries.get(key, 0).is_ok()).collect();
        for (key, _) in &case.entries {
            let _ = self.entries.remove(key);
        }
        let Expected { verdict: expected, bytes: expected_bytes, flow } = expected(case);
        if !allowed(expected).contains(&verdict) {
            return Err(told(format!("the program answered {verdict:#x}, and should have done {expected:?}")));
        }
        if left.contains(&(expected == Verdict::Replace)) {
            return Err(told(format!("entries that are left: {left:?} after {expected:?}")));
        }
        if let Some(at) = (ADDRESSES..expected_bytes.len()).find(|at| bytes.get(*at) != expected_bytes.get(*at)) {
            return Err(told(format!("byte {at} differs: {bytes:02x?}, and should be {expected_bytes:02x?}")));
        }
        let in_kernel = without_times(in_kernel);
        if in_kernel != without_times(flow) {
            return Err(told(format!("the flow is {in_kernel:?}, and should be {flow:?}")));
        }
        Ok(())
    }
}

struct Expected {
    verdict: Verdict,
    bytes: Vec<u8>,
    flow: HandoffFlow,
}

/// What the translation here makes of the case.
fn expected(case: &Case) -> Expected {
    let (mut bytes, mut flow) = (case.bytes.clone(), case.flow);
    let find = |key: &HandoffKey| case.entries.iter().find(|(known, _)| known == key).map(|(_, entry)| *entry);
    let context = Context { now_ns: case.now_ns, segments: 0, ifindex: LOOPBACK };
    let verdict = whole::translate(&mut Bytes::new(&mut bytes), find, &mut flow, context);
    if verdict == Verdict::Replace {
        flow.closing |= proxy_abi::handoff::closing::REPLACED;
    }
    Expected { verdict, bytes, flow }
}

/// What the kernel may be told. There may be no way to the addresses of the probe.
const fn allowed(verdict: Verdict) -> &'static [u32] {
    match verdict {
        Verdict::Stack(_) | Verdict::Replace => &[STACK],
        Verdict::Drop(_) => &[TC_ACT_SHOT],
        Verdict::Send { .. } => &[TC_ACT_REDIRECT, TC_ACT_SHOT],
    }
}

/// The program takes the kernel's time.
fn without_times(mut flow: HandoffFlow) -> HandoffFlow {
    flow.closed_ns = 0;
    for end in &mut flow.ends {
        end.last_seen_ns = 0;
    }
    flow
}

/// Runs the program on a packet: its verdict, and the packet afterwards.
fn test_run(program: &SchedClassifier, packet: &[u8]) -> Result<(u32, Vec<u8>), HandoffError> {
    let mut out = vec![0; packet.len() + 256];
    let options = TestRunOptions { data_in: Some(packet), data_out: Some(&mut out), ..TestRunOptions::new() };
    let result = program.test_run(options).map_err(BpfError::from_program)?;
    let (verdict, length) = (result.return_value, result.data_size_out as usize);
    out.truncate(length);
    Ok((verdict, out))
}
