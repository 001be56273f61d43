//! The users and groups of a tree.

use std::collections::BTreeMap;
use std::fs;

use serde_json::Value;

use crate::tree::Tree;

/// The tree's users and groups, by name.
pub(crate) struct Accounts {
    pub(crate) users: BTreeMap<String, Line>,
    pub(crate) groups: BTreeMap<String, Line>,
    pub(crate) passwords: BTreeMap<String, Line>,
    pub(crate) group_passwords: BTreeMap<String, Line>,
}

impl Accounts {
    pub(crate) fn of(tree: &Tree) -> Self {
        let read = |path: &str| -> BTreeMap<String, Line> {
            let text = fs::read_to_string(tree.at(path)).unwrap_or_default();
            text.lines()
                .map(|line| Line(line.split(':').map(str::to_owned).collect()))
                .map(|line| (line.field(0).to_owned(), line))
                .collect()
        };
        Self {
            users: read("/etc/passwd"),
            groups: read("/etc/group"),
            passwords: read("/etc/shadow"),
            group_passwords: read("/etc/gshadow"),
        }
    }

    /// The id that `{"id": …}` or `{"name": …}` means; root's without either.
    pub(crate) fn id(names: &BTreeMap<String, Line>, said: &Value) -> Option<u32> {
        if let Some(id) = said.get("id").and_then(Value::as_u64) {
            return u32::try_from(id).ok();
        }
        match said.get("name").and_then(Value::as_str).filter(|name| !name.is_empty()) {
            Some(name) => names.get(name).and_then(|line| u32::try_from(line.number(2)).ok()),
            None => Some(0),
        }
    }
}

/// A line of `passwd` and its kin.
#[derive(Debug, Clone)]
pub(crate) struct Line(Vec<String>);

impl Line {
    pub(crate) fn field(&self, index: usize) -> &str {
        self.0.get(index).map_or("", String::as_str)
    }

    pub(crate) fn number(&self, index: usize) -> u64 {
        self.field(index).parse().unwrap_or(u64::MAX)
    }
}
