//! Programs as people use them, through a route of each engine: connections that are quiet for long and then needed at once (B1).

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use shunt_lab::{
    Host, Lab, Shunt, Talk,
    relay::{Relay, on_each},
    tls::NAME,
    wait_until,
};

const SOON: Duration = Duration::from_secs(10);
/// Characters of which Python has to mask, turn round and check each one.
const MANY: usize = 3 << 20;
/// For more than these, in a dozen programs on two processors that others use.
const MUCH: Duration = Duration::from_secs(60);
/// Longer than the idle time that a connection has between two messages.
const QUIET: Duration = Duration::from_millis(1500);

/// One route of each engine from the gateway's port to `port` of backend 1.
fn routes(port: u16, rest: &str) -> String {
    let route = |relay: Relay| {
        format!(
            "[[route]]\nname = \"{}\"\nlisten = [\"{}\"]\nengine = \"{}\"\nbackends = [\"10.88.2.2:{port}\"]\n{rest}\n",
            relay.route(),
            relay.listen(),
            relay.engine()
        )
    };
    Relay::ENGINES.map(route).concat()
}

/// … and one of each way through TLS; the backend of [`Relay::Again`] listens one port further.
fn routes_with_tls(lab: &Lab, port: u16, rest: &str) -> Result<String> {
    let pki = &lab.tls()?.pki;
    let ends = pki.terminate(&["web"], "");
    let route = |relay: Relay, port: u16, again: &str| {
        let (name, listen) = (relay.route(), relay.listen());
        format!(
            "[[route]]\nname = \"{name}\"\nlisten = [\"{listen}\"]\nbackends = [\"10.88.2.2:{port}\"]\n{rest}\n{ends}{again}"
        )
    };
    let tls = [route(Relay::Terminated, port, ""), route(Relay::Again, port + 1, &pki.again(NAME))];
    Ok(format!("{}{}", routes(port, rest), tls.concat()))
}

/// The arguments of a client that say where the server is.
fn at(to: SocketAddr) -> [String; 4] {
    ["-h".into(), to.ip().to_string(), "-p".into(), to.port().to_string()]
}

