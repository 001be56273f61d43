//! One configuration over another, as Ignition merges a child into its parent: what the child says wins, lists are unions by
//! key, and a path is one thing only. (Ignition's operator notes, "Config merging".)

use serde_json::{Map, Value};

use crate::{
    report::Report,
    v3::{Config, Version},
};

/// The keys of the lists whose elements are named. Elements of other lists are added to.
const KEYS: [(&str, &str); 12] = [
    ("ignition.security.tls.certificateAuthorities", "source"),
    ("passwd.groups", "name"),
    ("passwd.users", "name"),
    ("storage.directories", "path"),
    ("storage.disks", "device"),
    ("storage.files", "path"),
    ("storage.filesystems", "device"),
    ("storage.links", "path"),
    ("storage.luks", "name"),
    ("storage.raid", "name"),
    ("systemd.units", "name"),
    ("systemd.units.dropins", "name"),
];

/// `child` over `parent`, in the parent's version.
///
/// # Errors
/// When the child cannot be brought to the parent's version.
pub fn merge(parent: &Config, child: &Config) -> Result<Config, Report> {
    let versions: [Version; 1] = [parent.version()];
    let child = child.for_guest(&versions)?;
    let mut value = parent.value().clone();
    remove_replaced_paths(&mut value, child.value());
    merge_value(&mut value, child.value(), "");
    Ok(parent.with_value(value))
}

fn merge_value(parent: &mut Value, child: &Value, place: &str) {
    match (parent, child) {
        (Value::Object(parent), Value::Object(child)) => merge_object(parent, child, place),
        (Value::Array(parent), Value::Array(child)) => merge_list(parent, child, place),
        // Null says nothing.
        (_, Value::Null) => {}
        (parent, child) => *parent = child.clone(),
    }
}

fn merge_object(parent: &mut Map<String, Value>, child: &Map<String, Value>, place: &str) {
    for (key, value) in child {
        let place = if place.is_empty() {
            key.clone()
        } else {
            format!("{place}.{key}")
        };
        match parent.get_mut(key) {
            Some(existing) if !existing.is_null() => merge_value(existing, value, &place),
            _ => drop(parent.insert(key.clone(), value.clone())),
        }
    }
}

fn merge_list(parent: &mut Vec<Value>, child: &[Value], place: &str) {
    let key = KEYS.iter().find(|(list, _)| *list == place).map(|(_, key)| *key);
    for value in child {
        let same = |other: &Value| match key {
            Some(key) => other.get(key).is_some() && other.get(key) == value.get(key),
            None => other == value,
        };
        match parent.iter_mut().find(|other| same(other)) {
            Some(existing) if key.is_some() => merge_value(existing, value, place),
            Some(_) => {}
            None => parent.push(value.clone()),
        }
    }
}

/// A path that the child makes a file of is no directory or link any more, and so on.
fn remove_replaced_paths(parent: &mut Value, child: &Value) {
    const KINDS: [&str; 3] = ["directories", "files", "links"];
    let paths = |kind: &str| {
        let nodes = child.pointer(&format!("/storage/{kind}")).and_then(Value::as_array);
        nodes
            .into_iter()
            .flatten()
            .filter_map(|node| node.get("path").cloned())
            .collect::<Vec<_>>()
    };
    for kind in KINDS {
        let taken: Vec<Value> = KINDS
            .into_iter()
            .filter(|other| *other != kind)
            .flat_map(paths)
            .collect();
        if let Some(nodes) = parent
            .pointer_mut(&format!("/storage/{kind}"))
            .and_then(Value::as_array_mut)
        {
            nodes.retain(|node| node.get("path").is_none_or(|path| !taken.contains(path)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn config(mut rest: Value) -> Config {
        rest["ignition"] = json!({"version": "3.3.0"});
        Config::parse(&rest.to_string()).unwrap()
    }

    fn merged(parent: Value, child: Value) -> Value {
        merge(&config(parent), &config(child)).unwrap().value().clone()
    }

    #[test]
    fn the_child_wins_and_lists_are_unions() {
        let value = merged(
            json!({"systemd": {"units": [{"name": "a.service", "enabled": false, "contents": "old"}, {"name": "b.service"}]}}),
            json!({"systemd": {"units": [{"name": "a.service", "enabled": true}, {"name": "c.service"}]}}),
        );
        assert_eq!(
            value["systemd"]["units"],
            json!([{"name": "a.service", "enabled": true, "contents": "old"}, {"name": "b.service"}, {"name": "c.service"}])
        );
    }

    #[test]
    fn keys_of_a_user_add_up() {
        let user = |key: &str| json!({"passwd": {"users": [{"name": "core", "sshAuthorizedKeys": [key]}]}});
        let value = merged(user("one"), user("two"));
        assert_eq!(
            value["passwd"]["users"],
            json!([{"name": "core", "sshAuthorizedKeys": ["one", "two"]}])
        );
    }

    #[test]
    fn a_path_is_one_thing_only() {
        let value = merged(
            json!({"storage": {"directories": [{"path": "/a"}, {"path": "/b"}]}}),
            json!({"storage": {"files": [{"path": "/a"}]}}),
        );
        assert_eq!(
            value["storage"],
            json!({"directories": [{"path": "/b"}], "files": [{"path": "/a"}]})
        );
    }

    #[test]
    fn the_result_has_the_parents_version() {
        let child = Config::parse(r#"{"ignition":{"version":"3.0.0"},"storage":{"files":[{"path":"/a"}]}}"#).unwrap();
        assert_eq!(
            merge(&config(json!({})), &child).unwrap().version().to_string(),
            "3.3.0"
        );
    }

    proptest! {
        #[test]
        fn merging_again_changes_nothing(
            paths in proptest::collection::btree_set("/[a-d]{1,2}", 0..4),
            others in proptest::collection::btree_set("/[a-d]{1,2}", 0..4),
        ) {
            let files = |paths: &std::collections::BTreeSet<String>| {
                let nodes: Vec<Value> = paths.iter().map(|path| json!({"path": path, "mode": paths.len()})).collect();
                config(json!({"storage": {"files": nodes}}))
            };
            let once = merge(&files(&paths), &files(&others)).unwrap();
            let twice = merge(&once, &files(&others)).unwrap();
            prop_assert_eq!(&once, &twice);
            prop_assert_eq!(Config::parse(&once.to_json()).unwrap(), once);
        }
    }
}
