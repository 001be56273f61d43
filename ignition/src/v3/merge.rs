//! One configuration over another.

use std::collections::{HashMap, HashSet};

use super::LANGUAGE;
use crate::{
    node::{Map, Node},
    rules::{int, text},
    shape::{Field, Shape},
};

/// The child over the parent, as Ignition merges what `ignition.config.merge` names
/// (<https://coreos.github.io/ignition/operator-notes/>): a value of the child's wins, sections are merged key by key, and so
/// are elements of lists that have the same key, which keep the parent's place; the child's other elements follow. Files,
/// directories and links share their paths: a child's replaces a parent's of another kind. `append` of files, `options` of
/// filesystems, arrays and encrypted devices, and `mountOptions` are one after the other. A header without a value takes the
/// parent's away.
pub(crate) fn merge(parent: &Node, child: &Node) -> Node {
    fields(parent, child, LANGUAGE.fields)
}

fn fields(parent: &Node, child: &Node, fields: &[Field]) -> Node {
    let (Some(parents), Some(children)) = (parent.as_map(), child.as_map()) else {
        return child.clone();
    };
    let mut merged = Map::new();
    for field in fields {
        let value = match (parents.get(field.name), children.get(field.name)) {
            (Some(parent), Some(child)) => Some(value(field, parent, child, children)),
            (Some(parent), None) => Some(match field.shape {
                Shape::List(_) => list(field, parent, None, children),
                _ => parent.clone(),
            }),
            (None, child) => child.cloned(),
        };
        if let Some(value) = value {
            merged.push(field.name, None, value);
        }
    }
    Node::at(child.position.or(parent.position), merged)
}

fn value(field: &Field, parent: &Node, child: &Node, children: &Map) -> Node {
    match field.shape {
        Shape::Struct(keys) => fields(parent, child, keys),
        Shape::List(_) => list(field, parent, Some(child), children),
        _ => child.clone(),
    }
}

fn list(field: &Field, parent: &Node, child: Option<&Node>, children: &Map) -> Node {
    let position = child.and_then(|child| child.position).or(parent.position);
    let added = child.map(Node::items).unwrap_or_default();
    if ["append", "options", "mountOptions"].contains(&field.name) {
        let items: Vec<Node> = parent.items().iter().chain(added).cloned().collect();
        return Node::at(position, items);
    }
    let key = |item: &Node| key(field, item);
    let by_key: HashMap<String, &Node> = added.iter().map(|item| (key(item), item)).collect();
    // Keys that the child has in lists that share them with this one.
    let elsewhere: HashSet<String> = share(field.name)
        .unwrap_or_default()
        .iter()
        .filter(|name| **name != field.name)
        .flat_map(|name| children.get(name).map(Node::items).unwrap_or_default())
        .map(key)
        .collect();
    let mut items = Vec::with_capacity(parent.items().len() + added.len());
    let mut known = HashSet::new();
    for item in parent.items() {
        let key = key(item);
        match by_key.get(&key) {
            Some(child) if field.name == "httpHeaders" && child.get("value").is_none() => {}
            Some(child) => items.push(match field.shape {
                Shape::List(Shape::Struct(keys)) => fields(item, child, keys),
                _ => (*child).clone(),
            }),
            None if elsewhere.contains(&key) => {}
            None => items.push(item.clone()),
        }
        known.insert(key);
    }
    items.extend(added.iter().filter(|item| !known.contains(&key(item))).cloned());
    Node::at(position, items)
}

/// The lists that share their keys with this one, if it shares them.
fn share(name: &str) -> Option<&'static [&'static str]> {
    const NODES: &[&str] = &["directories", "files", "links"];
    const ARGUMENTS: &[&str] = &["shouldExist", "shouldNotExist"];
    [NODES, ARGUMENTS].into_iter().find(|lists| lists.contains(&name))
}

