//! From ct's names to Ignition's: `wipe_table` is `wipeTable`, and what says nothing is left out.

use crate::node::{Map, Node, Value};

/// Keys whose zero is not the same as nothing, and the key of the map or list that they are in.
const KEPT: &[(&str, &str)] = &[
    ("timeouts", "http_response_headers"),
    ("timeouts", "http_total"),
    ("filesystems", "path"),
    ("mount", "label"),
    ("mount", "uuid"),
    ("files", "mode"),
    ("files", "overwrite"),
    ("directories", "mode"),
    ("directories", "overwrite"),
    ("links", "overwrite"),
    ("user", "id"),
    ("group", "id"),
    ("units", "enabled"),
    ("users", "password_hash"),
    ("users", "uid"),
    ("create", "uid"),
    ("groups", "gid"),
];

/// The tree in Ignition's names; `name` is the key that it is at.
pub(super) fn renamed(node: Node, name: &str) -> Node {
    let value = match node.value {
        Value::Map(map) => {
            let mut out = Map::new();
            for (key, place, value) in map.into_entries() {
                if !is_nothing(&value.value) || KEPT.contains(&(name, &key)) {
                    out.push(&camel_case(&key), place, renamed(value, &key));
                }
            }
            out.into()
        }
        Value::List(items) => items
            .into_iter()
            .map(|item| renamed(item, name))
            .collect::<Vec<_>>()
            .into(),
        other => other,
    };
    Node::at(node.position, value)
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) | Value::Int(0) => true,
        Value::Text(text) => text.is_empty(),
        Value::List(items) => items.is_empty(),
        _ => false,
    }
}

fn camel_case(key: &str) -> String {
    let mut name = String::with_capacity(key.len());
    for (index, word) in key.split('_').enumerate() {
        let mut chars = word.chars();
        match chars.next() {
            Some(first) if index > 0 => name.push(first.to_ascii_uppercase()),
            Some(first) => name.push(first),
            None => {}
        }
        name.push_str(chars.as_str());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::Report, text};

    #[test]
    fn what_says_nothing_is_left_out() {
        let text = r#"{"mount": {"label": "", "wipe_filesystem": false, "device": "", "options": [], "create": {}}}"#;
        let node = text::parse_json(text, &mut Report::default()).unwrap();
        assert_eq!(
            renamed(node, "filesystems").to_json(),
            r#"{"mount":{"label":"","create":{}}}"#
        );
    }

    #[rstest::rstest]
    #[case("ssh_authorized_keys", "sshAuthorizedKeys")]
    #[case("http_total", "httpTotal")]
    #[case("path", "path")]
    fn names(#[case] from: &str, #[case] to: &str) {
        assert_eq!(camel_case(from), to);
    }
}
