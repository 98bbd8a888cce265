//! Too much of something: descriptors run out, some clients take all they can get. The others are served.

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Lab, Shunt,
    dialog::echo,
    kernel, load,
    relay::{Relay, servers},
    scripted::Behaviour,
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn without_descriptors_the_next_are_refused_and_the_old_ones_live() -> Result<()> {
    const FILES: usize = 900;
    let lab = Lab::new()?;
    let servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::builder().descriptors(FILES).start(&lab, &Relay::routes(""))?;
    let mut held = Vec::new();
    for n in 0..FILES {
        match lab.client().connect(Relay::ENGINES[n % 2].listen()) {
            Ok(stream) => held.push(stream),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => return Err(error).with_context(|| format!("connection {n}")),
        }
    }
    let mut served = Vec::new();
    for mut stream in held {
        if echo(&mut stream, b"served").is_ok() {
            served.push(stream);
        }
    }
    let holdings = kernel::holdings(shunt.pid()?)?;
    println!("{} of {FILES} clients are served with {FILES} descriptors: {holdings:?}", served.len());
    ensure!(served.len() > 100 && served.len() < FILES / 2, "{} are served", served.len());
    ensure!(holdings.sockets + holdings.pipes + holdings.others < FILES - 50, "too near to the limit: {holdings:?}");
    served.iter_mut().try_for_each(|stream| echo(stream, b"still served"))?;
    let status = shunt.cli_json(&["status"])?;
    ensure!(status["warnings"].to_string().contains("open files"), "nobody is told: {}", status["warnings"]);
    let refused = FILES - served.len();
    let counted = shunt.metrics()?.value("shunt_terminations_total", &[("reason", "limit_connections")]);
    ensure!(counted == refused as f64, "{counted} counted of {refused}");
    ensure!(servers.iter().map(|s| s.open()).sum::<usize>() == served.len(), "the backends have others");
    served.clear();
    wait_until("there is room again", SOON, || {
        lab.client().connect(Relay::Copy.listen()).is_ok_and(|mut stream| echo(&mut stream, b"x").is_ok())
    })
}

#[test]
fn what_many_ports_take_is_not_there_for_connections() -> Result<()> {
    const CLIENTS: usize = 1600;
    let lab = Lab::new()?;
    let server = shunt_lab::scripted::TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    let route = "[[route]]\nname = \"many\"\nlisten = [\"10.88.1.1:7000-7499\"]\nengine = \"copy\"\nbackends = [\"10.88.2.2:80\"]\n";
    let shunt = Shunt::builder().descriptors(4000).start(&lab, route)?;
    let began = Instant::now();
    let (mut held, mut refused) = (Vec::new(), 0);
    for n in 0..CLIENTS {
        let to = ([10, 88, 1, 1], 7000 + (n % 500) as u16);
        match lab.client().connect(to) {
            Ok(stream) => held.push(stream),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => refused += 1,
            Err(error) => return Err(error).with_context(|| format!("connection {n}")),
        }
    }
    let mut served = Vec::new();
    for mut stream in held {
        match echo(&mut stream, b"served") {
            Ok(()) => served.push(stream),
            Err(_) => refused += 1,
        }
    }
    println!(
        "{} served, {refused} refused after {:?}: {:?}",
        served.len(),
        began.elapsed(),
        kernel::holdings(shunt.pid()?)?
    );
    ensure!(
        served.len() > 200 && began.elapsed() < Duration::from_secs(5),
        "{} after {:?}",
        served.len(),
        began.elapsed()
    );
    ensure!(server.open() == served.len(), "{} at the backend", server.open());
    shunt.wait_route("many", "nothing is counted under another reason", SOON, |r| {
        (r["connections_active"] == served.len() && r["terminations"]["connect_unreachable"].is_null()).then_some(())
    })
}

