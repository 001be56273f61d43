//! Users.

use super::Check;
use crate::{
    node::{Node, Value},
    report::Place,
    rules::{at, text},
};

impl Check<'_> {
    pub(super) fn passwd(&mut self, root: &Node) {
        let place = Place::ROOT.key("passwd");
        for list in ["groups", "users"] {
            let place = place.key(list);
            let items = root.find(&["passwd", list]).map(Node::items).unwrap_or_default();
            for (index, item) in items.iter().enumerate() {
                let place = place.index(index);
                // Ignition accepts it, and fails when it calls useradd.
                if text(item, "name").is_empty() {
                    self.report.warning(item, &place.key("name"), "is missing");
                }
                if let Some(create) = item.get("create").filter(|_| self.minor >= 1) {
                    self.create(item, create, &place);
                }
            }
        }
    }

    /// The way of 2.0 to say how a user is to be created.
    fn create(&mut self, user: &Node, create: &Node, place: &Place<'_>) {
        let message = "`create` is the way of 2.0.0: its keys can be the user's own";
        self.report.warning(create, &place.key("create"), message);
        let says = |key: &str| match user.get(key).map(|node| &node.value) {
            Some(Value::Text(text)) => !text.is_empty(),
            Some(Value::Bool(value)) => *value,
            Some(Value::List(items)) => !items.is_empty(),
            Some(_) => true,
            None => false,
        };
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
        for key in KEYS.into_iter().filter(|key| says(key)) {
            let message = "cannot be with `create`, which it belongs into";
            self.report.error(at(user, key), &place.key(key), message);
        }
    }
}
