//! gRPC over TLS that ends in the daemon: its calls of all four kinds, its status in the trailers, its flow control.

use std::time::Duration;

use anyhow::{Result, ensure};
use shunt_lab::{Lab, Shunt, relay::Relay, tls::NAME};

const SOON: Duration = Duration::from_secs(10);

/// Bytes are their own messages: nothing need be generated.
const SERVER: &str = r#"
import grpc, time
from concurrent import futures

def refuse(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, request.decode())

def late(request, context):
    while context.is_active():
        time.sleep(0.01)

def count(request, context):
    for n in range(int(request)):
        yield b"%d" % n

def chat(requests, context):
    for request in requests:
        yield request[::-1]

calls = {
    "Same": grpc.unary_unary_rpc_method_handler(lambda request, context: request),
    "Refuse": grpc.unary_unary_rpc_method_handler(refuse),
    "Late": grpc.unary_unary_rpc_method_handler(late),
    "Count": grpc.unary_stream_rpc_method_handler(count),
    "Sum": grpc.stream_unary_rpc_method_handler(lambda requests, context: b"%d" % sum(map(len, requests))),
    "Chat": grpc.stream_stream_rpc_method_handler(chat),
}
server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("lab.Talk", calls),))
LISTEN
server.start()
server.wait_for_termination()
"#;

const CLIENT: &str = r#"
import grpc, sys, threading

where, ca, name = sys.argv[1:]
ends = grpc.ssl_channel_credentials(open(ca, "rb").read())
options = [("grpc.ssl_target_name_override", name), ("grpc.enable_http_proxy", 0)]
channel = grpc.secure_channel(where, ends, options=options)
unary, streams = channel.unary_unary("/lab.Talk/Same"), channel.stream_stream("/lab.Talk/Chat")
for n in range(300):
    assert unary(b"call %d" % n, timeout=20) == b"call %d" % n
large = bytes(range(256)) * 12_000
assert unary(large, timeout=20) == large

assert [int(n) for n in channel.unary_stream("/lab.Talk/Count")(b"3000", timeout=20)] == list(range(3000))
assert channel.stream_unary("/lab.Talk/Sum")((b"x" * 50_000 for _ in range(100)), timeout=20) == b"5000000"

# Each message waits for the answer to the one before.
answered = threading.Semaphore(1)
def ask():
    for n in range(200):
        assert answered.acquire(timeout=20)
        yield b"<%d" % n
heard = []
for answer in streams(ask(), timeout=20):
    heard.append(answer)
    answered.release()
assert heard == [(b"<%d" % n)[::-1] for n in range(200)], heard

for call, wanted, said in [("Refuse", grpc.StatusCode.FAILED_PRECONDITION, "not today"), ("Late", grpc.StatusCode.DEADLINE_EXCEEDED, None)]:
    try:
        channel.unary_unary("/lab.Talk/" + call)(b"not today", timeout=20 if said else 0.3)
        raise AssertionError(call)
    except grpc.RpcError as error:
        assert error.code() == wanted and said in (None, error.details()), error
# The connection has outlived both.
assert unary(b"still here", timeout=20) == b"still here"
channel.close()
print("all calls were answered")
"#;

#[test]
fn calls_of_every_kind_are_answered_and_a_refusal_comes_with_its_reason() -> Result<()> {
    let lab = Lab::new()?;
    let pki = &lab.tls()?.pki;
    let (pair, mut config, mut servers) = (pki.file("web"), String::new(), Vec::new());
    let secret = format!(
        "pair = [(open('{pair}.key', 'rb').read(), open('{pair}.pem', 'rb').read())]\n\
         assert server.add_secure_port('0.0.0.0:PORT', grpc.ssl_server_credentials(pair))"
    );
    for relay in Relay::TLS {
        let (port, again) = (relay.backend_port(), relay == Relay::Again);
        let listen = if again { &secret } else { "assert server.add_insecure_port('0.0.0.0:PORT')" };
        let script = SERVER.replace("LISTEN", &listen.replace("PORT", &port.to_string()));
        servers.push(lab.python(lab.backend(1), "grpc", &script, port)?);
        config.push_str(&format!(
            "[[route]]\nname = \"{}\"\nlisten = [\"{}\"]\nbackends = [\"10.88.2.2:{port}\"]\n{}{}",
            relay.route(),
            relay.listen(),
            pki.terminate(&["web"], "alpn = [\"h2\"]"),
            if again { pki.again(NAME) } else { String::new() }
        ));
    }
    let shunt = Shunt::start(&lab, &config)?;
    let client = lab.dir().join("grpc-client.py");
    std::fs::write(&client, CLIENT)?;
    for relay in Relay::TLS {
        let (client, ca) = (client.display(), pki.file("ca.pem"));
        let said =
            lab.client().sh(&format!("timeout 60 /usr/bin/python3 {client} {} {ca} {NAME} 2>&1", relay.listen()))?;
        ensure!(said.contains("all calls were answered"), "{relay:?}: {said}");
        let route = shunt
            .wait_route(relay.route(), "all have ended", SOON, |r| (r["connections_active"] == 0).then(|| r.clone()))?;
        println!("{relay:?}: {} bytes in, {} out", route["bytes_in"], route["bytes_out"]);
        ensure!(route["connections_total"] == 1, "one connection had all calls: {route}");
        let reasons = shunt.terminations(relay.route())?;
        ensure!(!reasons.contains_key("internal_error"), "{reasons:?}");
    }
    Ok(())
}
