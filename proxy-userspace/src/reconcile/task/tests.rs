use proxy_core::{capability::Capabilities, flow::RouteTable};

use super::*;
use crate::{
    kernel::nft::MemoryNft,
    stream::memory::MemoryStreams,
    track::{Clock, Input},
};

fn config(text: &str) -> Config {
    config::parse(text, Path::new("/shunt.toml")).expect("valid")
}

fn route(name: &str, port: u16, idle: u16) -> String {
    format!(
        "[[route]]\nname = \"{name}\"\nlisten = [\"10.0.0.1:{port}\"]\nbackends = [\"10.0.1.1:80\"]\n\
         timeouts = {{ idle = \"{idle}s\" }}\n"
    )
}

/// What the flow table knows after it has heard all that was sent.
fn heard(inputs: &mut mpsc::Receiver<Input>, known: &mut RouteTable) {
    while let Ok(input) = inputs.try_recv() {
        if let Input::Change { routes, gone } = input {
            known.extend(routes);
            known.retain(|id, _| !gone.contains(id));
        }
    }
}

#[tokio::test]
async fn a_reload_the_kernel_refuses_leaves_the_flow_table_with_the_routes_it_had() {
    let (sender, mut inputs) = mpsc::channel(8);
    let mut track = Announcer::new(Some(sender), Clock::start(), true);
    let (nft, streams) = (Some(MemoryNft::new()), MemoryStreams::default());
    let first = config(&route("web", 80, 60));
    let (mut reconciler, found) =
        Reconciler::open(nft, streams, first, Capabilities::all(), Instant::now()).expect("opened");
    track.announce(&found.serves).await;
    reconciler.install(&found).expect("installed");
    let mut before = RouteTable::new();
    heard(&mut inputs, &mut before);

    reconciler.nft.as_mut().expect("there").fail_next(NftError::LostAnswers);
    let next = config(&(route("web", 80, 90) + &route("new", 81, 60)));
    let prepared = reconciler.prepare(next.clone()).expect("sound");
    serve(&mut reconciler, &mut track, prepared).await.expect_err("the kernel refuses");
    let mut after = before.clone();
    heard(&mut inputs, &mut after);
    assert_eq!(after, before);

    let prepared = reconciler.prepare(next).expect("sound");
    serve(&mut reconciler, &mut track, prepared).await.expect("the kernel takes it now");
    heard(&mut inputs, &mut after);
    assert_eq!(after.len(), 2);
}
