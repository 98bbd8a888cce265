use std::path::Path;

use super::*;

#[test]
fn smoke() {
    let text = std::fs::read_to_string("/tmp/smoke.toml").unwrap();
    match parse(&text, Path::new("/etc/shunt/shunt.toml")) {
        Ok(config) => println!("{config:#?}"),
        Err(problems) => println!("{problems}"),
    }
}
