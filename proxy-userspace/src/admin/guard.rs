//! What a request must satisfy before a handler sees it.

use std::net::IpAddr;

use axum::{
    extract::{Request, State},
    http::{Method, StatusCode, header, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::api::{Refusal, refusal};

/// How a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// The Unix socket: whoever may open it may change things.
    Unix,
    /// TCP: questions only. `loopback`: bound to a loopback address.
    Tcp { loopback: bool },
}

pub(super) async fn check(State(transport): State<Transport>, request: Request, next: Next) -> Response {
    match verdict(transport, &request) {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    }
}

fn verdict(transport: Transport, request: &Request) -> Result<(), Refusal> {
    let Transport::Tcp { loopback } = transport else { return Ok(()) };
    // Against DNS rebinding: a page from elsewhere can make a browser ask a loopback address, but under its own name. An
    // address that is reachable from outside gains nothing by the check.
    if loopback && !names_this_machine(request) {
        return Err(refusal(
            StatusCode::FORBIDDEN,
            "the Host header does not name this machine",
            "ask by IP address or as localhost",
        ));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Err(refusal(
            StatusCode::FORBIDDEN,
            "changes are not taken over TCP: it does not tell who asks",
            "use the shunt command, or the Unix socket: curl --unix-socket /run/shunt/admin.sock -X POST http://localhost/v1/…",
        ));
    }
    Ok(())
}

fn names_this_machine(request: &Request) -> bool {
    let Some(host) = request.headers().get(header::HOST) else {
        // HTTP/1.0 may leave it out; a browser does not.
        return true;
    };
    let Some(authority) = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok()) else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}