fn psql(client: &Host, to: SocketAddr) -> Result<Talk> {
    let mut command = client.command("psql");
    command.args(at(to)).args(["-U", "postgres", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
    Talk::start(command)
}

fn quiet() -> Result<()> {
    let due = std::time::Instant::now() + QUIET;
    wait_until("a quiet time", QUIET * 4, || std::time::Instant::now() >= due)
}

#[test]
fn a_database_session_lives_through_quiet_times_and_carries_much() -> Result<()> {
    let lab = Lab::new()?;
    let _postgres = lab.postgres(lab.backend(1), 5432)?;
    let shunt = Shunt::start(&lab, &routes(5432, ""))?;
    on_each(&Relay::ENGINES, |relay| {
        let mut session = psql(lab.client(), relay.listen())?;
        session.say("select 6 * 7;")?;
        ensure!(session.hear(SOON)? == "42");
        session.say("create temp table t as select n, md5(n::text) from generate_series(1, 20000) n;")?;
        quiet()?;
        session.say("select n, md5 from t order by n;")?;
        for n in 1..=20_000 {
            let line = session.hear(SOON)?;
            ensure!(line.starts_with(&format!("{n}|")) && line.len() == n.to_string().len() + 33, "row {n}: {line}");
        }
        // 24 MB in one answer, and a message from another session.
        session.say("select sum(length(x)) from (select repeat('x', 1000000) x from generate_series(1, 24)) s;")?;
        ensure!(session.hear(SOON)? == "24000000");
        session.say("select repeat('y', 24000000);")?;
        ensure!(session.hear(SOON)?.len() == 24_000_000);
        let channel = relay.route();
        session.say(&format!("listen {channel};"))?;
        quiet()?;
        let engine = || {
            let listed = shunt.connections(relay.route()).unwrap_or_default();
            listed.first().map(|connection| connection["engine"].clone())
        };
        if relay == Relay::Handoff {
            wait_until("the session has been handed over", SOON, || {
                engine().is_some_and(|engine| engine == "handoff")
            })?;
        }
        psql(lab.client(), relay.listen())?.say_and_end(&format!("notify {channel}, 'hello';"))?;
        session.say("select 1;")?;
        let told = session.hear(SOON)?;
        let told = if told == "1" { session.hear(SOON)? } else { told };
        ensure!(told.contains("hello"), "no notification: {told}");
        wait_until("only the long one is left, with all it carried", SOON, || {
            let listed = shunt.connections(relay.route()).unwrap_or_default();
            listed.len() == 1 && listed[0]["bytes_out"].as_u64() > Some(24_000_000)
        })?;
        drop(session);
        shunt.wait_route(relay.route(), "none is left", SOON, |r| (r["connections_active"] == 0).then_some(()))
    })
}

#[test]
fn a_subscriber_gets_a_message_after_a_quiet_time() -> Result<()> {
    let lab = Lab::new()?;
    let _redis = lab.redis(lab.backend(1), 6379)?;
    let shunt = Shunt::start(&lab, &routes(6379, "keepalive = \"immortal\"\ntimeouts = { idle = \"500ms\" }"))?;
    on_each(&Relay::ENGINES, |relay| {
        let redis_cli = |arguments: &[&str]| {
            let mut command = lab.client().command("redis-cli");
            command.args(at(relay.listen())).args(arguments);
            command
        };
        let mut subscriber = Talk::start(redis_cli(&["subscribe", relay.route()]))?;
        let answer: Vec<String> = (0..3).map(|_| subscriber.hear(SOON)).collect::<Result<_>>()?;
        ensure!(answer == ["subscribe", relay.route(), "1"], "{answer:?}");
        for nth in 0..2 {
            quiet()?;
            let text = format!("message {nth}");
            let sent = shunt_lab::run(&mut redis_cli(&["publish", relay.route(), &text]))?;
            ensure!(sent.trim() == "1", "one subscriber: {sent:?}");
            let message: Vec<String> = (0..3).map(|_| subscriber.hear(SOON)).collect::<Result<_>>()?;
            ensure!(message == ["message", relay.route(), &text], "{message:?}");
        }
        let listed = shunt.connections(relay.route())?;
        ensure!(listed.len() == 1, "{listed:?}");
        ensure!(relay != Relay::Handoff || listed[0]["engine"] == "handoff", "{listed:?}");
        Ok(())
    })
}

const WEBSOCKET_SERVER: &str = r#"
import asyncio, ssl, websockets
tls = None
if "PAIR":
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain("PAIR.pem", "PAIR.key")
async def serve(socket, *_):
    async for message in socket:
        await socket.send(message[::-1])
        await asyncio.sleep(0.2)
        await socket.send("pushed")
async def main():
    async with websockets.serve(serve, "0.0.0.0", PORT, ssl=tls, ping_interval=None, max_size=2**26):
        await asyncio.Future()
asyncio.run(main())
"#;

const WEBSOCKET_CLIENT: &str = r#"
import asyncio, ssl, sys, websockets
tls = {}
if sys.argv[2:]:
    tls = {"ssl": ssl.create_default_context(cafile=sys.argv[2]), "server_hostname": "web.example"}
async def main():
    async with websockets.connect(sys.argv[1], ping_interval=None, max_size=2**26, **tls) as socket:
        print("open", flush=True)
        for line in sys.stdin:
            what, size = line.split()
            message = what * int(size)
            await socket.send(message)
            back = await socket.recv()
            assert back == message[::-1], "came back different"
            print("echo", len(back), await socket.recv(), flush=True)
    print("closed", flush=True)
asyncio.run(main())
"#;

#[test]
fn a_websocket_carries_messages_both_ways_after_being_idle() -> Result<()> {
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let server = |port: u16, pair: &str| {
        let script = WEBSOCKET_SERVER.replace("PAIR", pair).replace("PORT", &port.to_string());
        lab.python(lab.backend(1), "websocket", &script, port)
    };
    let _servers = [server(8765, "")?, server(8766, &pki.file("web"))?];
    let forwarded = "[[route]]\nname = \"forwarded\"\nlisten = [\"10.88.1.1:8765\"]\nengine = \"nft\"\nbackends = [\"10.88.2.2:8765\"]\n";
    let shunt = Shunt::start(&lab, &(routes_with_tls(&lab, 8765, "")? + forwarded))?;
    let talk = |name: &str, url: String, ca: Option<String>| {
        let mut command = lab.client().command("/usr/bin/python3");
        command.args(["-u", "-c", WEBSOCKET_CLIENT, &url]).args(ca);
        let mut client = Talk::start(command)?;
        ensure!(client.hear(SOON)? == "open");
        for size in [1, 100, 4 * MANY, 3] {
            quiet()?;
            client.say(&format!("ab {size}"))?;
            let heard = client.hear(if size > MANY { MUCH } else { SOON })?;
            ensure!(heard == format!("echo {} pushed", 2 * size), "{heard}");
        }
        let listed = shunt.connections(name)?;
        ensure!(listed.len() == 1 && (name != "handoff" || listed[0]["engine"] == "handoff"), "{listed:?}");
        client.finish();
        ensure!(client.hear(SOON)? == "closed", "the closing handshake");
        shunt.wait_route(name, "closed", SOON, |r| (r["connections_active"] == 0).then_some(()))?;
        let reasons = shunt.terminations(name)?;
        ensure!(reasons.keys().all(|r| r.starts_with("finished_")), "{reasons:?}");
        Ok(())
    };
    on_each(&Relay::ENGINES_AND_TLS, |relay| match Relay::TLS.contains(&relay) {
        true => talk(relay.route(), format!("wss://{}/", relay.listen()), Some(pki.file("ca.pem"))),
        false => talk(relay.route(), format!("ws://{}/", relay.listen()), None),
    })?;
    talk("forwarded", "ws://10.88.1.1:8765/".to_owned(), None).context("forwarded")
}

const EVENT_SERVER: &str = r#"
import http.server, time
class Events(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for n in range(8):
            self.wfile.write(b"data: %d\n\n" % n)
            self.wfile.flush()
            time.sleep(0.4)
http.server.ThreadingHTTPServer(("0.0.0.0", 8080), Events).serve_forever()
"#;

#[test]
fn events_arrive_one_by_one_as_they_are_sent() -> Result<()> {
    let lab = Lab::new()?;
    let _server = lab.python(lab.backend(1), "events", EVENT_SERVER, 8080)?;
    let shunt = Shunt::start(&lab, &routes(8080, ""))?;
    on_each(&Relay::ENGINES, |relay| {
        let mut command = lab.client().command("curl");
        command.args(["-sSN", "--max-time", "20", &format!("http://{}/", relay.listen())]);
        let mut curl = Talk::start(command)?;
        let begin = std::time::Instant::now();
        for n in 0..8 {
            let line = curl.hear(SOON)?;
            ensure!(line == format!("data: {n}"), "{line:?}");
            ensure!(curl.hear(SOON)?.is_empty());
            // The next has not been sent yet when this one is here.
            let sent = Duration::from_millis(400 * n);
            let took = begin.elapsed();
            ensure!(
                took + Duration::from_millis(300) > sent && took < sent + Duration::from_secs(2),
                "event {n} after {took:?}"
            );
        }
        shunt.wait_ended(relay.route(), &[("finished_backend_first", 1)], SOON)
    })
}

#[test]
fn http_load_over_keep_alive_and_over_new_connections_has_no_error() -> Result<()> {
    let lab = Lab::new()?;
    let page = "x".repeat(3000);
    let pair = lab.tls()?.pki.file("web");
    let server = |port: u16, tls: &str| {
        let server = format!("http {{ access_log off; server {{ listen {port} {tls}; return 200 '{page}'; }} }}");
        lab.nginx_with(lab.backend(1), &server, port)
    };
    let tls = format!("ssl; ssl_certificate {pair}.pem; ssl_certificate_key {pair}.key");
    let _servers = [server(80, "")?, server(81, &tls)?];
    let shunt = Shunt::start(&lab, &routes_with_tls(&lab, 80, "")?)?;
    on_each(&Relay::ENGINES_AND_TLS, |relay| {
        let scheme = if Relay::TLS.contains(&relay) { "https" } else { "http" };
        for header in ["Connection: keep-alive", "Connection: close"] {
            let to = relay.listen();
            let report =
                lab.client().sh(&format!("wrk -t1 -c20 -d2s --timeout 10s -H '{header}' {scheme}://{to}/page"))?;
            let requests = report.lines().find(|l| l.contains("requests in")).context("no requests")?;
            println!("{relay:?} {header}: {}", requests.trim());
            ensure!(!report.contains("Socket errors") && !report.contains("Non-2xx"), "{header}: {report}");
        }
        shunt.wait_route(relay.route(), "none is left", SOON, |r| (r["connections_active"] == 0).then_some(()))?;
        let reasons = shunt.terminations(relay.route())?;
        ensure!(!reasons.contains_key("internal_error") && !reasons.contains_key("connect_refused"), "{reasons:?}");
        Ok(())
    })
}
