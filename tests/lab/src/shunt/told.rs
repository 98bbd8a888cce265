//! What the daemon tells of connections, in its views, its metrics and its log.

use std::{collections::BTreeMap, io, os::fd::AsFd, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use socket2::{SockAddr, SockRef};

use super::Shunt;
use crate::wait::wait_for;

impl Shunt {
    /// The open connections of a route, as `shunt connections` has them.
    pub fn connections(&self, route: &str) -> Result<Vec<Value>> {
        match self.cli_json(&["connections", "--route", route])? {
            Value::Array(list) => Ok(list),
            other => anyhow::bail!("`shunt connections --json` is not an array: {other}"),
        }
    }

    /// The connection of the client's `stream`, while it is open: the one to where the client connected, or, in a daemon
    /// further behind, the only one of that client.
    pub fn connection_of(&self, stream: &impl AsFd) -> Result<Option<Value>> {
        let socket = SockRef::from(stream);
        let address = |address: io::Result<SockAddr>| address?.as_socket().context("not an address of IP");
        let (client, to) = (address(socket.local_addr())?, address(socket.peer_addr())?);
        let list = self.cli_json(&["connections", "--client", &client.ip().to_string()])?;
        let list = list.as_array().context("`shunt connections --json` is not an array")?;
        // A client uses its port again towards another address.
        let of_client: Vec<&Value> = list.iter().filter(|c| c["client"] == client.to_string()).collect();
        let there = of_client.iter().find(|c| c["listen"] == to.to_string());
        let only = of_client.first().filter(|_| of_client.len() == 1);
        Ok(there.or(only).map(|c| (*c).clone()))
    }

    /// The engine that the connection of the client's `stream` is moved by now.
    pub fn engine_of(&self, stream: &impl AsFd) -> Result<Option<String>> {
        Ok(self.connection_of(stream)?.and_then(|c| Some(c["engine"].as_str()?.to_owned())))
    }

    /// How often each reason was given on a route; zeros left out.
    pub fn terminations(&self, route: &str) -> Result<BTreeMap<String, u64>> {
        let route = self.route(route)?;
        let all = route["terminations"].as_object().context("terminations")?;
        Ok(all.iter().filter_map(|(reason, n)| Some((reason.clone(), n.as_u64()?))).filter(|(_, n)| *n > 0).collect())
    }

    /// Waits until nothing of a route is open and its connections have ended for exactly these reasons, in the views as
    /// in the metrics.
    pub fn wait_ended(&self, route: &str, expected: &[(&str, u64)], within: Duration) -> Result<()> {
        let expected: BTreeMap<String, u64> = expected.iter().map(|(reason, n)| ((*reason).to_owned(), *n)).collect();
        let mut last = (Value::Null, BTreeMap::new());
        let outcome = wait_for(&format!("route {route}: nothing open, ended {expected:?}"), within, || {
            last = (self.route(route).ok()?, self.terminations(route).ok()?);
            (last.0["connections_active"] == 0 && last.1 == expected).then_some(())
        });
        outcome
            .with_context(|| format!("route {route}: active {}, ended {:?}", last.0["connections_active"], last.1))?;
        let total: u64 = expected.values().sum();
        ensure!(last.0["connections_total"] == total, "connections_total: {} of {total}", last.0["connections_total"]);
        let metrics = self.metrics()?;
        for (reason, n) in &expected {
            let told = metrics.value("shunt_terminations_total", &[("route", route), ("reason", reason)]);
            ensure!(told == *n as f64, "shunt_terminations_total of {reason}: {told}, not {n}");
        }
        let (active, count) = ("shunt_connections_active", "shunt_connections_total");
        ensure!(metrics.value(active, &[("route", route)]) == 0.0, "{active} is not 0");
        ensure!(metrics.value(count, &[("route", route)]) == total as f64, "{count} is not {total}");
        Ok(())
    }

    /// The lines of ended connections, when `log.format` is `json`.
    pub fn access_log(&self) -> Vec<Value> {
        let lines = self.log();
        let parsed = lines.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        parsed.filter(|line| line["reason"].is_string() && line["client"].is_string()).collect()
    }

    /// Waits for the line of the client at `client` (address and port).
    pub fn wait_access_line(&self, client: &str, within: Duration) -> Result<Value> {
        wait_for(&format!("a line of {client} in the access log"), within, || {
            self.access_log().into_iter().find(|line| line["client"] == client)
        })
    }
}
