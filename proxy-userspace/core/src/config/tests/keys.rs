//! The schema, the parser and the manual know the same keys.

use serde_json::Value;

use super::{super::keys::*, *};

/// A file that holds `key = example` where `table` is, and one that is the same without that line.
fn with_and_without(table: &str, key: &Key) -> (String, String) {
    let line = format!("{} = {}\n", key.name, key.example);
    let required = |others: &[(&str, &str)]| {
        let lines =
            others.iter().filter(|(name, _)| *name != key.name).map(|(name, value)| format!("{name} = {value}\n"));
        lines.collect::<String>()
    };
    let plain = route_with("");
    let (before, others) = match table {
        "" if key.name == "route" => (String::new(), String::new()),
        "" => return (format!("{line}{plain}"), plain),
        "acme" => (format!("{plain}[acme]\n"), required(&[("directory", "\"https://ca.example/directory\"")])),
        "acme.eab" => {
            let key = if key.name == "key_id" { "hmac_key = \"AAAA\"\n" } else { "" };
            let before = format!("{plain}[acme]\ndirectory = \"https://ca.example/directory\"\n[acme.eab]\n");
            (before, format!("{}{key}", required(&[("key_id", "\"a\"")])))
        }
        "admin" | "log" | "kernel" => (format!("[{table}]\n"), String::new()),
        "defaults" => (format!("{plain}[{table}]\n"), String::new()),
        "route" => (
            "[[route]]\n".to_owned(),
            required(&[("name", "\"other\""), ("listen", "[\"0.0.0.0:81\"]"), ("backends", "[\"10.0.0.9:81\"]")]),
        ),
        "route.tls" if key.name != "mode" => {
            let others = required(&[("mode", "\"terminate\""), ("certificates", "[{ cert = \"a\", key = \"b\" }]")]);
            (format!("{plain}[{table}]\n"), others)
        }
        "route.tls" => (format!("{plain}[{table}]\ncertificates = [{{ cert = \"a\", key = \"b\" }}]\n"), String::new()),
        "route.backend_tls" => {
            let others = match key.name {
                "cert" => "key = \"b\"\n",
                "key" => "cert = \"a\"\n",
                _ => "",
            };
            (format!("{plain}[{table}]\n"), others.to_owned())
        }
        "route.backends" => (
            "[[route]]\nname = \"a\"\nlisten = [\"0.0.0.0:81\"]\n[[route.backends]]\n".to_owned(),
            required(&[("address", "\"a\"")]),
        ),
        "route.tls.certificates" => (
            format!("{plain}tls.mode = \"terminate\"\n[[route.tls.certificates]]\n"),
            required(&[("cert", "\"a\""), ("key", "\"b\"")]),
        ),
        _ => (format!("{plain}[{table}]\n"), String::new()),
    };
    (format!("{before}{others}{line}"), format!("{before}{others}"))
}

/// The tables of the file and the keys in each, as the schema has them.
fn tables_of_the_schema(path: &str, schema: &Value, found: &mut Vec<(String, Vec<String>)>) {
    let Some(properties) = schema["properties"].as_object() else { return };
    found.push((path.to_owned(), properties.keys().cloned().collect()));
    for (name, property) in properties {
        let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        let either = &property["anyOf"][1];
        for place in [property, &property["items"], &property["items"]["anyOf"][1], &either["items"]] {
            tables_of_the_schema(&below, place, found);
        }
    }
}

fn tables_of_the_parser(path: &str, table: &'static Table, found: &mut Vec<(String, &'static Table)>) {
    found.push((path.to_owned(), table));
    for key in table.keys.iter().filter(|key| key.name != "address") {
        if let Some(below) = key.kind.table() {
            let path = if path.is_empty() { key.name.to_owned() } else { format!("{path}.{}", key.name) };
            tables_of_the_parser(&path, below, found);
        }
    }
}

fn all_tables() -> Vec<(String, &'static Table)> {
    let mut tables = Vec::new();
    tables_of_the_parser("", &ROOT, &mut tables);
    tables
}

