//! Flows as people see them.

use proxy_core::{
    config::Engine,
    flow::{FlowTable, Now, Record, RouteInfo, State},
    view,
};

use crate::control::ConnectionFilter;

/// The connections that match, lingering ones too, oldest first.
pub fn list(table: &FlowTable, filter: &ConnectionFilter, now: Now) -> Vec<view::Connection> {
    let mut found: Vec<(&Record, &RouteInfo)> = table
        .records()
        .filter_map(|record| Some((record, table.tally(record.route)?.info.as_ref())))
        .filter(|(record, route)| matches(record, route, filter))
        .collect();
    found.sort_unstable_by_key(|(record, _)| (record.start, record.id));
    if filter.limit > 0 {
        found.truncate(filter.limit);
    }
    found.into_iter().map(|(record, route)| connection(record, route, now)).collect()
}

fn matches(record: &Record, route: &RouteInfo, filter: &ConnectionFilter) -> bool {
    filter.route.as_deref().is_none_or(|name| *name == *route.name)
        && filter.client.is_none_or(|ip| ip == record.client.ip())
        && filter.client_port.is_none_or(|port| port == record.client.port())
        && filter.id.as_deref().is_none_or(|id| id.parse() == Ok(record.id))
}

fn connection(record: &Record, route: &RouteInfo, now: Now) -> view::Connection {
    let until = match record.state {
        State::Closing { ended, .. } => ended,
        State::Dialing | State::Established | State::HalfClosed { .. } => now.mono,
    };
    view::Connection {
        id: record.id.to_string(),
        route: route.name.to_string(),
        engine: Engine::Nft,
        protocol: record.protocol.as_str().into(),
        client: record.client,
        listen: record.listen,
        backend: Some(record.backend),
        state: record.state.as_str().into(),
        age_seconds: until.saturating_sub(record.start).as_secs_f64(),
        idle_seconds: now.mono.saturating_sub(record.last_activity).as_secs_f64(),
        expires_seconds: record.expires_in(route, now).map(|left| left.as_secs_f64()),
        bytes_in: record.traffic_in.bytes,
        bytes_out: record.traffic_out.bytes,
        packets_in: record.traffic_in.packets,
        packets_out: record.traffic_out.packets,
        metered: record.metered,
        not_handed_over: None,
    }
}
