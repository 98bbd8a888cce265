//! The lab with servers, daemon and traffic.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use shunt_lab::{GATEWAY, Lab, Running, Shunt, load, scripted::UdpServer, shunt_binary};

use super::traffic::Traffic;
use crate::ui;

pub const WEB: u16 = 8080;
const BULK: u16 = 5201;
const ECHO: u16 = 5300;

/// Order of the fields is the order of the end: first who asks, then who forwards, then who answers, then the lab.
#[derive(Debug)]
pub struct Stage {
    pub traffic: Traffic,
    /// iperf3 as a client, without end.
    pub bulk: Running,
    pub shunt: Shunt,
    /// nginx of backend 1 and of backend 2.
    pub web: [Running; 2],
    _servers: (Running, [UdpServer; 2]),
    pub lab: Lab,
    /// The configuration as it was at the start.
    pub config: String,
}

impl Stage {
    pub fn set(config: &Path) -> Result<Self> {
        load::allow_descriptors(4096)?;
        let config = fs::read_to_string(config).with_context(|| format!("read {}", config.display()))?;
        ui::step("lab: client – gateway – two backends, each a network namespace");
        let lab = Lab::new()?;
        ui::step("servers: nginx and a UDP echo on both backends, iperf3 on backend1");
        let web = [web(&lab, 1)?, web(&lab, 2)?];
        let bulk_server = lab.iperf3(lab.backend(1), BULK)?;
        let echo = [UdpServer::start(lab.backend(1), ECHO, "one")?, UdpServer::start(lab.backend(2), ECHO, "two")?];
        ui::step("daemon: shunt run, on the gateway");
        let shunt = Shunt::start(&lab, &config)?;
        ui::step("traffic: 200 new connections/s, one that stays, UDP, and iperf3 at 200 Mbit/s");
        let traffic = Traffic::start(lab.client(), (GATEWAY, WEB).into(), (GATEWAY, ECHO).into())?;
        let mut command = lab.client().command("iperf3");
        command.args(["-c", &GATEWAY.to_string(), "-p", &BULK.to_string(), "-t", "0", "-b", "200M", "--forceflush"]);
        let bulk = Running::start("iperf3-client", command, lab.dir())?;
        Ok(Self { traffic, bulk, shunt, web, _servers: (bulk_server, echo), lab, config })
    }

    /// Starts nginx of backend `number` again.
    pub fn revive(&mut self, number: usize) -> Result<()> {
        self.web[number - 1] = web(&self.lab, number)?;
        Ok(())
    }

    pub fn daemon_lives(&mut self) -> bool {
        self.shunt.process().is_ok_and(|process| process.ended().is_none())
    }

    pub fn print_map(&self) {
        ui::note(&format!("client   {:<28} 10.88.1.2", self.lab.client().name()));
        ui::note(&format!("gateway  {:<28} 10.88.1.1, 10.88.2.1", self.lab.gateway().name()));
        ui::note(&format!("backends {:<28} 10.88.2.2, …3", self.lab.backend(1).name()));
        ui::note(&format!("config   {}", self.shunt.config_file().display()));
    }

    pub fn print_hints(&self) {
        let shunt = shunt_binary().map_or_else(|_| "shunt".to_owned(), |path| path.display().to_string());
        let socket = self.shunt.socket().display();
        let (client, gateway) = (self.lab.client().name(), self.lab.gateway().name());
        println!("In a second terminal, as root:");
        println!("  shunt() {{ {shunt} \"$@\" --socket {socket}; }}");
        println!("  shunt routes; shunt connections --route bulk; shunt explain web    # what runs where, and why");
        println!("  shunt top                                                       # live");
        println!("  shunt backend web 10.88.2.2:80 drain                            # and ready, to undo");
        println!("  ip netns exec {client} curl http://{GATEWAY}:{WEB}/who");
        println!("  ip netns exec {gateway} nft list table inet shunt");
        println!("  ip netns exec {gateway} curl -s http://127.0.0.1:9900/metrics");
        println!("  $EDITOR {}; shunt reload", self.shunt.config_file().display());
        if let Ok(pid) = self.shunt.pid() {
            println!("  kill -9 {pid}                                                   # it comes back after 3 s");
        }
        println!();
    }
}

fn web(lab: &Lab, number: usize) -> Result<Running> {
    let who = format!("backend{number}\n").into_bytes();
    lab.nginx(lab.backend(number), 80, &[("who", who), ("index.html", b"hello\n".to_vec())])
}
