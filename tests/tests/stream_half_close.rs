//! One direction of a connection is closed and the other goes on (B2, B3).

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use shunt_lab::{
    Lab, Shunt, Stream,
    dialog::{End, end_of, read_some, read_to_end},
    patiently, pattern,
    relay::{Relay, handed_over, on_each, on_every_relay, servers, servers_with_tls},
    scripted::{Behaviour, Start},
    wait_until, web,
};

const SOON: Duration = Duration::from_secs(5);
/// What a client calls at once, on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);

#[test]
fn each_direction_flows_to_its_end_after_the_other_has_closed() -> Result<()> {
    const BYTES: u64 = 24 << 20;
    for start in [Start::AfterClientFinished, Start::AtOnce] {
        let lab = Lab::new()?;
        let servers = servers_with_tls(&lab, &Behaviour::Exchange { seed: 7, bytes: BYTES, start })?;
        let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
        on_each(&Relay::WITH_TLS, |relay| {
            let bytes = if relay == Relay::Splice { 1000 } else { BYTES };
            let mut stream = relay.open(&lab)?;
            stream.set_read_timeout(Some(patiently(SOON)))?;
            if start == Start::AfterClientFinished {
                relay.settle(&shunt, &stream)?;
            }
            let (received, sent) = if start == Start::AfterClientFinished {
                let sent = pattern::send(&mut stream, 3, bytes)?;
                stream.shutdown(Shutdown::Write)?;
                (pattern::receive(&mut stream).context("backend → client")?, sent)
            } else {
                // The backend has finished before the client begins.
                let received = pattern::receive(&mut stream).context("backend → client")?;
                let sent = pattern::send(&mut stream, 3, bytes)?;
                stream.shutdown(Shutdown::Write)?;
                (received, sent)
            };
            let record = servers[relay as usize].wait_records(1, SOON)?.remove(0);
            ensure!(record.received == sent, "client → backend: {:?} of {sent:?}", record.received);
            ensure!(received == pattern::send(&mut std::io::sink(), 7, BYTES)?, "backend → client: {received:?}");
            let reason = match start {
                Start::AfterClientFinished => "finished_client_first",
                Start::AtOnce | Start::AfterSayingBack(_) => "finished_backend_first",
            };
            shunt.wait_ended(relay.route(), &[(reason, 1)], SOON)?;
            let route = shunt.route(relay.route())?;
            ensure!(route["bytes_in"] == bytes && route["bytes_out"] == BYTES, "counted: {route}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_fin_goes_on_at_once_and_the_other_direction_stays_open() -> Result<()> {
    let lab = Lab::new()?;
    let listeners: Vec<_> = Relay::WITH_TLS
        .iter()
        .map(|r| lab.backend(1).listen(SocketAddr::from(([0, 0, 0, 0], r.backend_port()))))
        .collect::<Result<_, _>>()?;
    let shunt = Shunt::start(&lab, &Relay::routes_with_tls(&lab, "")?)?;
    on_each(&Relay::WITH_TLS, |relay| {
        for client_first in [true, false] {
            let mut client = relay.open(&lab)?;
            let mut backend = relay.accept(&lab, &listeners[relay as usize])?;
            match relay {
                Relay::Copy | Relay::Splice | Relay::Terminated | Relay::Again => {}
                Relay::Handoff => handed_over(&shunt, &client)?,
                Relay::Promoted => promote(&shunt, &mut client, &mut backend)?,
                Relay::Joined => join(&shunt, &mut client, &mut backend)?,
            }
            let (first, second) = if client_first { (&mut client, &mut backend) } else { (&mut backend, &mut client) };
            first.write_all(b"last words")?;
            first.shutdown(Shutdown::Write)?;
            let (words, end) = read_to_end(second, AT_ONCE)?;
            ensure!(words == b"last words" && end == End::Finished, "{words:?}, {end:?}");
            let half_closed = |c: &Value| c["state"] == "half_closed";
            wait_until("it is seen as half-closed", SOON, || {
                shunt
                    .connection_of(if client_first { first } else { second })
                    .is_ok_and(|c| c.is_some_and(|c| half_closed(&c)))
            })
            .or_else(|error| {
                let list = shunt.connections(relay.route())?;
                Err(error.context(format!("{list:?}")))
            })?;
            // The other way works as before, for as long as it takes.
            for n in 0..3 {
                second.write_all(format!("answer {n}").as_bytes())?;
                ensure!(read_some(first, 8)? == format!("answer {n}").as_bytes());
            }
            second.shutdown(Shutdown::Write)?;
            ensure!(end_of(first, AT_ONCE)? == End::Finished);
        }
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1), ("finished_backend_first", 1)], SOON)
    })
}

/// Says little things until the sockets are joined.
fn join(shunt: &Shunt, client: &mut Stream, backend: &mut Stream) -> Result<()> {
    for _ in 0..200 {
        client.write_all(b"?")?;
        ensure!(read_some(backend, 1)? == b"?");
        backend.write_all(b"!")?;
        ensure!(read_some(client, 1)? == b"!");
        if shunt.engine_of(client)?.as_deref() == Some("sockmap") {
            return Ok(());
        }
    }
    anyhow::bail!("200 questions and answers were not enough to be joined")
}

/// Moves bytes towards the backend until the connection is spliced.
fn promote(shunt: &Shunt, client: &mut Stream, backend: &mut Stream) -> Result<()> {
    let (chunk, mut sink) = (vec![1; 1 << 20], vec![0; 1 << 20]);
    for _ in 0..64 {
        thread::scope(|scope| -> Result<()> {
            let sender = scope.spawn(|| client.write_all(&chunk));
            backend.read_exact(&mut sink)?;
            Ok(sender.join().expect("sender")?)
        })?;
        if shunt.engine_of(client)?.as_deref() == Some("splice") {
            return Ok(());
        }
    }
    anyhow::bail!("64 MiB were not enough to be moved to splice")
}

/// Urgent data (`MSG_OOB`, RFC 9293 §3.8.5) stops a read at its mark, and splice altogether.
#[test]
fn urgent_data_holds_nothing_up() -> Result<()> {
    let lab = Lab::new()?;
    let _servers = servers(&lab, &Behaviour::Echo)?;
    let shunt = Shunt::start(&lab, &Relay::routes(""))?;
    on_every_relay(|relay| {
        let mut stream = relay.connect(&lab, &shunt)?;
        stream.set_nodelay(true)?;
        for round in 0..3 {
            stream.write_all(b"before")?;
            socket2::SockRef::from(&stream).send_out_of_band(b"!")?;
            stream.write_all(b"after")?;
            let got = read_some(&mut stream, 12).with_context(|| format!("round {round}"))?;
            // The urgent byte is one of the stream (RFC 6093 §4).
            ensure!(got == b"before!after", "round {round}: {:?}", String::from_utf8_lossy(&got));
        }
        socket2::SockRef::from(&stream).send_out_of_band(b"!")?;
        stream.write_all(b"and all the rest")?;
        stream.shutdown(Shutdown::Write)?;
        let (rest, end) = read_to_end(&mut stream, AT_ONCE)?;
        ensure!(rest == b"!and all the rest" && end == End::Finished, "{:?}", String::from_utf8_lossy(&rest));
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)
    })
}

