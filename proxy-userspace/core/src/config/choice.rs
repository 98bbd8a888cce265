//! The words of the file that stand for one of a closed set.

use super::types::{
    AccessLog, Balance, Engine, EngineChoice, HealthCheck, Keepalive, LogFormat, Protocol, ProxyVersion, SourceAddress,
    TlsMode, TlsVersion,
};

/// A closed set of words: `NAMES[i]` in the file is `VALUES[i]`.
pub(super) trait Choice: Copy + 'static {
    const NAMES: &'static [&'static str];
    const VALUES: &'static [Self];

    fn from_name(name: &str) -> Option<Self> {
        let index = Self::NAMES.iter().position(|known| *known == name)?;
        Self::VALUES.get(index).copied()
    }
}

macro_rules! choices {
    ($($type:ty { $($name:literal => $value:expr),+ $(,)? })+) => {$(
        impl Choice for $type {
            const NAMES: &'static [&'static str] = &[$($name),+];
            const VALUES: &'static [Self] = &[$($value),+];
        }
    )+};
}

choices! {
    LogFormat { "text" => LogFormat::Text, "json" => LogFormat::Json }
    AccessLog { "all" => AccessLog::All, "errors" => AccessLog::Errors, "off" => AccessLog::Off }
    Protocol { "tcp" => Protocol::Tcp, "udp" => Protocol::Udp }
    Balance {
        "round-robin" => Balance::RoundRobin,
        "random" => Balance::Random,
        "source-hash" => Balance::SourceHash,
        "maglev" => Balance::Maglev,
        "least-connections" => Balance::LeastConnections,
    }
    EngineChoice {
        "auto" => EngineChoice::Auto,
        "nft" => EngineChoice::Forced(Engine::Nft),
        "handoff" => EngineChoice::Forced(Engine::Handoff),
        "sockmap" => EngineChoice::Forced(Engine::Sockmap),
        "splice" => EngineChoice::Forced(Engine::Splice),
        "copy" => EngineChoice::Forced(Engine::Copy),
    }
    SourceAddress { "gateway" => SourceAddress::Gateway, "client" => SourceAddress::Client }
    Keepalive {
        "standard" => Keepalive::Standard,
        "extended" => Keepalive::Extended,
        "immortal" => Keepalive::Immortal,
    }
    HealthCheck { "tcp" => HealthCheck::Tcp, "tls" => HealthCheck::Tls, "http" => HealthCheck::Http }
    TlsMode { "passthrough" => TlsMode::Passthrough, "terminate" => TlsMode::Terminate }
    TlsVersion { "1.2" => TlsVersion::Tls12, "1.3" => TlsVersion::Tls13 }
    ProxyVersion { "v1" => ProxyVersion::V1, "v2" => ProxyVersion::V2 }
}
