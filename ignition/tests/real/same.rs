//! Whether two configurations mean the same, whatever their bytes: how a `data:` URL is escaped or compressed, and whether an
//! empty list is said or left out, makes no difference.

use serde_json::{Map, Value, json};

use crate::contents::contents_of;

/// Every place where two configurations differ in what they mean, as sentences; empty if nowhere.
pub(crate) fn differences(expected: &str, there: &str) -> Vec<String> {
    let read = |which: &str, text: &str| -> Result<Value, String> {
        serde_json::from_str(text)
            .map(plain)
            .map_err(|error| format!("{which} is not JSON: {error}"))
    };
    match (read("what is expected", expected), read("what is there", there)) {
        (Ok(expected), Ok(there)) => {
            let mut found = Vec::new();
            compare("$", &expected, &there, &mut found);
            found
        }
        (one, other) => [one.err(), other.err()].into_iter().flatten().collect(),
    }
}

fn compare(path: &str, expected: &Value, there: &Value, found: &mut Vec<String>) {
    match (expected, there) {
        (Value::Object(one), Value::Object(other)) => {
            let keys: std::collections::BTreeSet<_> = one.keys().chain(other.keys()).collect();
            for key in keys {
                let side = |object: &Map<String, Value>| object.get(key).cloned().unwrap_or_default();
                compare(&format!("{path}.{key}"), &side(one), &side(other), found);
            }
        }
        (Value::Array(one), Value::Array(other)) => {
            for index in 0..one.len().max(other.len()) {
                let side = |list: &[Value]| list.get(index).cloned().unwrap_or_default();
                compare(&format!("{path}.{index}"), &side(one), &side(other), found);
            }
        }
        (one, other) if one == other => {}
        (one, other) => found.push(format!("{path}: expected {one:.300}, there is {other:.300}")),
    }
}

/// Without what says nothing, and with contents in place of their URLs.
fn plain(value: Value) -> Value {
    match value {
        Value::Object(object) => {
            let mut object: Map<_, _> = object.into_iter().map(|(key, value)| (key, plain(value))).collect();
            object.retain(|key, value| !(says_nothing(value) || key == "compression" && value == ""));
            resource(object)
        }
        Value::Array(list) => Value::Array(list.into_iter().map(plain).collect()),
        other => other,
    }
}

fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(object) => object.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

fn resource(mut object: Map<String, Value>) -> Value {
    let is_data = object
        .get("source")
        .and_then(Value::as_str)
        .is_some_and(|source| source.starts_with("data:"));
    // A hash in `verification` is of what comes out of the compression.
    if is_data && let Ok(bytes) = contents_of(&Value::Object(object.clone())) {
        object.remove("compression");
        object.insert(
            "source".to_owned(),
            json!({ "holds": String::from_utf8_lossy(&bytes), "bytes": bytes.len() }),
        );
    }
    Value::Object(object)
}
