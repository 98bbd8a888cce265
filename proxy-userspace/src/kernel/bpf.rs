//! eBPF: the object that is part of this binary, and the probe that shows whether this kernel runs it rightly.

mod error;
pub mod handoff;
mod packet;

use std::{collections::HashMap, fmt, time::Duration};

use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions, include_bytes_aligned,
    maps::{Array, Map, MapError, PerCpuArray, PerCpuHashMap},
    programs::SchedClassifier,
};
use proxy_abi::{
    ABI_VERSION,
    flow::{FlowCounters, FlowKey},
    outcome,
};

pub use error::BpfError;
use packet::{Expected, SyntheticPacket};

/// The programs, compiled by `cargo xtask ebpf build` (docs/ebpf.md).
static OBJECT: &[u8] =
    include_bytes_aligned!(concat!(env!("CARGO_MANIFEST_DIR"), "/../proxy-ebpf/objects/probe.bpf.o"));

const PROGRAM: &str = "shunt_probe";

/// `TC_ACT_UNSPEC` (`linux/pkt_cls.h`), -1: the program leaves the packet to whatever comes next.
const LEAVE_TO_THE_NEXT: u32 = u32::MAX;

/// What a successful probe saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReport {
    /// Version of the map layouts, as the program stated it from inside the kernel.
    pub abi_version: u32,
    /// Packets that the program was run on; each was counted as it should be.
    pub packets: usize,
    /// Bytes of machine code; 0 where the kernel interprets programs (`net.core.bpf_jit_enable = 0`).
    pub jitted_bytes: u32,
    /// Instructions that the verifier walked (v5.16+).
    pub verified_instructions: Option<u32>,
    /// Time of one run, the mean over the packets. Cold: an upper bound, not a benchmark.
    pub run_time: Duration,
}

impl ProbeReport {
    /// Programs run as machine code.
    pub const fn jitted(&self) -> bool {
        self.jitted_bytes > 0
    }
}

impl fmt::Display for ProbeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loaded (map layout {}) and counted {} packets rightly; ", self.abi_version, self.packets)?;
        match self.jitted_bytes {
            0 => f.write_str("interpreted: net.core.bpf_jit_enable is off"),
            bytes => write!(f, "compiled to {bytes} bytes of machine code"),
        }
    }
}

/// Loads the embedded object, runs its program on synthetic packets through `BPF_PROG_TEST_RUN` (v4.12+), and compares every
/// counter with what it should be. Nothing is attached or pinned: all of it is gone when this returns.
///
/// # Errors
/// [`BpfError::NotPermitted`] without `CAP_BPF` and `CAP_NET_ADMIN`; the other variants say which step failed.
pub fn self_probe() -> Result<ProbeReport, BpfError> {
    let mut object = EbpfLoader::new().load(OBJECT).map_err(BpfError::from_load)?;
    let program = load_program(&mut object)?;
    let packets = packet::all();
    let mut run_time = Duration::ZERO;
    for packet in &packets {
        run_time += run(program, packet)?;
    }
    let info = program.info().map_err(BpfError::from_program)?;
    // Before the other maps: with another layout, their bytes mean something else.
    let abi_version = check_abi(&object)?;
    check_outcomes(&object, &packets)?;
    check_flows(&object, &packets)?;
    Ok(ProbeReport {
        abi_version,
        packets: packets.len(),
        jitted_bytes: info.size_jitted(),
        verified_instructions: info.verified_instruction_count(),
        run_time: run_time / u32::try_from(packets.len()).unwrap_or(u32::MAX),
    })
}

/// Gives the program to the verifier. Its maps are there already: they are made with the object.
fn load_program(object: &mut Ebpf) -> Result<&SchedClassifier, BpfError> {
    let program = object.program_mut(PROGRAM).ok_or(BpfError::Missing { what: PROGRAM })?;
    let program: &mut SchedClassifier = program.try_into().map_err(BpfError::from_program)?;
    program.load().map_err(BpfError::from_program)?;
    Ok(program)
}

/// Runs the program once on one packet; returns how long that took.
fn run(program: &SchedClassifier, packet: &SyntheticPacket) -> Result<Duration, BpfError> {
    let options = TestRunOptions { data_in: Some(&packet.bytes), ..TestRunOptions::new() };
    let result = program.test_run(options).map_err(BpfError::from_program)?;
    if result.return_value == LEAVE_TO_THE_NEXT {
        Ok(result.duration)
    } else {
        Err(BpfError::Verdict { packet: packet.name, verdict: result.return_value })
    }
}

fn check_abi(object: &Ebpf) -> Result<u32, BpfError> {
    let abi: Array<_, u32> = map(object, "ABI")?;
    match abi.get(&0, 0).map_err(|source| BpfError::Map { map: "ABI", source })? {
        ABI_VERSION => Ok(ABI_VERSION),
        object => Err(BpfError::AbiVersion { object }),
    }
}

fn check_outcomes(object: &Ebpf, packets: &[SyntheticPacket]) -> Result<(), BpfError> {
    let counters: PerCpuArray<_, u64> = map(object, "OUTCOMES")?;
    for index in 0..outcome::COUNT {
        let per_cpu = counters.get(&index, 0).map_err(|source| BpfError::Map { map: "OUTCOMES", source })?;
        let counted: u64 = per_cpu.iter().sum();
        let sent = packets.iter().filter(|packet| packet.expected.outcome() == index).count() as u64;
        if counted != sent {
            let outcome = outcome::name(index).unwrap_or("unknown");
            return Err(BpfError::Miscounted { outcome, sent, counted });
        }
    }
    Ok(())
}

fn check_flows(object: &Ebpf, packets: &[SyntheticPacket]) -> Result<(), BpfError> {
    let failed = |source| BpfError::Map { map: "FLOWS", source };
    let map: PerCpuHashMap<_, FlowKey, FlowCounters> = map(object, "FLOWS")?;
    let mut counted = HashMap::new();
    for entry in map.iter() {
        let (key, per_cpu) = entry.map_err(failed)?;
        let sum = per_cpu.iter().fold(FlowCounters::default(), |sum, cpu| sum.merge(*cpu));
        counted.insert(key, sum);
    }
    let mut sent: HashMap<FlowKey, FlowCounters> = HashMap::new();
    for packet in packets {
        if let Expected::Counted { key, direction, payload_bytes } = packet.expected {
            sent.entry(key).or_default().add(direction, payload_bytes);
        }
    }
    for (key, sent) in &sent {
        let counted = counted.remove(key);
        if counted != Some(*sent) {
            return Err(BpfError::FlowCounters { key: Box::new(*key), sent: *sent, counted });
        }
    }
    match counted.into_keys().next() {
        None => Ok(()),
        Some(key) => Err(BpfError::UnknownFlow { key: Box::new(key) }),
    }
}

/// The map of that name, as the type that the daemon knows it by.
fn map<'a, T>(object: &'a Ebpf, name: &'static str) -> Result<T, BpfError>
where
    T: TryFrom<&'a Map, Error = MapError>,
{
    let map = object.map(name).ok_or(BpfError::Missing { what: name })?;
    T::try_from(map).map_err(|source| BpfError::Map { map: name, source })
}

#[cfg(test)]
mod tests;
