fn main(){ let m = proxy_core::flow::MarkLayout::new(proxy_core::config::MarkMask::DEFAULT); print!("{}", proxy_core::ruleset::print(&proxy_core::ruleset::skeleton(m))); }
