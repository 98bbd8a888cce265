//! The ways a byte takes through the daemon's own connections, each with a route of its own so that one daemon shows all.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    panic, thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use socket2::SockRef;

use crate::{
    dialog::echo,
    kernel,
    scripted::{Behaviour, TcpServer},
    shunt::Shunt,
    stream::{Accept as _, Stream},
    tls::NAME,
    topology::{GATEWAY, Lab},
    wait::{patiently, wait_for},
};

/// Far more than a connection has to carry before it is moved to splice.
const SURELY_PROMOTED: u64 = 128 << 20;
/// Far more than it takes for sockets to be joined, in small messages.
const SURELY_JOINED: u64 = 10_000;
const CHUNK: usize = 64 * 1024;

/// How the bytes of a relayed connection are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relay {
    /// A route with `engine = "copy"`.
    Copy,
    /// A route with `engine = "splice"`, its connections too short to be moved.
    Splice,
    /// The same, and the connection has carried enough to be moved: [`Self::prime`].
    Promoted,
    /// A route with `engine = "sockmap"`, and the connection's sockets are joined: [`Self::prime`].
    Joined,
    /// A route with `engine = "handoff"`, and the connection has no socket in the daemon any more: [`Self::prime`].
    Handoff,
    /// TLS with the client ends in the daemon.
    Terminated,
    /// … and begins again towards the backend.
    Again,
}

impl Relay {
    pub const ALL: [Self; 5] = [Self::Copy, Self::Splice, Self::Promoted, Self::Joined, Self::Handoff];
    /// The ways that pass through TLS.
    pub const TLS: [Self; 2] = [Self::Terminated, Self::Again];
    /// Every way, TLS or not.
    pub const WITH_TLS: [Self; 7] =
        [Self::Copy, Self::Splice, Self::Promoted, Self::Joined, Self::Handoff, Self::Terminated, Self::Again];
    /// One of each engine, and TLS.
    pub const ENGINES_AND_TLS: [Self; 6] =
        [Self::Copy, Self::Splice, Self::Joined, Self::Handoff, Self::Terminated, Self::Again];
    /// One of each engine, for what happens before a connection carries anything.
    pub const ENGINES: [Self; 4] = [Self::Copy, Self::Splice, Self::Joined, Self::Handoff];