/// What makes an element of a list the same as another.
fn key(field: &Field, item: &Node) -> String {
    if let Some(text) = item.as_text() {
        return text.to_owned();
    }
    let name = match field.name {
        "partitions" => {
            return match (int(item, "number").unwrap_or(0), item.text("label")) {
                (0, Some(label)) => format!("label:{label}"),
                (0, None) => String::new(),
                (number, _) => format!("number:{number}"),
            };
        }
        "merge" | "certificateAuthorities" => "source",
        "directories" | "files" | "links" => "path",
        "disks" | "filesystems" => "device",
        "tang" => "url",
        _ => "name",
    };
    text(item, name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::Report, text};
    use rstest::rstest;

    fn tree(json: &str) -> Node {
        text::parse_json(json, &mut Report::default()).unwrap()
    }

    #[rstest]
    #[case::a_value_of_the_child_wins(
        r#"{"storage":{"files":[{"path":"/a","mode":1,"contents":{"source":"data:,a","compression":"gzip"}}]}}"#,
        r#"{"storage":{"files":[{"path":"/a","contents":{"source":"data:,b"}}]}}"#,
        r#"{"storage":{"files":[{"path":"/a","contents":{"compression":"gzip","source":"data:,b"},"mode":1}]}}"#
    )]
    #[case::elements_keep_the_parents_place(
        r#"{"systemd":{"units":[{"name":"a"},{"name":"b"}]}}"#,
        r#"{"systemd":{"units":[{"name":"c"},{"name":"a","mask":true}]}}"#,
        r#"{"systemd":{"units":[{"mask":true,"name":"a"},{"name":"b"},{"name":"c"}]}}"#
    )]
    #[case::nodes_share_their_paths(
        r#"{"storage":{"directories":[{"path":"/a"},{"path":"/b"}],"files":[{"path":"/c"}]}}"#,
        r#"{"storage":{"files":[{"path":"/b"}],"links":[{"path":"/c"}]}}"#,
        r#"{"storage":{"directories":[{"path":"/a"}],"files":[{"path":"/b"}],"links":[{"path":"/c"}]}}"#
    )]
    #[case::arguments_share_theirs(
        r#"{"kernelArguments":{"shouldExist":["a","b"],"shouldNotExist":["c"]}}"#,
        r#"{"kernelArguments":{"shouldExist":["c"],"shouldNotExist":["a"]}}"#,
        r#"{"kernelArguments":{"shouldExist":["b","c"],"shouldNotExist":["a"]}}"#
    )]
    #[case::appends_and_options_are_both(
        r#"{"storage":{"files":[{"path":"/a","append":[{"source":"data:,a"}]}],"raid":[{"name":"r","options":["a"]}]}}"#,
        r#"{"storage":{"files":[{"path":"/a","append":[{"source":"data:,a"}]}],"raid":[{"name":"r","options":["a"]}]}}"#,
        r#"{"storage":{"files":[{"path":"/a","append":[{"source":"data:,a"},{"source":"data:,a"}]}],"raid":[{"name":"r","options":["a","a"]}]}}"#
    )]
    #[case::a_header_without_a_value_is_taken_away(
        r#"{"ignition":{"config":{"replace":{"source":"u","httpHeaders":[{"name":"A","value":"1"},{"name":"B","value":"2"}]}}}}"#,
        r#"{"ignition":{"config":{"replace":{"httpHeaders":[{"name":"A"}]}}}}"#,
        r#"{"ignition":{"config":{"replace":{"httpHeaders":[{"name":"B","value":"2"}],"source":"u"}}}}"#
    )]
    #[case::partitions_are_known_by_number_or_label(
        r#"{"storage":{"disks":[{"device":"d","partitions":[{"number":1,"label":"a"},{"label":"b"}]}]}}"#,
        r#"{"storage":{"disks":[{"device":"d","partitions":[{"label":"b","sizeMiB":1},{"number":1,"sizeMiB":2}]}]}}"#,
        r#"{"storage":{"disks":[{"device":"d","partitions":[{"label":"a","number":1,"sizeMiB":2},{"label":"b","sizeMiB":1}]}]}}"#
    )]
    #[case::tang_servers_are_known_by_their_urls(
        r#"{"storage":{"luks":[{"clevis":{"tang":[{"thumbprint":"1","url":"a"}],"tpm2":true},"name":"l"}]}}"#,
        r#"{"storage":{"luks":[{"clevis":{"tang":[{"url":"b"},{"thumbprint":"2","url":"a"}]},"name":"l"}]}}"#,
        r#"{"storage":{"luks":[{"clevis":{"tang":[{"thumbprint":"2","url":"a"},{"url":"b"}],"tpm2":true},"name":"l"}]}}"#
    )]
    #[case::lists_of_texts_are_sets(
        r#"{"passwd":{"users":[{"groups":["a","b"],"name":"u","shouldExist":true}]}}"#,
        r#"{"passwd":{"users":[{"groups":["c","a"],"name":"u"}]}}"#,
        r#"{"passwd":{"users":[{"groups":["a","b","c"],"name":"u","shouldExist":true}]}}"#
    )]
    fn the_child_is_merged_over_the_parent(#[case] parent: &str, #[case] child: &str, #[case] expected: &str) {
        assert_eq!(merge(&tree(parent), &tree(child)).to_json(), expected);
    }
}
