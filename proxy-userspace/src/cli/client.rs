//! Talking to the daemon: HTTP over its Unix socket.

mod locate;

use std::{
    io::ErrorKind,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Empty};
use hyper::{Method, Request, body::Bytes};
use hyper_util::rt::TokioIo;
use proxy_core::view;
use serde::de::DeserializeOwned;
use tokio::{net::UnixStream, runtime::Runtime, time::timeout};

pub(super) use locate::DEFAULT_CONFIG;

use super::{Exit, Failure, Place};

/// Longer than the daemon gives itself for the slowest request.
const ANSWER: Duration = Duration::from_secs(70);

/// A way to the daemon. Every request is a connection of its own.
#[derive(Debug)]
pub(super) struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

impl Client {
    pub(super) fn new(place: &Place) -> Result<Self, Failure> {
        let socket = locate::socket(place)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::new(format!("cannot start: {error}"), "look at ulimit -n"))?;
        Ok(Self { socket, runtime })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn get<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> Result<T, Failure> {
        self.decoded(Method::GET, path, query)
    }

    pub(super) fn post<T: DeserializeOwned>(&self, path: &str, query: &[(&str, &str)]) -> Result<T, Failure> {
        self.decoded(Method::POST, path, query)
    }

    fn decoded<T: DeserializeOwned>(&self, method: Method, path: &str, query: &[(&str, &str)]) -> Result<T, Failure> {
        let exchange = async { timeout(ANSWER, self.exchange(method, &target(path, query))).await };
        let bytes = match self.runtime.block_on(exchange) {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(Failure::new(
                    format!("the daemon did not answer within {} s", ANSWER.as_secs()),
                    "look at its log; try again",
                ));
            }
        };
        serde_json::from_slice(&bytes).map_err(|error| {
            Failure::new(
                format!("the daemon's answer is not understood: {error}"),
                "use the shunt command of the daemon's own version",
            )
        })
    }

    async fn exchange(&self, method: Method, target: &str) -> Result<Bytes, Failure> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(&error))?;
        let broken =
            |error: hyper::Error| Failure::new(format!("the daemon broke off: {error}"), "look at its log; try again");
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Ends with the request: the runtime runs only while one is under way.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(target)
            .header("host", "localhost")
            .body(Empty::<Bytes>::new())
            .map_err(|error| {
                Failure::new(format!("\"{target}\" cannot be asked for: {error}"), "look at the arguments")
            })?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(broken)?.to_bytes();
        if status.is_success() {
            return Ok(bytes);
        }
        Err(match serde_json::from_slice::<view::Failure>(&bytes) {
            Ok(failure) => Failure { what: failure.error, mend: failure.hint, exit: Exit::Failed },
            Err(_) => Failure::new(format!("the daemon answered {status}"), "is this a shunt daemon of this version?"),
        })
    }

    fn unreachable(&self, error: &std::io::Error) -> Failure {
        let socket = self.socket.display();
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Failure::new(
                format!("no daemon answers on {socket}"),
                "start it (systemctl start shunt, or shunt run --config FILE), or say where it is with --socket or --config",
            )
            .exit(Exit::NoDaemon),
            ErrorKind::PermissionDenied => Failure::new(
                format!("no permission to open {socket}"),
                "run as root, or as a member of the socket's group",
            )
            .exit(Exit::Missing),
            _ => Failure::new(format!("cannot talk to {socket}: {error}"), "say where the daemon is with --socket")
                .exit(Exit::NoDaemon),
        }
    }
}

fn target(path: &str, query: &[(&str, &str)]) -> String {
    if query.is_empty() {
        return path.to_owned();
    }
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
    format!("{path}?{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_typed_is_escaped() {
        assert_eq!(target("/v1/kill", &[("id", "a b&c=1#[::1]")]), "/v1/kill?id=a+b%26c%3D1%23%5B%3A%3A1%5D");
        assert_eq!(target("/v1/status", &[]), "/v1/status");
    }
}