    /// Name of its route in [`Self::routes`].
    pub fn route(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Splice => "splice",
            Self::Promoted => "promoted",
            Self::Joined => "joined",
            Self::Handoff => "handoff",
            Self::Terminated => "terminated",
            Self::Again => "again",
        }
    }

    /// `engine` of its route.
    pub fn engine(self) -> &'static str {
        match self {
            Self::Copy | Self::Terminated | Self::Again => "copy",
            Self::Splice | Self::Promoted => "splice",
            Self::Joined => "sockmap",
            Self::Handoff => "handoff",
        }
    }

    /// Where its route listens.
    pub fn listen(self) -> SocketAddr {
        SocketAddr::from((GATEWAY, 8000 + self as u16))
    }

    /// Port of its backend in [`Self::routes`]: each way has its own, so that a server's records are of one way.
    pub fn backend_port(self) -> u16 {
        9000 + self as u16
    }

    /// A `[[route]]` for each way to a port of backend 1; `rest` is what all of them have besides.
    pub fn routes(rest: &str) -> String {
        Self::routes_to(&[Ipv4Addr::new(10, 88, 2, 2)], rest)
    }

    /// As [`Self::routes`], and the ways through TLS.
    pub fn routes_with_tls(lab: &Lab, rest: &str) -> Result<String> {
        Ok(format!("{}{}", Self::routes(rest), Self::tls_routes(lab, rest)?))
    }

    /// The ways through TLS alone.
    pub fn tls_routes(lab: &Lab, rest: &str) -> Result<String> {
        let backend = [Ipv4Addr::new(10, 88, 2, 2)];
        let pki = &lab.tls()?.pki;
        let (ends, again) = (pki.terminate(&["web"], ""), pki.again(NAME));
        let terminated = Self::Terminated.route_to(&backend, &format!("{rest}\n{ends}"));
        let again = Self::Again.route_to(&backend, &format!("{rest}\n{ends}{again}"));
        Ok(format!("{terminated}{again}"))
    }

    /// … to the same port of several backends.
    pub fn routes_to(backends: &[Ipv4Addr], rest: &str) -> String {
        Self::ALL.iter().map(|relay| relay.route_to(backends, rest)).collect()
    }

    /// Whether this kernel is one on which the way is offered.
    fn is_here(self) -> bool {
        self != Self::Joined || !kernel::older_than(6, 1)
    }

    /// The one `[[route]]` of this way; nothing on kernels that it is not offered on.
    pub fn route_to(self, backends: &[Ipv4Addr], rest: &str) -> String {
        if !self.is_here() {
            return String::new();
        }
        let backends: Vec<String> = backends.iter().map(|ip| format!("{ip}:{}", self.backend_port())).collect();
        format!(
            "[[route]]\nname = {:?}\nlisten = [\"{}\"]\nengine = {:?}\nbackends = {backends:?}\n{rest}\n",
            self.route(),
            self.listen(),
            self.engine(),
        )
    }

    /// Connects a client to its route and makes the connection what this way says; the backend echoes.
    pub fn connect(self, lab: &Lab, shunt: &Shunt) -> Result<TcpStream> {
        let mut stream = lab.client().connect(self.listen())?;
        echo(&mut stream, b"hello")?;
        self.prime(shunt, &mut stream)?;
        Ok(stream)
    }

    /// Connects a client to its route, by TLS where the way has it.
    pub fn open(self, lab: &Lab) -> Result<Stream> {
        let tcp = lab.client().connect(self.listen())?;
        self.secure(lab, tcp)
    }

    /// Makes a client's connection to its route what its clients speak.
    pub fn secure(self, lab: &Lab, tcp: TcpStream) -> Result<Stream> {
        match Self::TLS.contains(&self) {
            true => Ok(crate::tls::connect(&lab.tls()?.client, NAME, tcp)?),
            false => Ok(tcp.into()),
        }
    }

    /// As [`Self::connect`], also by TLS.
    pub fn begin(self, lab: &Lab, shunt: &Shunt) -> Result<Stream> {
        let mut stream = self.open(lab)?;
        echo(&mut stream, b"hello")?;
        self.prime(shunt, &mut stream)?;
        Ok(stream)
    }

    /// The next connection of its route to `listener`, by TLS where the way has it.
    pub fn accept(self, lab: &Lab, listener: &TcpListener) -> Result<Stream> {
        let (tcp, _) = listener.accept()?;
        match self {
            Self::Again => Ok(lab.tls()?.acceptor.accept(tcp)?),
            Self::Copy | Self::Splice | Self::Promoted | Self::Joined | Self::Handoff | Self::Terminated => {
                Ok(tcp.into())
            }
        }
    }

    /// Makes sure that the connection, to an echoing backend, is moved as this way says. The bytes it echoed each way.
    pub fn prime(self, shunt: &Shunt, stream: &mut (impl Read + Write + AsFd)) -> Result<u64> {
        let (engine, chunk, most, asked_every) = match self {
            Self::Copy | Self::Splice | Self::Terminated | Self::Again => return Ok(0),
            Self::Handoff => return handed_over(shunt, stream).map(|()| 0),
            Self::Promoted => ("splice", CHUNK, SURELY_PROMOTED, 4 << 20),
            Self::Joined => ("sockmap", 100, SURELY_JOINED, 1000),
        };
        let mut echoed = 0;
        let (out, mut back) = (vec![0x5a; chunk], vec![0; chunk]);
        SockRef::from(&*stream).set_read_timeout(Some(patiently(Duration::from_secs(10))))?;
        while echoed < most {
            stream.write_all(&out).context("priming")?;
            stream.read_exact(&mut back).context("priming")?;
            ensure!(back == out, "priming: came back different after {echoed} bytes");
            echoed += chunk as u64;
            if echoed % asked_every == 0 && shunt.engine_of(stream)?.as_deref() == Some(engine) {
                return Ok(echoed);
            }
        }
        wait_for(&format!("the connection is moved to {engine}"), Duration::from_secs(3), || {
            (shunt.engine_of(stream).ok()?.as_deref() == Some(engine)).then_some(echoed)
        })
    }

    /// For a connection to a backend of any kind, before what a test is about: one that is to be handed over has been. It must be quiet
    /// meanwhile.
    pub fn settle(self, shunt: &Shunt, stream: &impl AsFd) -> Result<()> {
        if self == Self::Handoff { handed_over(shunt, stream) } else { Ok(()) }
    }

    /// Whether a connection that is what this way says goes on without the daemon.
    pub fn outlives_the_daemon(self) -> bool {
        self == Self::Handoff
    }
}

