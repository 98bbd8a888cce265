//! temporary
use proxy_core::{capability::Capabilities, config, config::Engine, plan::plan, ruleset::Endpoint};
use proxy_userspace::stream::*;
use std::sync::Arc;
use tokio::sync::mpsc;
fn main() {
    let file = std::env::args().nth(1).unwrap();
    let engine = std::env::args().nth(2).unwrap();
    let text = std::fs::read_to_string(&file).unwrap();
    let config = config::parse(&text, std::path::Path::new(&file)).unwrap();
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    rt.block_on(async {
        let (ended, mut rx) = mpsc::channel(1024);
        let (drained, _d) = mpsc::channel(16);
        let (failed_dials, _f) = mpsc::channel(16);
        let mut path = StreamPath::start(Options { workers: 2, failed_dials, drained, ended }).unwrap();
        let planned = plan(&config, &Capabilities::all());
        let mut change = Change::default();
        for (i, r) in planned.routes().iter().enumerate() {
            let mut route = (**r).clone();
            route.engine = Some(if engine == "copy" { Engine::Copy } else { Engine::Splice });
            let endpoints = route
                .route
                .backends
                .iter()
                .map(|b| match &b.target {
                    config::Target::Address { ip, port } => Endpoint { address: *ip, port: *port, weight: 1, up: true },
                    _ => panic!(),
                })
                .collect();
            for l in &route.route.listen {
                change.ports.push((*l, vec![i as u32 + 1]));
            }
            change.routes.push(RouteSpec { id: i as u32 + 1, plan: Arc::new(route), endpoints });
        }
        let p = path.prepare(change).unwrap();
        path.commit(p);
        while let Some(_) = rx.recv().await {}
    });
}
