//! The admin API: one router on a TCP address and on a Unix socket.
//!
//! Over TCP it only answers questions, since TCP brings no proof of who asks; whatever changes the daemon (`POST`) goes
//! over the Unix socket, whose file permissions (0660) are the authentication. The API holds a [`Control`] and
//! nothing else: it can be restarted without the daemon noticing.

mod api;
mod dashboard;
mod guard;
mod listen;
mod merge;
mod metrics;
mod serve;

use std::time::Instant;

use axum::{
    Router, middleware,
    routing::{get, post},
};
pub use guard::Transport;
pub use listen::{BindError, Listeners};

use crate::control::Control;

/// What every handler has.
#[derive(Debug, Clone)]
pub(crate) struct Api {
    control: Control,
    started: Instant,
}

impl Api {
    pub(crate) fn new(control: Control) -> Self {
        Self { control, started: Instant::now() }
    }
}

/// Serves until `stop` is done; then lets requests under way finish for a moment.
pub async fn serve(listeners: Listeners, control: Control, stop: impl Future<Output = ()>) {
    serve::run(listeners, Api::new(control), stop).await;
}

pub(crate) fn router(api: Api, transport: Transport) -> Router {
    Router::new()
        .route("/", get(dashboard::page))
        .route("/metrics", get(metrics::scrape))
        .route("/healthz", get(api::healthz))
        .route("/readyz", get(api::readyz))
        .route("/v1/status", get(api::status))
        .route("/v1/routes", get(api::routes))
        .route("/v1/connections", get(api::connections))
        .route("/v1/explain", get(api::explain))
        .route("/v1/ruleset", get(api::ruleset))
        .route("/v1/reload", post(api::reload))
        .route("/v1/kill", post(api::kill))
        .route("/v1/backend", post(api::backend))
        .fallback(api::not_found)
        .method_not_allowed_fallback(api::method_not_allowed)
        .layer(middleware::from_fn_with_state(transport, guard::check))
        .with_state(api)
}

#[cfg(test)]
mod tests;
