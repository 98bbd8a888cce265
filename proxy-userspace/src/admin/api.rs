//! The JSON API: each handler asks an owner through its channel, or reads its last snapshot.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Json,
    body::Body,
    extract::{Query, State, rejection::QueryRejection},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use proxy_core::view::{self, Failure};
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};

use super::{
    Api,
    merge::{self, Known},
};
use crate::{
    control::{ConnectionFilter, FlowCommand, Reply, RouteCommand},
    stream::{StreamCommand, StreamId},
};

/// How long an owner may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// A reload resolves names and programs the kernel.
const RELOAD: Duration = Duration::from_secs(60);
/// Numbers that are a little older do as well.
const REFRESH: Duration = Duration::from_secs(1);
/// `limit` when none is asked for.
const CONNECTIONS: usize = 1000;

/// A failed request.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    failure: Failure,
}

pub(super) fn refusal(status: StatusCode, error: impl Into<String>, hint: impl Into<String>) -> Refusal {
    Refusal { status, failure: Failure { error: error.into(), hint: Some(hint.into()) } }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.failure)).into_response()
    }
}

/// The query of a request; a wrong one is a JSON failure like every other.
type Asked<T> = Result<Query<T>, QueryRejection>;

fn asked<T>(query: Asked<T>, usage: &str) -> Result<T, Refusal> {
    query.map(|Query(query)| query).map_err(|error| refusal(StatusCode::BAD_REQUEST, error.body_text(), usage))
}

/// Sends a command to an owner and waits for its answer.
async fn ask<C, T>(
    owner: &mpsc::Sender<C>,
    limit: Duration,
    command: impl FnOnce(Reply<T>) -> C,
) -> Result<T, Refusal> {
    let stopping =
        || refusal(StatusCode::SERVICE_UNAVAILABLE, "the daemon is stopping", "look at its log, start it again");
    let (reply, answer) = oneshot::channel();
    let exchange = async {
        owner.send(command(reply)).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())
    };
    match timeout(limit, exchange).await {
        Ok(answer) => answer?.map_err(|failure| Refusal { status: StatusCode::UNPROCESSABLE_ENTITY, failure }),
        Err(_) => Err(refusal(
            StatusCode::GATEWAY_TIMEOUT,
            format!("no answer within {} s: the daemon is busy", limit.as_secs()),
            "try again; what was asked for may still happen",
        )),
    }
}

/// Answers with JSON made off the daemon's only thread: a list of 50,000 routes takes a while.
pub(super) async fn json<T: Serialize>(make: impl FnOnce() -> T + Send + 'static) -> Response {
    let bytes = tokio::task::spawn_blocking(move || serde_json::to_vec(&make())).await;
    match bytes {
        Ok(Ok(bytes)) => ([(header::CONTENT_TYPE, "application/json")], Body::from(bytes)).into_response(),
        Ok(Err(error)) => internal(&error.to_string()),
        Err(error) => internal(&error.to_string()),
    }
}

pub(super) fn internal(error: &str) -> Response {
    refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("a defect in shunt: {error}"), "report it").into_response()
}

pub(super) async fn not_found() -> Refusal {
    refusal(StatusCode::NOT_FOUND, "there is nothing under this path", "see / for the dashboard, /v1/status, /metrics")
}

pub(super) async fn method_not_allowed() -> Refusal {
    refusal(StatusCode::METHOD_NOT_ALLOWED, "not with this method", "GET to ask; POST for reload, kill, backend")
}

/// The owners of routes and flows live.
pub(super) async fn healthz(State(api): State<Api>) -> Response {
    let flows_gone = api.control.flows.as_ref().is_some_and(mpsc::Sender::is_closed);
    if api.control.routes.is_closed() || flows_gone {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response();
    }
    "ok\n".into_response()
}

/// The ruleset is in the kernel.
pub(super) async fn readyz(State(api): State<Api>) -> Response {
    if api.control.route_state.borrow().ready {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not ready\n").into_response()
    }
}

/// Numbers of handed-over connections are as of now. As they were, when the daemon is busy or stops.
pub(super) async fn refresh(api: &Api) {
    drop(ask(&api.control.streams, REFRESH, |reply| StreamCommand::Refresh { reply }).await);
}

pub(super) async fn status(State(api): State<Api>) -> Json<view::Status> {
    refresh(&api).await;
    Json(merge::status(&Known::now(&api), api.started.elapsed()))
}

pub(super) async fn routes(State(api): State<Api>) -> Response {
    refresh(&api).await;
    let known = Known::now(&api);
    json(move || merge::routes(&known)).await
}

#[derive(Debug, Deserialize)]
pub(super) struct ConnectionsQuery {
    route: Option<String>,
    client: Option<std::net::IpAddr>,
    /// 0 = all.
    limit: Option<usize>,
}

pub(super) async fn connections(State(api): State<Api>, query: Asked<ConnectionsQuery>) -> Result<Response, Refusal> {
    let query = asked(query, "/v1/connections?route=NAME&client=IP&limit=N, each optional; limit=0 is all")?;
    if let Some(route) = &query.route {
        known_route(&api, route)?;
    }
    let filter = ConnectionFilter {
        route: query.route,
        client: query.client,
        limit: query.limit.unwrap_or(CONNECTIONS),
        ..ConnectionFilter::default()
    };
    let found = find(&api, filter).await?;
    Ok(json(move || found).await)
}

