//! Users and groups.

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{Key, text},
};

impl Check<'_> {
    pub(super) fn passwd(&mut self, root: &Node) {
        let Some(passwd) = root.get("passwd") else { return };
        let place = Place::ROOT.key("passwd");
        for list in ["groups", "users"] {
            let place = place.key(list);
            let items = passwd.get(list).map(Node::items).unwrap_or_default();
            for (index, item) in items.iter().enumerate() {
                let place = place.index(index);
                // Ignition accepts it, and fails when it calls useradd.
                if text(item, "name").is_empty() {
                    self.report.warning(item, &place.key("name"), "is missing");
                }
                for texts in ["groups", "sshAuthorizedKeys"] {
                    self.once(item.get(texts), &place.key(texts), Key::Itself);
                }
            }
            self.once(passwd.get(list), &place, Key::Name("name"));
        }
    }
}
