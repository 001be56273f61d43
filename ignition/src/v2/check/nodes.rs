//! Files, directories and links.

use std::collections::HashSet;

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{self, at, int, is_true, text},
};

impl Check<'_> {
    pub(super) fn nodes(&mut self, root: &Node) {
        let Some(storage) = root.get("storage") else { return };
        let place = Place::ROOT.key("storage");
        let mut filesystems = HashSet::from(["root"]);
        let defined = storage.get("filesystems").map(Node::items).unwrap_or_default();
        filesystems.extend(defined.iter().map(|filesystem| text(filesystem, "name")));
        for list in ["directories", "files", "links"] {
            let place = place.key(list);
            for (index, node) in storage
                .get(list)
                .map(Node::items)
                .unwrap_or_default()
                .iter()
                .enumerate()
            {
                let place = place.index(index);
                self.node(node, &place, &filesystems);
                if list != "links" {
                    self.mode(node, &place);
                }
                if list == "files" {
                    self.file(node, &place);
                }
            }
        }
    }

    fn node(&mut self, node: &Node, place: &Place<'_>, filesystems: &HashSet<&str>) {
        let path = rules::absolute(text(node, "path"));
        self.expect(at(node, "path"), &place.key("path"), path);
        let filesystem = text(node, "filesystem");
        let (told, place_of_filesystem) = (at(node, "filesystem"), place.key("filesystem"));
        if filesystem.is_empty() {
            let message = "is missing: root is the filesystem that is always there";
            self.report.error(told, &place_of_filesystem, message);
        } else if !filesystems.contains(filesystem) {
            let message = "there is no such filesystem here; one that an appended configuration has would do";
            self.report.warning(told, &place_of_filesystem, message);
        }
        for key in ["user", "group"] {
            if let Some(owner) = node.get(key)
                && int(owner, "id").is_some()
                && !text(owner, "name").is_empty()
            {
                let message = "is said by id and by name; one of them is expected";
                self.report.error(owner, &place.key(key), message);
            }
        }
    }

    fn mode(&mut self, node: &Node, place: &Place<'_>) {
        let told = at(node, "mode");
        let place = place.key("mode");
        match int(node, "mode") {
            Some(mode) => self.expect(told, &place, rules::mode(mode)),
            // Before 2.2 Ignition said nothing of it.
            None if self.minor >= 2 => {
                let message = "is missing, which means 0: nobody but root can read it";
                self.report.warning(told, &place, message);
            }
            None => {}
        }
    }

    fn file(&mut self, node: &Node, place: &Place<'_>) {
        if is_true(node, "append") && is_true(node, "overwrite") {
            let message = "what is appended to cannot be overwritten";
            self.report.error(at(node, "append"), &place.key("append"), message);
        }
        if let Some(contents) = node.get("contents") {
            self.fetched(contents, &place.key("contents"));
        }
    }
}
