//! What answers on backend 1. The peers' configurations in `xtask/bench/peers` name the same ports.

use std::ops::Range;

use anyhow::Result;
use shunt_lab::{
    Lab, Running,
    scripted::{Behaviour, TcpServer},
};

pub const HTTP: u16 = 80;
pub const BULK: u16 = 5201;
pub const ECHO: u16 = 7000;
pub const HOLD: u16 = 7002;
/// Several, because masquerading has 64,512 ports towards each of them.
pub const SHORT: Range<u16> = 7010..7018;

/// Running services.
#[derive(Debug)]
pub struct Services {
    _http: Running,
    _bulk: Running,
    _echo: TcpServer,
    pub hold: TcpServer,
    _short: Vec<TcpServer>,
}

impl Services {
    pub fn start(lab: &Lab) -> Result<Self> {
        let host = lab.backend(1);
        // The server closes short connections first; its TIME_WAIT sockets would fill its table and then meet the
        // same masqueraded ports again, on every path alike and to nobody's enlightenment.
        host.set_sysctl("net.ipv4.tcp_max_tw_buckets", "0")?;
        for side in [lab.client(), lab.gateway()] {
            side.set_sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
        }
        Ok(Self {
            _http: lab.nginx(host, HTTP, &[("1k", vec![b'x'; 1024])])?,
            _bulk: lab.iperf3(host, BULK)?,
            _echo: TcpServer::start(host, ECHO, Behaviour::Echo)?,
            hold: TcpServer::start(host, HOLD, Behaviour::Hold)?,
            _short: SHORT
                .map(|port| TcpServer::start(host, port, Behaviour::Reply(b"!".to_vec())))
                .collect::<Result<_>>()?,
        })
    }
}
