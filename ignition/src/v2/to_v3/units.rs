//! Units of systemd, and those of networkd, which are files.

use std::collections::HashMap;

use super::{Translator, copy, nodes::Written};
use crate::{
    data_url,
    node::{Map, Node},
    rules::{is_true, text},
};

const NETWORKD: &str = "/etc/systemd/network";
const NETWORKD_MODE: i64 = 0o644;

impl Translator<'_> {
    pub(super) fn systemd(&mut self) -> Map {
        let mut units: Vec<Unit> = Vec::new();
        let mut by_name: HashMap<&str, usize> = HashMap::new();
        for item in self.list("systemd", "units") {
            let index = *by_name.entry(text(item, "name")).or_insert_with(|| {
                units.push(Unit::default());
                units.len() - 1
            });
            if let Some(unit) = units.get_mut(index) {
                unit.add(item);
            }
        }
        let mut out = Map::new();
        if !units.is_empty() {
            let units: Vec<Node> = units.into_iter().map(Unit::into_node).collect();
            out.insert("units", Node::ours(units));
        }
        out
    }

    pub(super) fn networkd(&mut self) {
        for unit in self.list("networkd", "units") {
            let path = format!("{NETWORKD}/{}", text(unit, "name"));
            self.networkd_file(unit, &path);
            for dropin in unit.get("dropins").map(Node::items).unwrap_or_default() {
                self.networkd_file(dropin, &format!("{path}.d/{}", text(dropin, "name")));
            }
        }
    }

    /// Without contents nothing is written.
    fn networkd_file(&mut self, unit: &Node, path: &str) {
        let Some(contents) = unit.get("contents").filter(|node| node.as_text() != Some("")) else {
            return;
        };
        let url = data_url::percent(contents.as_text().unwrap_or_default().as_bytes());
        let name = unit.get("name").unwrap_or(unit);
        let file = Map::from([
            ("path", Node::at(name.position, path)),
            ("overwrite", Node::at(unit.position, true)),
            (
                "contents",
                Node::at(
                    contents.position,
                    Map::from([("source", Node::at(contents.position, url))]),
                ),
            ),
            ("mode", Node::at(unit.position, NETWORKD_MODE)),
        ]);
        self.put(path, Written::Whole(file));
    }
}

/// What all entries of a unit say together: each is written over what those before it wrote.
#[derive(Default)]
struct Unit {
    fields: Map,
    dropins: Vec<Map>,
    dropins_by_name: HashMap<String, usize>,
    first: Option<Node>,
}

impl Unit {
    fn add(&mut self, item: &Node) {
        copy(item, &mut self.fields, &["name", "contents"]);
        if is_true(item, "mask") {
            copy(item, &mut self.fields, &["mask"]);
        }
        // Of several presets systemd takes the first; `enabled` took the place of `enable`.
        if self.fields.get("enabled").is_none() {
            copy(item, &mut self.fields, &["enabled"]);
            if self.fields.get("enabled").is_none()
                && is_true(item, "enable")
                && let Some(enable) = item.get("enable")
            {
                self.fields.insert("enabled", enable.clone());
            }
        }
        for dropin in item.get("dropins").map(Node::items).unwrap_or_default() {
            let index = *self
                .dropins_by_name
                .entry(text(dropin, "name").to_owned())
                .or_insert_with(|| {
                    self.dropins.push(Map::new());
                    self.dropins.len() - 1
                });
            if let Some(known) = self.dropins.get_mut(index) {
                copy(dropin, known, &["name", "contents"]);
            }
        }
        self.first.get_or_insert_with(|| Node::at(item.position, Map::new()));
    }

    fn into_node(mut self) -> Node {
        if !self.dropins.is_empty() {
            let dropins: Vec<Node> = self.dropins.into_iter().map(Node::ours).collect();
            self.fields.insert("dropins", Node::ours(dropins));
        }
        Node::at(self.first.and_then(|first| first.position), self.fields)
    }
}