/// Waits until the connection of the client's `stream` has no socket in the daemon any more. It must be quiet meanwhile.
pub fn handed_over(shunt: &Shunt, stream: &impl AsFd) -> Result<()> {
    wait_for("the connection is handed over", Duration::from_secs(10), || {
        (shunt.engine_of(stream).ok()?.as_deref() == Some("handoff")).then_some(())
    })
    .map_err(|error| {
        let why = shunt.metrics().map(|metrics| metrics.samples("shunt_handovers_total"));
        error.context(format!("{why:?}; {:?}", shunt.connection_of(stream)))
    })
}

/// A server on backend 1 for each way, in the order of [`Relay::ALL`].
pub fn servers(lab: &Lab, behaviour: &Behaviour) -> Result<Vec<TcpServer>> {
    Relay::ALL.iter().map(|r| TcpServer::start(lab.backend(1), r.backend_port(), behaviour.clone())).collect()
}

/// … and of [`Relay::WITH_TLS`].
pub fn servers_with_tls(lab: &Lab, behaviour: &Behaviour) -> Result<Vec<TcpServer>> {
    let mut all = servers(lab, behaviour)?;
    all.push(TcpServer::start(lab.backend(1), Relay::Terminated.backend_port(), behaviour.clone())?);
    let acceptor = lab.tls()?.acceptor.clone();
    all.push(TcpServer::start_tls(lab.backend(1), Relay::Again.backend_port(), behaviour.clone(), acceptor)?);
    Ok(all)
}

/// Does `work` for each of `relays` at the same time, but those that are not offered on this kernel; every failure is told, not only the
/// first.
pub fn on_each(relays: &[Relay], work: impl Fn(Relay) -> Result<()> + Sync) -> Result<()> {
    let work = &work;
    let outcomes: Vec<(Relay, Result<()>)> = thread::scope(|scope| {
        let threads: Vec<_> =
            relays.iter().filter(|r| r.is_here()).map(|&relay| (relay, scope.spawn(move || work(relay)))).collect();
        let join = |(relay, thread): (Relay, thread::ScopedJoinHandle<'_, Result<()>>)| match thread.join() {
            Ok(outcome) => (relay, outcome),
            Err(panic) => panic::resume_unwind(panic),
        };
        threads.into_iter().map(join).collect()
    });
    let failures: Vec<String> =
        outcomes.into_iter().filter_map(|(relay, outcome)| Some(format!("{relay:?}: {:#}", outcome.err()?))).collect();
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(())
}

/// As [`on_each`] of [`Relay::ALL`].
pub fn on_every_relay(work: impl Fn(Relay) -> Result<()> + Sync) -> Result<()> {
    on_each(&Relay::ALL, work)
}
