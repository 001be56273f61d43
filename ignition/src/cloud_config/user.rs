//! Users, and the keys that they log in with.

use std::collections::HashMap;

use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
};

/// The user that every image has.
const CORE: &str = "core";

/// Keys of a user and what Ignition calls them. All but the first two are for a user that is made.
const NAMES: &[(&str, &str)] = &[
    ("passwd", "passwordHash"),
    ("ssh_authorized_keys", "sshAuthorizedKeys"),
    ("gecos", "gecos"),
    ("homedir", "homeDir"),
    ("no_create_home", "noCreateHome"),
    ("primary_group", "primaryGroup"),
    ("groups", "groups"),
    ("no_user_group", "noUserGroup"),
    ("system", "system"),
    ("no_log_init", "noLogInit"),
    ("shell", "shell"),
];

/// How many of [`NAMES`] a user has that is there already.
const OF_EXISTING: usize = 2;

/// The users that the document asks for.
pub(super) fn translate(root: &Node, report: &mut Report) -> Vec<Node> {
    let mut users: Vec<Map> = Vec::new();
    let mut by_name: HashMap<String, usize> = HashMap::new();
    let place = Place::ROOT.key("users");
    for (index, user) in root
        .get("users")
        .map(Node::items)
        .unwrap_or_default()
        .iter()
        .enumerate()
    {
        let place = place.index(index);
        let Some(name) = user.get("name").filter(|name| name.as_text() != Some("")) else {
            report.warning(user, &place, "has no name and is passed over");
            continue;
        };
        let key = name.as_text().unwrap_or_default();
        if by_name.contains_key(key) {
            report.error(name, &place.key("name"), "the user is there twice");
            continue;
        }
        by_name.insert(key.to_owned(), users.len());
        users.push(translate_user(user, name, &place, report));
    }
    if let Some(keys) = root.get("ssh_authorized_keys").filter(|keys| !keys.items().is_empty()) {
        let index = *by_name.entry(CORE.to_owned()).or_insert(users.len());
        if index == users.len() {
            users.push(Map::from([("name", Node::ours(CORE))]));
        }
        if let Some(user) = users.get_mut(index) {
            let list = user.list_mut("sshAuthorizedKeys");
            list.extend(keys.items().iter().cloned());
        }
    }
    users.into_iter().map(Node::ours).collect()
}

fn translate_user(user: &Node, name: &Node, place: &Place<'_>, report: &mut Report) -> Map {
    let mut out = Map::from([("name", name.clone())]);
    for (index, (key, ignition)) in NAMES.iter().enumerate() {
        let Some(node) = user.get(key).filter(|node| !is_nothing(&node.value)) else {
            continue;
        };
        if name.as_text() == Some(CORE) && index >= OF_EXISTING {
            let message = "is passed over: core is there already, and only its password and keys can be set";
            report.warning(node, &place.key(key), message);
        } else {
            out.insert(ignition, node.clone());
        }
    }
    out
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Text(text) => text.is_empty(),
        Value::List(items) => items.is_empty(),
        _ => false,
    }
}
