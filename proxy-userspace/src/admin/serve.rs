//! Accepting and serving connections within bounds.

use std::{pin::pin, sync::Arc, time::Duration};

use axum::{Router, serve::Listener};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

use super::{Api, Listeners, Transport, router};

/// Connections at once on each of the two listeners; more wait in the backlog.
const CONNECTIONS: usize = 64;
/// For the head of a request to arrive, also on a connection kept alive.
const REQUEST_HEAD: Duration = Duration::from_secs(10);
/// A connection is asked to end after this, so that one that reads slowly cannot hold its place for ever.
const CONNECTION: Duration = Duration::from_secs(300);
/// For a response under way when the daemon stops or the connection is over time.
const GRACE: Duration = Duration::from_secs(5);

pub(super) async fn run(listeners: Listeners, api: Api, stop: impl Future<Output = ()>) {
    let Listeners { tcp, unix, file } = listeners;
    let (stopping, stopped) = watch::channel(false);
    let mut accepting = JoinSet::new();
    accepting.spawn(accept_all(unix, router(api.clone(), Transport::Unix), stopped.clone()));
    if let Some(tcp) = tcp {
        let loopback = tcp.local_addr().is_ok_and(|address| address.ip().is_loopback());
        accepting.spawn(accept_all(tcp, router(api, Transport::Tcp { loopback }), stopped));
    }
    stop.await;
    stopping.send_replace(true);
    while accepting.join_next().await.is_some() {}
    drop(file);
}

async fn accept_all(mut listener: impl Listener, router: Router, mut stopped: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let next = async {
            let place = places.clone().acquire_owned().await.ok()?;
            Some((place, listener.accept().await.0))
        };
        let next = tokio::select! {
            _ = stopped.wait_for(|stopped| *stopped) => break,
            Some(_) = connections.join_next() => continue,
            next = next => next,
        };
        let Some((place, stream)) = next else { break };
        connections.spawn(connection(router.clone(), stream, stopped.clone(), place));
    }
    while connections.join_next().await.is_some() {}
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    router: Router,
    stream: S,
    mut stopped: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_HEAD)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut served = pin!(served);
    let over = tokio::select! {
        ended = served.as_mut() => ended,
        _ = async { timeout(CONNECTION, stopped.wait_for(|stopped| *stopped)).await.map(drop).ok() } => {
            served.as_mut().graceful_shutdown();
            match timeout(GRACE, served).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = over {
        tracing::debug!(%error, "a connection to the admin API ended early");
    }
}
