//! What tcpdump sees on a link, and what TCP connections it was.

mod connection;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

pub use self::connection::{Connection, Direction, Seen};
use crate::{
    frame::Segment,
    host::Host,
    process::{Running, run},
};

const SOON: Duration = Duration::from_secs(10);
/// Of a file in this machine's byte order, with microseconds (pcap-savefile(5)).
const MAGIC: u32 = 0xa1b2_c3d4;
const FILE_HEADER: usize = 24;
const PACKET_HEADER: usize = 16;

/// A tcpdump on `eth0` of a host, whole packets. It ends when it is dropped.
#[derive(Debug)]
pub struct Capture {
    tcpdump: Running,
    file: PathBuf,
}

/// A packet, and when it passed: microseconds since 1970.
#[derive(Debug)]
pub struct Packet {
    pub at: u64,
    pub frame: Vec<u8>,
}

impl Capture {
    /// Sees every TCP packet from its return on.
    pub fn start(host: &Host, name: &str, dir: &Path) -> Result<Self> {
        let file = dir.join(format!("{name}.pcap"));
        let mut command = host.command("tcpdump");
        // Each packet at once, into a file that is written by this user. Every place of the ring is as large as the largest packet may be:
        // with that of a link without offloads there is room for what comes while tcpdump waits for its turn.
        command.args(["-i", "eth0", "-U", "--immediate-mode", "-s", "2048", "-B", "65536", "-Z", "root", "-w"]);
        let mut tcpdump = Running::start(
            &format!("tcpdump-{name}"),
            {
                command.arg(&file).arg("tcp");
                command
            },
            dir,
        )?;
        let log = tcpdump.log_path().to_owned();
        tcpdump.wait_ready(SOON, || fs::read_to_string(&log).is_ok_and(|log| log.contains("listening on")))?;
        Ok(Self { tcpdump, file })
    }

    /// What it has seen so far, as it passed.
    pub fn packets(&self) -> Result<Vec<Packet>> {
        let bytes = fs::read(&self.file).with_context(|| format!("read {}", self.file.display()))?;
        let word = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        ensure!(word(0) == Some(MAGIC), "not a file of tcpdump's: {:?}", word(0));
        let (mut packets, mut at) = (Vec::new(), FILE_HEADER);
        while let (Some(seconds), Some(micros), Some(length)) = (word(at), word(at + 4), word(at + 8)) {
            let begin = at + PACKET_HEADER;
            // The last one is being written.
            let Some(frame) = bytes.get(begin..begin + length as usize) else { break };
            packets.push(Packet { at: u64::from(seconds) * 1_000_000 + u64::from(micros), frame: frame.to_vec() });
            at = begin + length as usize;
        }
        Ok(packets)
    }

    /// The connections to `port`, in the order of their first packets.
    pub fn connections(&self, port: u16) -> Result<Vec<Connection>> {
        let packets = self.packets()?;
        let segments = packets.iter().filter_map(|packet| Some((packet.at, Segment::of(&packet.frame)?)));
        Ok(connection::all(segments, port))
    }

    /// Ends it; the packets with a wrong checksum as it tells them, at most ten.
    ///
    /// # Errors
    /// Also when it has missed any.
    pub fn stop(mut self) -> Result<Vec<String>> {
        self.tcpdump.terminate(SOON)?;
        let log = self.tcpdump.log();
        ensure!(log.contains("\n0 packets dropped by kernel"), "tcpdump has missed packets: {log}");
        let told = run(Command::new("tcpdump").args(["-nn", "-vv", "-r"]).arg(&self.file))?;
        let wrong = told.lines().filter(|line| line.contains("incorrect") || line.contains("bad cksum"));
        Ok(wrong.take(10).map(str::to_owned).collect())
    }
}
