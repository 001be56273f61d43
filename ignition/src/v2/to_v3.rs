//! Version 2 in the words of version 3.

mod nodes;
mod passwd;
mod storage;
mod units;

use std::collections::HashMap;

use crate::{
    node::{Map, Node, Position, Value},
    report::{Place, Report},
    rules::text,
    transpile::Translation,
    version::Version,
};

/// The same in Ignition 3.0, or in 3.1 if it has proxies or headers, which 3.0 has not. Whatever else version 2 can say, 3.0
/// can, so that the outcome fits the oldest guest; newer minors take it over as it is. What differs between the two is
/// written out:
/// - A node's `filesystem` becomes the begin of its path: of `root` it is `/`, of one with `path` what follows `/sysroot`, of
///   one with `mount` where a `.mount` unit of the configuration mounts its device. (Version 2 needed not know.)
/// - A file is overwritten unless it says otherwise; one without a mode has mode 0; with `append` its contents are an element
///   of `append`. Of several entries of one file the last wins, and appends follow.
/// - networkd's units are files under `/etc/systemd/network`.
/// - `create` of a user or filesystem is taken apart into the keys that took its place, `enable` is `enabled`. Several entries
///   of one unit are one.
/// - Partitions measured in sectors (of 512 bytes) are measured in MiB.
/// - `ignition.config.append` is `merge`. What it fetches has to be of version 3 then.
///
/// Where there is no such way (a source `oem://`, a filesystem that nobody says the place of, a size that is no whole MiB) the
/// field is named in the report; so is what version 3 alone refuses, when the outcome is checked.
pub(crate) fn to_v3(root: &Node, report: &mut Report) -> Translation {
    let mut translator = Translator {
        root,
        report,
        needs_3_1: false,
        files: Vec::new(),
        files_by_path: HashMap::new(),
    };
    let mut out = Map::new();
    let sections = [
        ("ignition", translator.ignition()),
        ("passwd", translator.passwd()),
        ("storage", translator.storage()),
        ("systemd", translator.systemd()),
    ];
    for (key, section) in sections {
        if !section.is_empty() {
            out.insert(key, Node::at(root.get(key).and_then(|node| node.position), section));
        }
    }
    let minor = u8::from(translator.needs_3_1);
    (Version::v3(minor), Node::at(root.position, out))
}

struct Translator<'a> {
    root: &'a Node,
    report: &'a mut Report,
    needs_3_1: bool,
    files: Vec<Map>,
    files_by_path: HashMap<String, usize>,
}

impl<'a> Translator<'a> {
    /// The elements of a list of a section.
    fn list(&self, section: &str, list: &str) -> &'a [Node] {
        let root: &'a Node = self.root;
        root.find(&[section, list]).map(Node::items).unwrap_or_default()
    }

    fn ignition(&mut self) -> Map {
        let mut out = Map::new();
        let root: &'a Node = self.root;
        let Some(ignition) = root.get("ignition") else {
            return out;
        };
        if let Some(config) = ignition.get("config") {
            let mut translated = Map::new();
            if let Some(list) = config.get("append") {
                translated.insert("merge", self.resources(list));
            }
            if let Some(replace) = config
                .get("replace")
                .filter(|replace| !text(replace, "source").is_empty())
            {
                let replace = self.resource(Some(replace), replace.position);
                translated.insert("replace", replace);
            }
            out.insert("config", Node::at(config.position, translated));
        }
        if let Some(proxy) = ignition.get("proxy") {
            let mut translated = Map::new();
            copy(proxy, &mut translated, &["httpProxy", "httpsProxy", "noProxy"]);
            self.needs_3_1 |= !translated.is_empty();
            out.insert("proxy", Node::at(proxy.position, translated));
        }
        if let Some(list) = ignition.find(&["security", "tls", "certificateAuthorities"]) {
            let authorities = Map::from([("certificateAuthorities", self.resources(list))]);
            out.insert("security", Node::ours(Map::from([("tls", Node::ours(authorities))])));
        }
        copy(ignition, &mut out, &["timeouts"]);
        out
    }

    /// Of several things to fetch, those that are something: version 2 passes over an empty source.
    fn resources(&mut self, list: &Node) -> Node {
        let items = list.items().iter().filter(|item| !text(item, "source").is_empty());
        let items: Vec<Node> = items.map(|item| self.resource(Some(item), item.position)).collect();
        Node::at(list.position, items)
    }

    /// Something that is fetched; without a source it is empty.
    fn resource(&mut self, node: Option<&Node>, position: Option<Position>) -> Node {
        let mut out = Map::new();
        if let Some(node) = node {
            copy(
                node,
                &mut out,
                &["compression", "httpHeaders", "source", "verification"],
            );
        }
        self.needs_3_1 |= out.get("httpHeaders").is_some();
        if out.get("source").is_none() {
            out.insert("source", Node::at(position, ""));
        }
        Node::at(position, out)
    }

    fn refuse(&mut self, node: &Node, place: &Place<'_>, message: impl Into<String>) {
        self.report.error(node, place, message);
    }
}

/// Takes over keys that mean the same; a text or list that is empty means that nothing is said.
fn copy(from: &Node, to: &mut Map, keys: &[&str]) {
    for key in keys {
        if let Some(node) = from.get(key).filter(|node| says_something(node)) {
            to.insert(key, node.clone());
        }
    }
}

fn says_something(node: &Node) -> bool {
    match &node.value {
        Value::Null => false,
        Value::Text(text) => !text.is_empty(),
        Value::List(items) => !items.is_empty(),
        Value::Map(map) => !map.is_empty(),
        _ => true,
    }
}

#[cfg(test)]
mod tests;
