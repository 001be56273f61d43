//! Files, directories and links.

use std::collections::HashSet;

use super::Check;
use crate::{
    node::{Node, Value},
    report::Place,
    rules::{self, Key, Once, at, int, is_true, text},
};

const LISTS: [&str; 3] = ["directories", "files", "links"];

impl Check<'_> {
    pub(super) fn nodes(&mut self, root: &Node) {
        let Some(storage) = root.get("storage") else { return };
        let place = Place::ROOT.key("storage");
        let links = paths(storage, "links");
        let directories = paths(storage, "directories");
        let units = unit_paths(root);
        for list in LISTS {
            let place = place.key(list);
            for (index, node) in storage
                .get(list)
                .map(Node::items)
                .unwrap_or_default()
                .iter()
                .enumerate()
            {
                let place = place.index(index);
                self.path(node, &place, &links, &units);
                self.owner(node, "user", &place);
                self.owner(node, "group", &place);
                match list {
                    "files" => self.file(node, &place),
                    "links" => self.link(node, &place, &directories),
                    _ => self.mode(node, &place),
                }
            }
        }
        let mut once = Once::new(self.report);
        for list in LISTS {
            once.list(storage.get(list), &place.key(list), Key::Name("path"));
        }
    }

    fn path(&mut self, node: &Node, place: &Place<'_>, links: &HashSet<&str>, units: &HashSet<String>) {
        let path = text(node, "path");
        let told = at(node, "path");
        let place = place.key("path");
        self.expect(told, &place, rules::absolute_and_clean(path));
        if let Some(link) = parents(path).find(|parent| links.contains(parent)) {
            let link = rules::shortened(link);
            let message = format!("goes through {link}, a link of this configuration: name the place that it leads to");
            self.report.error(told, &place, message);
        }
        if units.contains(path) {
            let message = "is written by a unit or drop-in of this configuration already";
            self.report.error(told, &place, message);
        }
    }

    fn owner(&mut self, node: &Node, key: &str, place: &Place<'_>) {
        if let Some(owner) = node.get(key)
            && int(owner, "id").is_some()
            && !text(owner, "name").is_empty()
        {
            let message = "is said by id and by name; one of them is expected";
            self.report.error(owner, &place.key(key), message);
        }
    }

    fn file(&mut self, node: &Node, place: &Place<'_>) {
        self.mode(node, place);
        if is_true(node, "overwrite") && node.find(&["contents", "source"]).is_none() {
            let message = "there is nothing to overwrite it with: `contents.source` is missing";
            self.report
                .error(at(node, "overwrite"), &place.key("overwrite"), message);
        }
        if let Some(contents) = node.get("contents") {
            self.resource(contents, &place.key("contents"));
        }
        let place = place.key("append");
        for (index, item) in node
            .get("append")
            .map(Node::items)
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            self.resource(item, &place.index(index));
        }
    }

    fn mode(&mut self, node: &Node, place: &Place<'_>) {
        let Some(mode) = int(node, "mode") else { return };
        let told = at(node, "mode");
        let place = place.key("mode");
        self.expect(told, &place, rules::mode(mode));
        if self.minor < 6 && mode & 0o7000 != 0 {
            let message = "setuid, setgid and sticky bits are not set before 3.6.0";
            self.report.warning(told, &place, message);
        }
    }

    fn link(&mut self, node: &Node, place: &Place<'_>, directories: &HashSet<&str>) {
        let target = text(node, "target");
        if target.is_empty() && self.minor >= 3 {
            self.report
                .error(at(node, "target"), &place.key("target"), "is missing");
            return;
        }
        if !is_true(node, "hard") {
            return;
        }
        let target = if target.starts_with('/') {
            rules::clean(target)
        } else {
            rules::clean(&format!("{}/{target}", text(node, "path")))
        };
        if directories.contains(target.as_str()) {
            let message = "a hard link cannot lead to a directory";
            self.report.error(at(node, "target"), &place.key("target"), message);
        }
        for key in ["user", "group"] {
            if let Some(owner) = node
                .get(key)
                .filter(|owner| **owner != Node::ours(Value::Map(Default::default())))
            {
                let message = "a hard link has the owner of what it leads to";
                self.report.warning(owner, &place.key(key), message);
            }
        }
    }
}

fn paths<'a>(storage: &'a Node, list: &str) -> HashSet<&'a str> {
    let items = storage.get(list).map(Node::items).unwrap_or_default();
    items.iter().filter_map(|item| item.text("path")).collect()
}

/// The directories that a path leads through, the innermost first. Paths that no kernel takes have none.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    const PATH_MAX: usize = 4096;
    let path = if path.len() <= PATH_MAX { path } else { "" };
    path.char_indices()
        .rev()
        .filter(|(index, c)| *c == '/' && *index > 0)
        .map(|(index, _)| &path[..index])
}

/// What systemd's units of the configuration are written to.
fn unit_paths(root: &Node) -> HashSet<String> {
    let mut paths = HashSet::new();
    let units = root.find(&["systemd", "units"]).map(Node::items).unwrap_or_default();
    for unit in units {
        let path = format!("/etc/systemd/system/{}", text(unit, "name"));
        for dropin in unit.get("dropins").map(Node::items).unwrap_or_default() {
            if !text(dropin, "contents").is_empty() {
                paths.insert(format!("{path}.d/{}", text(dropin, "name")));
            }
        }
        if !text(unit, "contents").is_empty() {
            paths.insert(path);
        }
    }
    paths
}