/// Those of the kernel and of the daemon, the oldest first.
async fn find(api: &Api, filter: ConnectionFilter) -> Result<Vec<view::Connection>, Refusal> {
    let relayed = filter.id.as_deref().map(|id| id.parse::<StreamId>().is_ok());
    let limit = filter.limit;
    let forwarded = async {
        match api.control.flows.as_ref().filter(|_| relayed != Some(true)) {
            Some(flows) => {
                let filter = filter.clone();
                ask(flows, ANSWER, |reply| FlowCommand::Connections { filter, reply }).await
            }
            None => Ok(Vec::new()),
        }
    };
    let relayed = async {
        // Closed: nothing is relayed any more.
        match relayed != Some(false) && !api.control.streams.is_closed() {
            true => {
                let filter = filter.clone();
                ask(&api.control.streams, ANSWER, |reply| StreamCommand::Connections { filter, reply }).await
            }
            false => Ok(Vec::new()),
        }
    };
    let (forwarded, relayed) = tokio::join!(forwarded, relayed);
    Ok(merge::connections(forwarded?, relayed?, limit))
}

fn has_route(api: &Api, route: &str) -> bool {
    api.control.route_state.borrow().routes.iter().any(|known| known.name == route)
}

fn known_route(api: &Api, route: &str) -> Result<(), Refusal> {
    if has_route(api, route) {
        return Ok(());
    }
    Err(refusal(StatusCode::NOT_FOUND, format!("there is no route \"{route}\""), "shunt routes lists them"))
}

#[derive(Debug, Deserialize)]
pub(super) struct ExplainQuery {
    what: String,
}

/// `what`: a route's name, a connection's id, or `client:port`.
pub(super) async fn explain(
    State(api): State<Api>,
    query: Asked<ExplainQuery>,
) -> Result<Json<view::Explain>, Refusal> {
    let ExplainQuery { what } = asked(query, "/v1/explain?what=ROUTE, a connection's id, or CLIENT:PORT")?;
    if has_route(&api, &what) {
        return explain_route(&api, what).await.map(Json);
    }
    let filter = match what.parse::<SocketAddr>() {
        Ok(client) => ConnectionFilter {
            client: Some(client.ip()),
            client_port: Some(client.port()),
            limit: 1,
            ..Default::default()
        },
        Err(_) => ConnectionFilter { id: Some(what.clone()), limit: 1, ..Default::default() },
    };
    let Some(connection) = find(&api, filter).await?.into_iter().next() else {
        return Err(refusal(
            StatusCode::NOT_FOUND,
            format!("\"{what}\" is neither a route nor a live connection"),
            "shunt routes and shunt connections list them; a client is written IP:PORT, [IPv6]:PORT",
        ));
    };
    let explained = explain_route(&api, connection.route.clone()).await?;
    Ok(Json(view::Explain { connection: Some(connection), ..explained }))
}

async fn explain_route(api: &Api, route: String) -> Result<view::Explain, Refusal> {
    ask(&api.control.routes, ANSWER, |reply| RouteCommand::Explain { route, reply }).await
}

/// The ruleset as an nft script.
pub(super) async fn ruleset(State(api): State<Api>) -> Result<String, Refusal> {
    ask(&api.control.routes, ANSWER, |reply| RouteCommand::Ruleset { reply }).await
}

pub(super) async fn reload(State(api): State<Api>) -> Result<Json<view::Reload>, Refusal> {
    ask(&api.control.routes, RELOAD, |reply| RouteCommand::Reload { reply }).await.map(Json)
}

#[derive(Debug, Deserialize)]
pub(super) struct KillQuery {
    id: String,
}

pub(super) async fn kill(State(api): State<Api>, query: Asked<KillQuery>) -> Result<Json<view::Killed>, Refusal> {
    let KillQuery { id } = asked(query, "/v1/kill?id=CONNECTION")?;
    if let Ok(id) = id.parse::<StreamId>() {
        return ask(&api.control.streams, ANSWER, |reply| StreamCommand::Kill { id, reply }).await.map(Json);
    }
    match &api.control.flows {
        Some(flows) => ask(flows, ANSWER, |reply| FlowCommand::Kill { id, reply }).await.map(Json),
        None => Err(refusal(
            StatusCode::UNPROCESSABLE_ENTITY,
            format!("no connection \"{id}\""),
            "`shunt connections` lists them",
        )),
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct BackendQuery {
    route: String,
    backend: String,
    state: view::BackendAdmin,
}

pub(super) async fn backend(
    State(api): State<Api>,
    query: Asked<BackendQuery>,
) -> Result<Json<view::Backend>, Refusal> {
    let query = asked(query, "/v1/backend?route=NAME&backend=NAME&state=ready, drain or down")?;
    known_route(&api, &query.route)?;
    let BackendQuery { route, backend, state } = query;
    let of = route.clone();
    let set = |reply| RouteCommand::SetBackend { route, backend, admin: state, reply };
    let backend = ask(&api.control.routes, ANSWER, set).await?;
    Ok(Json(merge::backend(&Known::now(&api), &of, backend)))
}
