//! Files, directories and links.

use std::collections::HashMap;

use super::{Translator, copy};
use crate::{
    node::{Map, Node},
    report::Place,
    rules::{self, is_false, is_true, text},
};

/// An entry of a file.
pub(super) enum Written {
    Whole(Map),
    /// What is appended, beside the file's own keys.
    Appended(Map, Node),
}

impl Translator<'_> {
    /// Nodes in `storage` beside files; they know where filesystems are mounted.
    pub(super) fn directories_and_links(&mut self, mounts: &HashMap<&str, Option<String>>, storage: &mut Map) {
        for list in ["directories", "links"] {
            let place = Place::ROOT.key("storage");
            let place = place.key(list);
            let mut out: Vec<Node> = Vec::new();
            let mut by_path: HashMap<String, usize> = HashMap::new();
            for (index, item) in self.list("storage", list).iter().enumerate() {
                let Some((path, mut node)) = self.node(item, mounts, &place.index(index)) else {
                    continue;
                };
                copy(item, &mut node, &["overwrite", "target", "hard", "mode"]);
                if list == "directories" && node.get("mode").is_none() {
                    node.insert("mode", Node::at(item.position, 0));
                }
                let node = Node::at(item.position, node);
                // A directory is made, or only its mode and owner set.
                match by_path.get(&path).and_then(|known| out.get_mut(*known)) {
                    Some(known) if list == "directories" || is_true(item, "overwrite") => *known = node,
                    _ => {
                        by_path.insert(path, out.len());
                        out.push(node);
                    }
                }
            }
            if !out.is_empty() {
                storage.insert(list, Node::ours(out));
            }
        }
    }

    pub(super) fn files(&mut self, mounts: &HashMap<&str, Option<String>>) {
        let place = Place::ROOT.key("storage");
        let place = place.key("files");
        for (index, item) in self.list("storage", "files").iter().enumerate() {
            let place = place.index(index);
            let Some((path, mut node)) = self.node(item, mounts, &place) else {
                continue;
            };
            copy(item, &mut node, &["mode"]);
            let contents = item.get("contents");
            let position = contents.and_then(|contents| contents.position).or(item.position);
            let contents = self.resource(contents, position);
            if is_true(item, "append") {
                self.put(&path, Written::Appended(node, contents));
                continue;
            }
            if is_false(item, "overwrite") && self.files_by_path.contains_key(&path) {
                let message = "another entry writes this file, and `overwrite` is false";
                self.refuse(rules::at(item, "overwrite"), &place.key("overwrite"), message);
                continue;
            }
            let overwrite = item.get("overwrite").cloned();
            node.insert("overwrite", overwrite.unwrap_or(Node::at(item.position, true)));
            node.insert("contents", contents);
            if node.get("mode").is_none() {
                node.insert("mode", Node::at(item.position, 0));
            }
            self.put(&path, Written::Whole(node));
        }
    }

    /// Puts a file beside the others, or over one of them.
    pub(super) fn put(&mut self, path: &str, written: Written) {
        let known = self.files_by_path.get(path).copied();
        let index = known.unwrap_or(self.files.len());
        self.files_by_path.insert(path.to_owned(), index);
        match (self.files.get_mut(index), written) {
            (Some(known), Written::Whole(file)) => *known = file,
            (Some(known), Written::Appended(file, contents)) => {
                for key in ["mode", "user", "group"] {
                    if let Some(node) = file.get(key) {
                        known.insert(key, node.clone());
                    }
                }
                known.list_mut("append").push(contents);
            }
            (None, Written::Whole(file)) => self.files.push(file),
            (None, Written::Appended(mut file, contents)) => {
                file.list_mut("append").push(contents);
                self.files.push(file);
            }
        }
    }

    /// What nodes of all kinds have; None where the place of its filesystem is not known.
    fn node(
        &mut self,
        item: &Node,
        mounts: &HashMap<&str, Option<String>>,
        place: &Place<'_>,
    ) -> Option<(String, Map)> {
        let filesystem = text(item, "filesystem");
        let told = rules::at(item, "filesystem");
        let place = place.key("filesystem");
        let begin = match mounts.get(filesystem) {
            Some(Some(begin)) => begin,
            Some(None) => {
                let message = "Ignition 3 has to know where this filesystem will be mounted, and no .mount unit of this \
                               configuration says it";
                self.refuse(told, &place, message);
                return None;
            }
            None => {
                let message = "there is no such filesystem, and Ignition 3 has to know where it will be mounted";
                self.refuse(told, &place, message);
                return None;
            }
        };
        let path = rules::clean(&format!("{begin}/{}", text(item, "path")));
        let mut out = Map::new();
        for key in ["group", "user"] {
            let Some(owner) = item.get(key) else { continue };
            let mut known = Map::new();
            copy(owner, &mut known, &["id", "name"]);
            if !known.is_empty() {
                out.insert(key, Node::at(owner.position, known));
            }
        }
        out.insert("path", Node::at(rules::at(item, "path").position, path.as_str()));
        Some((path, out))
    }
}