#[test]
fn the_schema_has_every_key_of_the_parser_and_no_other() {
    let mut found = Vec::new();
    tables_of_the_schema("", &schema(), &mut found);
    found.sort();
    let mut expected: Vec<(String, Vec<String>)> = all_tables()
        .into_iter()
        .map(|(path, table)| {
            let mut keys: Vec<String> = table.keys.iter().map(|key| key.name.to_owned()).collect();
            keys.sort();
            (path, keys)
        })
        .collect();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn every_key_makes_a_difference() {
    for (path, table) in all_tables() {
        for key in table.keys {
            let (with, without) = with_and_without(&path, key);
            let with_key = good(&with);
            if let Ok(without_key) = read(&without) {
                assert_ne!(with_key, without_key, "{path}.{} is accepted, but nothing reads it", key.name);
            }
        }
    }
}

#[test]
fn every_key_of_a_route_is_in_its_fingerprint() {
    let fingerprint = |config: &Config| config.routes.last().map(|route| route.fingerprint);
    for (path, table) in all_tables().into_iter().filter(|(path, _)| path.starts_with("route")) {
        for key in table.keys.iter().filter(|key| !key.required) {
            let (with, without) = with_and_without(&path, key);
            if let Ok(without) = read(&without) {
                assert_ne!(fingerprint(&good(&with)), fingerprint(&without), "{path}.{}", key.name);
            }
        }
    }
}

#[test]
fn every_default_is_what_an_absent_key_means() {
    for (path, table) in all_tables() {
        for key in table.keys {
            let Some(default) = key.default else { continue };
            let (_, without) = with_and_without(&path, key);
            if path == "route.tls" || path.is_empty() {
                continue;
            }
            let written = format!("{without}{} = {default}\n", key.name);
            assert_eq!(good(&written), good(&without), "{path}.{} = {default}", key.name);
        }
    }
}

#[test]
fn the_schema_is_of_the_draft_it_names_and_closed_everywhere() {
    fn closed(schema: &Value) -> bool {
        let own = schema["type"] != "object" || schema["additionalProperties"] == false;
        let below = match schema {
            Value::Object(object) => object.values().all(closed),
            Value::Array(array) => array.iter().all(closed),
            _ => true,
        };
        own && below
    }
    let schema = schema();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    assert!(closed(&schema));
    let idle = &schema["properties"]["route"]["items"]["properties"]["timeouts"]["properties"]["idle"];
    assert_eq!(idle["default"], "4h");
    assert_eq!(idle["type"], "string");
    assert_eq!(
        idle["description"],
        "Without a byte in either direction; 2m for a UDP route unless it or [defaults] says otherwise."
    );
}

/// Rows of the manual look like `| `key` | type | default | meaning |`, below a heading that names the table.
#[test]
fn the_manual_has_every_key_and_its_default() {
    let manual = include_str!("../../../../../docs/configuration.md");
    for (path, table) in all_tables() {
        let heading = match path.as_str() {
            "" => continue,
            "defaults.limits" | "defaults.timeouts" => path.replace("defaults", "[route") + "]",
            "route" | "route.backends" | "route.tls.certificates" => format!("[[{path}]]"),
            _ => format!("[{path}]"),
        };
        let section = manual
            .split("\n## ")
            .find(|section| section.lines().next().is_some_and(|line| line.contains(&format!("`{heading}`"))));
        let section = section.unwrap_or_else(|| panic!("docs/configuration.md has no heading `{heading}`"));
        for key in table.keys {
            let row = section.lines().find(|line| line.starts_with(&format!("| `{}` |", key.name)));
            let row = row.unwrap_or_else(|| panic!("docs/configuration.md: {heading} lacks {}", key.name));
            if let Some(default) = key.default {
                assert!(
                    row.contains(&format!("`{default}`")),
                    "docs/configuration.md: {heading} {}: its default is {default}",
                    key.name
                );
            }
        }
    }
}
