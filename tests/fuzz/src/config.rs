//! The text of a configuration file: what is wrong with it can be said; what is right can be planned and printed.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use proxy_core::{capability::Capabilities, config, config::Config, flow::MarkLayout, plan::plan, ruleset::print};

fuzz_target!(|text: &str| {
    match config::parse(text, Path::new("/etc/shunt/shunt.toml")) {
        Ok(config) => carry_out(&config),
        Err(problems) => drop(problems.to_string()),
    }
});

fn carry_out(config: &Config) {
    let nothing = Capabilities { ipv6: false, nft_nat: false, ..Capabilities::all() };
    for capabilities in [Capabilities::all(), nothing] {
        let plan = plan(config, &capabilities);
        assert_eq!(plan.routes().len(), config.routes.len());
        plan.unserved().iter().for_each(|unserved| drop(unserved.to_string()));
        plan.routes().iter().for_each(|route| drop(route.because()));
        let layout = MarkLayout::new(config.kernel.mark_mask);
        drop(print(&plan.preview(layout, &[]).ruleset()));
    }
}
