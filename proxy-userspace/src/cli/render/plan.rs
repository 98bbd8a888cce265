//! A plan, for people and for scripts.

use std::collections::BTreeMap;

use proxy_core::plan::{Plan, RoutePlan};
use serde_json::{Value, json};

use super::{
    BAD, DIM,
    table::{Cell, Column, Table},
};
use crate::reconcile::views;

/// One line per route, then what rules the other engines out.
pub(in crate::cli) fn plan(plan: &Plan) -> String {
    let mut table = Table::new(&[
        Column::left("ROUTE"),
        Column::left("LISTENS ON"),
        Column::left("BACKENDS"),
        Column::left("ENGINE"),
        Column::left("BECAUSE"),
    ]);
    for route in plan.routes() {
        table.row([
            Cell::from(route.route.name.as_str()),
            Cell::from(route.route.listen.iter().map(views::listen).collect::<Vec<_>>().join(" ")),
            Cell::from(route.route.backends.iter().map(|b| b.target.to_string()).collect::<Vec<_>>().join(" ")),
            route.engine.map_or_else(|| Cell::styled("none", BAD), |engine| Cell::from(engine.as_str())),
            Cell::from(route.because()),
        ]);
    }
    let mut text = if plan.routes().is_empty() { "no routes\n".to_owned() } else { table.render() };
    for (route, condition) in plan.routes().iter().filter_map(|r| Some((r, r.condition()?))) {
        text += &format!("\n{}: {condition}\n", route.route.name);
    }
    for (route, how) in plan.routes().iter().filter_map(|r| Some((r, r.many_ports()?))) {
        text += &format!("\n{}: {how}\n", route.route.name);
    }
    for (why, routes) in kept(plan) {
        text += &format!("\nnot handed over: {why}: {routes}\n");
    }
    for route in plan.routes().iter().filter(|r| r.engine.is_none()) {
        text += &format!("\n{}: what rules each engine out\n", route.route.name);
        for (engine, refusal) in &route.refused {
            text += &format!("  {engine:8} {DIM}{refusal}{DIM:#}\n");
        }
    }
    text
}

/// What keeps connections in the daemon that could be handed over, each once, and the routes.
fn kept(plan: &Plan) -> BTreeMap<String, String> {
    const SHOWN: usize = 5;
    let mut kept: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (route, why) in plan.routes().iter().filter_map(|route| Some((route, route.kept_by()?))) {
        kept.entry(why.to_string()).or_default().push(route.route.name.as_str());
    }
    let told = |routes: Vec<&str>| match routes.get(..SHOWN) {
        Some(shown) if routes.len() > SHOWN => format!("{} and {} more", shown.join(", "), routes.len() - SHOWN),
        Some(_) | None => routes.join(", "),
    };
    kept.into_iter().map(|(why, routes)| (why, told(routes))).collect()
}

/// Every engine of every route, with every reason.
pub(in crate::cli) fn plan_json(plan: &Plan) -> Value {
    let route = |r: &std::sync::Arc<RoutePlan>| {
        let refused: Vec<Value> = r
            .refused
            .iter()
            .map(|(engine, refusal)| json!({ "engine": engine, "reason": refusal.to_string() }))
            .collect();
        json!({
            "name": r.route.name.as_str(),
            "protocol": r.route.protocol.as_str(),
            "listen": r.route.listen.iter().map(views::listen).collect::<Vec<_>>(),
            "backends": r.route.backends.iter().map(|b| b.target.to_string()).collect::<Vec<_>>(),
            "balance": views::balance(r.route.balance),
            "engine": r.engine,
            "because": r.because(),
            "condition": r.condition(),
            "many_ports": r.many_ports(),
            "refused": refused,
        })
    };
    json!({ "routes": plan.routes().iter().map(route).collect::<Vec<_>>() })
}