/// Of the servers at hand the one that does not mind a client that has finished: nginx takes it for one that has gone.
const HTTP_SERVER: &str = r#"
import functools, http.server, ssl
class Serve(http.server.SimpleHTTPRequestHandler):
    def finish(self):
        super().finish()
        if pair:
            self.connection.unwrap()
pair = "PAIR"
server = http.server.ThreadingHTTPServer(("0.0.0.0", PORT), functools.partial(Serve, directory="www"))
if pair:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair + ".pem", pair + ".key")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
server.serve_forever()
"#;

#[test]
fn an_http_response_streams_on_after_the_request_side_has_closed() -> Result<()> {
    const BYTES: usize = 24 << 20;
    let lab = Lab::new()?;
    let mut page = vec![0; BYTES];
    pattern::Pattern::new(4).fill(&mut page);
    std::fs::create_dir(lab.dir().join("www"))?;
    std::fs::write(lab.dir().join("www/page"), &page)?;
    let pair = lab.tls()?.pki.file("web");
    let server = |relay: &Relay| {
        let port = relay.backend_port();
        let pair = if *relay == Relay::Again { pair.as_str() } else { "" };
        lab.python(lab.backend(1), "http", &HTTP_SERVER.replace("PORT", &port.to_string()).replace("PAIR", pair), port)
    };
    let _servers = Relay::WITH_TLS.iter().map(server).collect::<Result<Vec<_>>>()?;
    let forwarded = web("")
        .replace(":80\"]\nb", ":80\"]\nengine = \"nft\"\nb")
        .replace("2.2:80", &format!("2.2:{}", Relay::Copy.backend_port()));
    let shunt = Shunt::start(&lab, &(Relay::routes_with_tls(&lab, "")? + &forwarded))?;
    let download = |mut stream: Stream| -> Result<()> {
        stream.write_all(b"GET /page HTTP/1.0\r\nHost: x\r\n\r\n")?;
        stream.shutdown(Shutdown::Write)?;
        let (answer, end) = read_to_end(&mut stream, Duration::from_secs(30))?;
        let body = answer.windows(4).position(|w| w == b"\r\n\r\n").context("no end of headers")? + 4;
        ensure!(end == End::Finished && answer[body..] == page, "{} bytes, {end:?}", answer.len());
        Ok(())
    };
    on_each(&Relay::WITH_TLS, |relay| {
        let stream = relay.open(&lab)?;
        relay.settle(&shunt, &stream)?;
        download(stream)?;
        shunt.wait_ended(relay.route(), &[("finished_client_first", 1)], SOON)
    })?;
    download(lab.client().connect(([10, 88, 1, 1], 80))?.into()).context("forwarded")?;
    shunt
        .wait_route("web", "its end", SOON, |route| (route["terminations"]["finished_client_first"] == 1).then_some(()))
}
