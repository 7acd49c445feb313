//! The JSON Schema of a site file, for editors, and the reference for people; both made from [`super::keys`].

use serde_json::{Map, Value, json};

use super::keys::{Key, Kind, SECRET, SITE, Shape};

/// Where this schema says it lives.
const ID: &str = "https://aquifer.invalid/schema/site/1";

/// The schema.
pub fn schema() -> Value {
    let mut schema = of_shape(&SITE);
    if let Some(object) = schema.as_object_mut() {
        object.insert("$schema".into(), json!("https://json-schema.org/draft/2020-12/schema"));
        object.insert("$id".into(), json!(ID));
        object.insert("title".into(), json!("Aquifer site file"));
    }
    schema
}

fn of_shape(shape: &Shape) -> Value {
    let properties: Map<String, Value> = shape.keys.iter().map(|key| (key.name.to_owned(), of_key(key))).collect();
    let required: Vec<&str> = shape.keys.iter().filter(|key| key.must).map(|key| key.name).collect();
    json!({
        "type": "object",
        "description": shape.doc,
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn of_key(key: &Key) -> Value {
    let mut value = of_kind(key.kind);
    if let Some(object) = value.as_object_mut() {
        object.insert("description".into(), json!(key.doc));
    }
    value
}

fn of_kind(kind: Kind) -> Value {
    let text = || json!({ "type": "string", "minLength": 1 });
    match kind {
        Kind::Text | Kind::Path => text(),
        Kind::Size => json!({ "type": "string", "pattern": "^[0-9.]+ ?(B|[KkMGT]|[KMGT]iB|[kKMGT]B)$" }),
        Kind::Rate => json!({ "type": "string", "pattern": "^(none|[0-9.]+ ?[kKMGT]?i?(B|bit)?/s)$" }),
        Kind::Duration => json!({ "type": "string", "pattern": "^[0-9.]+ ?(ms|s|m|min|h|d)$" }),
        Kind::Number(from, to) => json!({ "type": "integer", "minimum": from, "maximum": to }),
        Kind::Truth => json!({ "type": "boolean" }),
        Kind::OneOf(words) => json!({ "enum": words }),
        Kind::Texts => json!({ "type": "array", "items": text() }),
        Kind::TextMap => json!({ "type": "object", "additionalProperties": text() }),
        Kind::Table(shape) => of_shape(shape),
        Kind::Named(shape) => json!({ "type": "object", "additionalProperties": of_shape(shape) }),
        Kind::Tables(shape) => json!({ "type": "array", "items": of_shape(shape) }),
        Kind::NamedKinds(shapes) => {
            let shapes: Vec<Value> = shapes.iter().map(|shape| of_shape(shape)).collect();
            json!({ "type": "object", "additionalProperties": { "oneOf": shapes } })
        }
        Kind::Secret => {
            let mut secret = of_shape(&SECRET);
            if let Some(object) = secret.as_object_mut() {
                object.insert("minProperties".into(), json!(1));
                object.insert("maxProperties".into(), json!(1));
            }
            secret
        }
    }
}

/// The reference in Markdown: a table of keys for each table of the file.
pub fn reference() -> String {
    let mut out = String::new();
    let mut done = Vec::new();
    describe(&SITE, &mut out, &mut done);
    describe(&SECRET, &mut out, &mut done);
    out
}

fn describe(shape: &'static Shape, out: &mut String, done: &mut Vec<&'static str>) {
    if done.contains(&shape.name) {
        return;
    }
    done.push(shape.name);
    out.push_str(&format!("## {}\n\n{}\n\n| Key | Value | |\n|---|---|---|\n", shape.name, shape.doc));
    for key in shape.keys {
        let must = if key.must { ", required" } else { "" };
        out.push_str(&format!("| `{}` | {}{must} | {} |\n", key.name, in_words(key.kind), key.doc.replace('|', "\\|")));
    }
    out.push('\n');
    for key in shape.keys {
        match key.kind {
            Kind::Table(below) | Kind::Named(below) | Kind::Tables(below) => describe(below, out, done),
            Kind::NamedKinds(shapes) => shapes.iter().for_each(|below| describe(below, out, done)),
            _ => {}
        }
    }
}

fn in_words(kind: Kind) -> String {
    match kind {
        Kind::Text => "text".into(),
        Kind::Path => "path".into(),
        Kind::Size => "size".into(),
        Kind::Rate => "rate".into(),
        Kind::Duration => "duration".into(),
        Kind::Number(from, to) if from == to => from.to_string(),
        Kind::Number(from, to) => format!("{from} to {to}"),
        Kind::Truth => "true or false".into(),
        Kind::OneOf(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Kind::Texts => "list of texts".into(),
        Kind::TextMap => "name = text".into(),
        Kind::Table(shape) => format!("table, see {}", shape.name),
        Kind::Named(shape) => format!("tables by name, see {}", shape.name),
        Kind::Tables(shape) => format!("list of tables, see {}", shape.name),
        Kind::NamedKinds(shapes) => {
            let kinds: Vec<&str> = shapes.iter().map(|shape| shape.name).collect();
            format!("tables by name, kinds {}", kinds.join(", "))
        }
        Kind::Secret => "secret".into(),
    }
}
