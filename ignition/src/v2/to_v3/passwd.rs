//! Users and groups.

use std::collections::HashSet;

use super::{Translator, copy};
use crate::node::{Map, Node};

/// What `create` has, and users have themselves since 2.1.
const KEYS: [&str; 10] = [
    "gecos",
    "groups",
    "homeDir",
    "noCreateHome",
    "noLogInit",
    "noUserGroup",
    "primaryGroup",
    "shell",
    "system",
    "uid",
];

impl Translator<'_> {
    pub(super) fn passwd(&mut self) -> Map {
        let mut out = Map::new();
        let groups: Vec<Node> = self.list("passwd", "groups").iter().map(group).collect();
        let users: Vec<Node> = self.list("passwd", "users").iter().map(user).collect();
        for (key, list) in [("groups", groups), ("users", users)] {
            if !list.is_empty() {
                out.insert(key, Node::ours(list));
            }
        }
        out
    }
}

fn group(group: &Node) -> Node {
    let mut out = Map::new();
    copy(group, &mut out, &["gid", "name", "passwordHash", "system"]);
    Node::at(group.position, out)
}

fn user(user: &Node) -> Node {
    let mut out = Map::new();
    copy(user, &mut out, &["name"]);
    // An empty one is a password that anybody knows; nothing is another thing.
    if let Some(hash) = user.get("passwordHash") {
        out.insert("passwordHash", hash.clone());
    }
    copy(user, &mut out, &["sshAuthorizedKeys"]);
    copy(user, &mut out, &KEYS);
    if let Some(create) = user.get("create") {
        copy(create, &mut out, &KEYS);
    }
    for key in ["groups", "sshAuthorizedKeys"] {
        // Twice the same says no more than once, but version 3 refuses it.
        if let Some(items) = out.get_mut(key).and_then(Node::as_list_mut) {
            let mut seen = HashSet::new();
            items.retain(|item| item.as_text().is_none_or(|text| seen.insert(text.to_owned())));
        }
    }
    Node::at(user.position, out)
}
