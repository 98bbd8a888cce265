//! The JSON Schema of the configuration file, for editors.

use serde_json::{Map, Value, json};
use toml::de::DeValue;

use super::keys::{BACKEND, CERTIFICATE, Key, Kind, ROOT, Table};

/// A JSON Schema (draft 2020-12) of the configuration file, with descriptions, ranges, defaults and examples.
///
/// What no schema can say is left to [`super::parse`]: whether routes can be told apart, and keys that need each other.
pub fn schema() -> Value {
    let mut schema = table(&ROOT);
    if let Some(object) = schema.as_object_mut() {
        object.insert("$schema".to_owned(), json!("https://json-schema.org/draft/2020-12/schema"));
        object.insert("title".to_owned(), json!("shunt.toml"));
    }
    schema
}

fn table(table: &Table) -> Value {
    let properties: Map<String, Value> = table.keys.iter().map(|key| (key.name.to_owned(), property(key))).collect();
    let required: Vec<&str> = table.keys.iter().filter(|key| key.required).map(|key| key.name).collect();
    let mut schema = json!({
        "description": table.doc,
        "type": "object",
        "properties": properties,
        "additionalProperties": false,
    });
    if let (Some(object), false) = (schema.as_object_mut(), required.is_empty()) {
        object.insert("required".to_owned(), json!(required));
    }
    schema
}

fn property(key: &Key) -> Value {
    let mut schema = kind(key.kind);
    if let Some(object) = schema.as_object_mut() {
        object.insert("description".to_owned(), json!(key.doc));
        object.insert("examples".to_owned(), json!([literal(key.example)]));
        if let Some(default) = key.default {
            object.insert("default".to_owned(), literal(default));
        }
    }
    // At least one listen address and one backend; every other list may be empty.
    if let (Some(object), true, Kind::List(_)) = (schema.as_object_mut(), key.required, key.kind) {
        object.insert("minItems".to_owned(), json!(1));
    }
    schema
}

fn kind(kind: Kind) -> Value {
    let pattern = |pattern: &str| json!({ "type": "string", "pattern": pattern });
    match kind {
        Kind::Bool => json!({ "type": "boolean" }),
        Kind::Integer { min, max } => json!({ "type": "integer", "minimum": min, "maximum": max }),
        Kind::Duration { never: false, .. } => pattern("^([0-9]+(ms|s|m|h|d))+$"),
        Kind::Duration { never: true, .. } => pattern("^(([0-9]+(ms|s|m|h|d))+|never)$"),
        Kind::Choice(names) => json!({ "enum": names }),
        Kind::Rate => json!({ "anyOf": [pattern("^([0-9]+/(second|minute|hour)|0)$"), { "const": 0 }] }),
        Kind::AdminListen => pattern("^(.+:[0-9]+|off)$"),
        Kind::MarkMask => json!({ "anyOf": [
            pattern("^(0[xX][0-9a-fA-F]{1,8}|[0-9]+)$"),
            { "type": "integer", "minimum": 0xff, "maximum": u32::MAX },
        ] }),
        Kind::RouteName => pattern("^[a-z0-9-]{1,63}$"),
        Kind::Listen => pattern("^.+:[0-9]+(-[0-9]+)?$"),
        Kind::Backend => json!({ "anyOf": [{ "type": "string", "minLength": 1 }, table(&BACKEND)] }),
        Kind::Network => pattern("^[0-9a-fA-F:.]+(/[0-9]+)?$"),
        Kind::Alpn => json!({ "type": "string", "minLength": 1, "maxLength": 255 }),
        Kind::Directory => pattern("^https://.+"),
        Kind::Contact => pattern("^mailto:.+@.+"),
        Kind::Secret => pattern("^[A-Za-z0-9_-]+=*$"),
        Kind::Certificates => {
            json!({ "anyOf": [{ "const": "acme" }, { "type": "array", "items": table(&CERTIFICATE) }] })
        }
        Kind::LogFilter | Kind::Target | Kind::Sni | Kind::ServerName | Kind::File | Kind::KeyId => {
            json!({ "type": "string", "minLength": 1 })
        }
        Kind::List(item) => json!({ "type": "array", "items": self::kind(*item), "uniqueItems": true }),
        Kind::Table(below) => table(below),
        Kind::Tables(below) => json!({ "type": "array", "items": table(below) }),
    }
}

/// The JSON of a value written as TOML.
fn literal(toml: &str) -> Value {
    DeValue::parse(toml).map_or(Value::Null, |value| json(value.get_ref()))
}

fn json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => json!(text),
        DeValue::Integer(integer) => json!(i64::from_str_radix(integer.as_str(), integer.radix()).ok()),
        DeValue::Float(float) => json!(float.as_str().parse::<f64>().ok()),
        DeValue::Boolean(boolean) => json!(boolean),
        DeValue::Datetime(datetime) => json!(datetime.to_string()),
        DeValue::Array(array) => array.iter().map(|item| json(item.get_ref())).collect(),
        DeValue::Table(table) => {
            Value::Object(table.iter().map(|(key, value)| (key.get_ref().to_string(), json(value.get_ref()))).collect())
        }
    }
}
