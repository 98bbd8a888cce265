//! What others ask: connections, wherever they are, and their end.

use std::{
    collections::HashSet,
    sync::{Arc, OnceLock},
};

use proxy_core::view;
use tokio::sync::{mpsc, oneshot};

use super::Link;
use crate::stream::{
    StreamCommand, StreamId, handed,
    worker::{Command, Row},
};

/// Asks the workers, and the owner of what they have handed over, what others want to know.
pub(super) async fn answer(
    mut queue: mpsc::Receiver<StreamCommand>,
    links: Vec<Link>,
    owner: Arc<OnceLock<mpsc::UnboundedSender<handed::Command>>>,
) {
    while let Some(command) = queue.recv().await {
        match command {
            StreamCommand::Connections { filter, reply } => {
                let most = if filter.limit == 0 { usize::MAX } else { filter.limit };
                let (mut rows, mut asked) = (Vec::new(), Vec::new());
                for link in &links {
                    let (answer, answered) = oneshot::channel();
                    link.send(Command::List { filter: filter.clone(), reply: answer });
                    asked.push(answered);
                }
                for answered in asked {
                    rows.extend(answered.await.unwrap_or_default());
                }
                // Then its owner: a connection that is handed over meanwhile is shown once, where it is now.
                let mut found = ask(&owner, |reply| handed::Command::List(filter, reply)).await.unwrap_or_default();
                let handed: HashSet<String> = found.iter().map(|one| one.id.clone()).collect();
                found.extend(rows.iter().map(connection).filter(|one| !handed.contains(&one.id)));
                found.truncate(most);
                let _ = reply.send(Ok(found));
            }
            StreamCommand::Kill { id, reply } => {
                let _ = reply.send(kill(id, &links, &owner).await);
            }
            StreamCommand::Refresh { reply } => {
                let _ = ask(&owner, handed::Command::Refresh).await;
                let _ = reply.send(Ok(()));
            }
        }
    }
}

/// `None`: there is no owner, or it has ended.
async fn ask<T>(
    owner: &OnceLock<mpsc::UnboundedSender<handed::Command>>,
    command: impl FnOnce(oneshot::Sender<T>) -> handed::Command,
) -> Option<T> {
    let (reply, answered) = oneshot::channel();
    owner.get()?.send(command(reply)).ok()?;
    answered.await.ok()
}

async fn kill(
    id: StreamId,
    links: &[Link],
    owner: &OnceLock<mpsc::UnboundedSender<handed::Command>>,
) -> Result<view::Killed, view::Failure> {
    let missing = || view::Failure {
        error: format!("there is no connection {id}"),
        hint: Some("`shunt connections` lists the ids of living connections".into()),
    };
    let killed = |route: Arc<str>, client| view::Killed { id: id.to_string(), route: route.to_string(), client };
    if let Some(link) = links.get(usize::from(id.worker())) {
        let (reply, answered) = oneshot::channel();
        link.send(Command::Kill { number: id.number(), reply });
        if let Ok(Some(row)) = answered.await {
            return Ok(killed(row.route, row.client));
        }
    }
    // What it has handed over has arrived by now.
    let handed = ask(owner, |reply| handed::Command::Kill(id, reply)).await.flatten();
    let (route, client) = handed.ok_or_else(missing)?;
    Ok(killed(route, client))
}

fn connection(row: &Row) -> view::Connection {
    view::Connection {
        id: row.id.to_string(),
        route: row.route.to_string(),
        engine: row.engine,
        protocol: "tcp".into(),
        client: row.client,
        listen: row.listen,
        backend: row.backend,
        state: row.state.into(),
        age_seconds: row.age.as_secs_f64(),
        idle_seconds: row.idle.as_secs_f64(),
        expires_seconds: row.expires.map(|left| left.as_secs_f64()),
        bytes_in: row.bytes_in,
        bytes_out: row.bytes_out,
        packets_in: 0,
        packets_out: 0,
        metered: true,
        not_handed_over: row.not_handed_over.clone(),
    }
}
