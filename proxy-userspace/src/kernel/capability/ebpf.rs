//! Which eBPF programs and maps the kernel takes from this process. The engines beyond `nft` will need them.

use aya::{
    maps::MapType,
    programs::{ProgramError, ProgramType},
    sys::{SyscallError, is_map_supported, is_program_supported},
};

/// One program or map type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Feature {
    /// As bpftool names it.
    pub name: &'static str,
    /// `Err`: could not be found out, with the reason; usually for want of CAP_BPF.
    pub supported: Result<bool, String>,
}

/// What the engines beyond `nft` use. Each is tried by loading the smallest program or making the smallest map.
pub fn features() -> Vec<Feature> {
    let programs = [
        ("program sched_cls", ProgramType::SchedClassifier),
        ("program sk_skb", ProgramType::SkSkb),
        ("program sk_lookup", ProgramType::SkLookup),
    ];
    let maps = [("map sockhash", MapType::SockHash), ("map ringbuf", MapType::RingBuf)];
    let programs = programs.into_iter().map(|(name, kind)| Feature { name, supported: program(kind) });
    let maps = maps.into_iter().map(|(name, kind)| Feature { name, supported: map(kind) });
    programs.chain(maps).collect()
}

fn program(kind: ProgramType) -> Result<bool, String> {
    is_program_supported(kind).map_err(|error| match error {
        ProgramError::SyscallError(error) => describe(&error),
        other => other.to_string(),
    })
}

fn map(kind: MapType) -> Result<bool, String> {
    is_map_supported(kind).map_err(|error| describe(&error))
}

fn describe(error: &SyscallError) -> String {
    format!("{}: {}", error.call, error.io_error)
}
