//! Keys as Ignition calls them, and nothing that says nothing.

use crate::node::{Map, Node, Value};

/// The tree with the keys of Ignition. Empty maps and lists say nothing and are left out, elements of lists excepted.
pub(super) fn ignition(node: Node) -> Node {
    const OURS: [&str; 3] = ["variant", "version", "with_mount_unit"];
    let position = node.position;
    match node.value {
        Value::Map(map) => {
            let mut named = Map::new();
            for (key, place, value) in map.into_entries() {
                let value = ignition(value);
                if !OURS.contains(&key.as_str()) && !says_nothing(&key, &value) {
                    named.push(&camel(&key), place, value);
                }
            }
            Node::at(position, named)
        }
        Value::List(items) => Node::at(position, items.into_iter().map(ignition).collect::<Vec<_>>()),
        _ => node,
    }
}

fn says_nothing(key: &str, node: &Node) -> bool {
    match &node.value {
        Value::Null => true,
        Value::List(items) => items.is_empty(),
        Value::Map(map) => map.is_empty(),
        // A partition's number, which is the next free one then.
        Value::Int(0) => key == "number",
        _ => false,
    }
}

/// `home_dir` is `homeDir`, `size_mib` is `sizeMiB`.
fn camel(key: &str) -> String {
    let (stem, unit) = match key.strip_suffix("_mib") {
        Some(stem) => (stem, "MiB"),
        None => (key, ""),
    };
    let mut name = String::with_capacity(key.len());
    for (index, word) in stem.split('_').enumerate() {
        let mut letters = word.chars();
        match letters.next() {
            Some(first) if index > 0 => {
                name.push(first.to_ascii_uppercase());
                name.push_str(letters.as_str());
            }
            _ => name.push_str(word),
        }
    }
    name + unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::Report, text};

    #[rstest::rstest]
    #[case("path", "path")]
    #[case("http_response_headers", "httpResponseHeaders")]
    #[case("start_mib", "startMiB")]
    #[case("type_guid", "typeGuid")]
    fn keys(#[case] butane: &str, #[case] ignition: &str) {
        assert_eq!(camel(butane), ignition);
    }

    #[test]
    fn what_says_nothing_is_left_out() {
        let text = r#"{"a_b": {"c": {"d": []}}, "e": [{}], "number": 0, "f": "", "variant": "fcos"}"#;
        let node = text::parse_json(text, &mut Report::default()).unwrap();
        assert_eq!(ignition(node).to_json(), r#"{"e":[{}],"f":""}"#);
    }
}