#[test]
fn more_ports_than_there_are_descriptors_for_are_refused_by_name() -> Result<()> {
    let lab = Lab::new()?;
    let _server = shunt_lab::scripted::TcpServer::start(lab.backend(1), 80, Behaviour::Echo)?;
    // So few for each that every port has sockets of its own, with or without `sk_lookup`.
    let route = |nth: u16| {
        let (first, last) = (7000 + nth * 10, 7000 + nth * 10 + 9);
        format!(
            "[[route]]\nname = \"ten-{nth}\"\nlisten = [\"10.88.1.1:{first}-{last}\"]\nengine = \"copy\"\nbackends = [\"10.88.2.2:80\"]\n"
        )
    };
    let routes = |nths: std::ops::Range<u16>| nths.map(route).collect::<String>();
    let shunt = Shunt::builder().descriptors(2000).start(&lab, &routes(0..10))?;
    // As many again, changed, moved: not more at any time.
    for nths in [0..15, 10..25, 0..20] {
        shunt.reload(&routes(nths))?;
    }
    shunt.write_config(&routes(0..300))?;
    let output = shunt.cli(&["reload"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && said.contains("\"ten-") && said.contains("ports"), "said: {said}");
    ensure!(said.contains("mend:"), "said: {said}");
    echo(&mut lab.client().connect(([10, 88, 1, 1], 7199))?, b"as before")
}

#[test]
fn those_who_send_much_leave_room_for_those_who_send_little() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let _sinks = Relay::ENGINES
        .iter()
        .map(|r| shunt_lab::scripted::TcpServer::start(lab.backend(2), r.backend_port(), Behaviour::sink()))
        .collect::<Result<Vec<_>>>()?;
    let bulk: String = Relay::ENGINES
        .iter()
        .map(|r| {
            format!(
                "[[route]]\nname = \"bulk-{e}\"\nlisten = [\"10.88.1.1:{}\"]\nengine = \"{e}\"\nbackends = [\"10.88.2.3:{}\"]\n",
                7000 + *r as u16,
                r.backend_port(),
                e = r.engine()
            )
        })
        .collect();
    let _shunt = Shunt::start(&lab, &format!("{bulk}{}", Relay::routes("")))?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for n in 0..4u16 {
            let (stop, lab) = (&stop, &lab);
            scope.spawn(move || -> Result<()> {
                let mut stream: TcpStream = lab.client().connect(([10, 88, 1, 1], 7000 + n % 2))?;
                let chunk = vec![0; 1 << 20];
                while !stop.load(Ordering::Relaxed) {
                    stream.write_all(&chunk)?;
                }
                Ok(())
            });
        }
        let pings = || -> Result<()> {
            // Enough of them to meet every worker.
            let mut quiet: Vec<TcpStream> =
                (0..16).map(|n| Ok(lab.client().connect(Relay::ENGINES[n % 2].listen())?)).collect::<Result<_>>()?;
            let mut trips = Vec::new();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(2) {
                for stream in &mut quiet {
                    let start = Instant::now();
                    echo(stream, b"ping")?;
                    trips.push(start.elapsed());
                }
            }
            trips.sort();
            // The slowest say more of how busy the machine is.
            let most = trips[trips.len() * 95 / 100];
            println!("{} round trips beside four that send all they can, 95 % of them within {most:?}", trips.len());
            ensure!(most < Duration::from_millis(300), "{most:?}");
            Ok(())
        };
        let outcome = pings();
        stop.store(true, Ordering::Relaxed);
        outcome
    })
}

#[test]
fn clients_that_open_and_say_nothing_do_not_keep_others_out() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    load::allow_descriptors(8192)?;
    let mut idle = load::idle(lab.client(), Relay::Splice.listen(), 1000)?;
    for relay in Relay::ENGINES {
        let began = Instant::now();
        for _ in 0..50 {
            echo(&mut lab.client().connect(relay.listen())?, b"hello")?;
        }
        println!("{relay:?}: 50 connections beside 1000 idle ones in {:?}", began.elapsed());
        ensure!(began.elapsed() < SOON);
    }
    ensure!(shunt.connections("splice")?.len() >= 1000, "they are listed");
    idle[999].set_read_timeout(Some(Duration::from_millis(10)))?;
    ensure!(idle[999].read(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "they live");
    Ok(())
}
