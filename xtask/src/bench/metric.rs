//! What is measured, and what the numbers are.

use clap::ValueEnum;
use serde::Serialize;

/// Measurements that are taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Group {
    /// iperf3: 1 stream, 8 streams, reverse; CPU per gigabyte
    Bulk,
    /// New connections per second, each with one request and one answer
    Connections,
    /// HTTP keep-alive requests per second over 64 connections
    Requests,
    /// One connection, one byte string there and back
    PingPong,
    /// Memory of the proxy, and per idle connection
    Memory,
}

impl Group {
    pub const ALL: [Self; 5] = [Self::Bulk, Self::Connections, Self::Requests, Self::PingPong, Self::Memory];

    pub fn title(self) -> &'static str {
        match self {
            Self::Bulk => "bulk",
            Self::Connections => "new connections",
            Self::Requests => "keep-alive requests",
            Self::PingPong => "ping-pong",
            Self::Memory => "memory",
        }
    }
}

/// One row of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    Bulk1,
    Bulk8,
    BulkReverse,
    CpuPerGb,
    OwnCpuPerGb,
    NewConnections,
    NewConnectionsP99,
    OwnCpuNewConnections,
    CpuNewConnection,
    Requests,
    RequestsP50,
    RequestsP99,
    CpuRequests,
    OwnCpuRequests,
    PingPong,
    CpuPingPong,
    OwnCpuPingPong,
    Resident,
    UserPerConnection,
    KernelPerConnection,
}

impl Metric {
    pub fn title(self) -> &'static str {
        match self {
            Self::Bulk1 => "bulk, 1 stream",
            Self::Bulk8 => "bulk, 8 streams",
            Self::BulkReverse => "bulk, 1 stream, reverse",
            Self::CpuPerGb => "CPU per GB, all on this machine",
            Self::OwnCpuPerGb => "CPU per GB, the process itself",
            Self::NewConnections => "new connections",
            Self::NewConnectionsP99 => "new connection p99",
            Self::OwnCpuNewConnections => "new connections: the process itself",
            Self::CpuNewConnection => "CPU per new connection, both ends and the gateway",
            Self::Requests => "keep-alive requests, 64 conns",
            Self::RequestsP50 => "keep-alive request p50",
            Self::RequestsP99 => "keep-alive request p99",
            Self::CpuRequests => "CPU per 100,000 requests, all on this machine",
            Self::OwnCpuRequests => "CPU per 100,000 requests, the process itself",
            Self::PingPong => "ping-pong p50",
            Self::CpuPingPong => "CPU per 100,000 ping-pongs, all on this machine",
            Self::OwnCpuPingPong => "CPU per 100,000 ping-pongs, the process itself",
            Self::Resident => "memory of the process",
            Self::UserPerConnection => "per idle connection, process",
            Self::KernelPerConnection => "per idle connection, kernel, over plain",
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::Bulk1 | Self::Bulk8 | Self::BulkReverse => "Gbit/s",
            Self::CpuPerGb | Self::OwnCpuPerGb => "s",
            Self::CpuRequests | Self::OwnCpuRequests | Self::CpuPingPong | Self::OwnCpuPingPong => "s",
            Self::NewConnections | Self::Requests => "/s",
            Self::NewConnectionsP99
            | Self::CpuNewConnection
            | Self::RequestsP50
            | Self::RequestsP99
            | Self::PingPong => "µs",
            Self::OwnCpuNewConnections => "% of a core",
            Self::Resident => "MB",
            Self::UserPerConnection | Self::KernelPerConnection => "B",
        }
    }

    pub fn more_is_better(self) -> bool {
        matches!(self, Self::Bulk1 | Self::Bulk8 | Self::BulkReverse | Self::NewConnections | Self::Requests)
    }

    /// Whether it is about the forwarding process, which the kernel paths do not have.
    pub fn is_of_the_process(self) -> bool {
        matches!(
            self,
            Self::OwnCpuPerGb
                | Self::OwnCpuNewConnections
                | Self::OwnCpuRequests
                | Self::OwnCpuPingPong
                | Self::Resident
                | Self::UserPerConnection
        )
    }

    /// Whether a ratio between paths says anything.
    pub fn has_ratio(self) -> bool {
        !self.is_of_the_process() && self != Self::KernelPerConnection
    }
}
