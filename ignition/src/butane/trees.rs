//! `storage.trees`: whatever is below a local directory becomes files, links and, where an owner or a mode is given for
//! them, directories.

use std::collections::HashMap;

use super::{items, local, local::Local, text};
use crate::{
    data_url,
    files::TreeEntryKind,
    gzip::Packer,
    node::{Map, Node, Value},
    report::{Place, Report},
};

/// Takes the trees out of the user's tree.
pub(super) fn take(source: &mut Node) -> Option<Node> {
    let storage = source.as_map_mut()?.get_mut("storage")?;
    storage.as_map_mut()?.remove("trees")
}

/// Adds what is in the trees to a tree of Ignition.
pub(super) fn translate(
    trees: &Node,
    root: &mut Node,
    local: &mut Local<'_>,
    packer: &mut Packer,
    report: &mut Report,
) {
    let known = KINDS.map(|kind| paths(root, kind));
    let Some(root) = root.as_map_mut() else { return };
    let mut planter = Planter {
        storage: root.map_mut("storage"),
        known,
        local,
        packer,
    };
    let storage = Place::ROOT.key("storage");
    let place = storage.key("trees");
    for (index, tree) in trees.items().iter().enumerate() {
        let place = place.index(index);
        let Some(directory) = text(tree, "local") else {
            report.error(tree, &place, "local is missing: the directory whose contents are meant");
            continue;
        };
        if let Err(why) = planter.tree(tree, directory, &place, report) {
            report.error(tree, &place, why);
        }
    }
}

const FILES: usize = 0;
const DIRECTORIES: usize = 1;
const LINKS: usize = 2;
const KINDS: [&str; 3] = ["files", "directories", "links"];

/// Where in its list each path is.
fn paths(root: &Node, kind: &str) -> HashMap<String, usize> {
    let nodes = items(root, &["storage", kind]).iter().enumerate();
    nodes
        .filter_map(|(index, node)| Some((node.text("path")?.to_owned(), index)))
        .collect()
}

struct Planter<'a, 'f> {
    storage: &'a mut Map,
    known: [HashMap<String, usize>; 3],
    local: &'a mut Local<'f>,
    packer: &'a mut Packer,
}

impl Planter<'_, '_> {
    fn tree(&mut self, tree: &Node, directory: &str, place: &Place<'_>, report: &mut Report) -> Result<(), String> {
        let directory = local::below(directory)?;
        let entries = self.local.walk(&directory)?;
        let top = text(tree, "path").unwrap_or("/");
        self.directory(tree, join(top, ""))
            .unwrap_or_else(|why| report.error(tree, place, why));
        for entry in entries {
            let path = join(top, &entry.path);
            let planted = match entry.kind {
                TreeEntryKind::Directory => self.directory(tree, path),
                TreeEntryKind::File { executable } => {
                    let source = if directory.is_empty() {
                        entry.path
                    } else {
                        format!("{directory}/{}", entry.path)
                    };
                    self.file(tree, path, &source, executable)
                }
                TreeEntryKind::Link { target } => self.link(tree, path, target),
                TreeEntryKind::Other => Err(format!(
                    "{}: a tree has files, directories and symbolic links, and this is none",
                    entry.path
                )),
            };
            planted.unwrap_or_else(|why| report.error(tree, place, why));
        }
        Ok(())
    }

    /// Directories come by themselves, as root's and 0755, unless something else is said of them.
    fn directory(&mut self, tree: &Node, path: String) -> Result<(), String> {
        let mode = tree.get("dir_mode").cloned();
        if mode.is_none() && owner(tree).next().is_none() {
            return Ok(());
        }
        let node = self.add(DIRECTORIES, tree, path)?;
        node.insert("mode", mode.unwrap_or_else(|| Node::at(tree.position, 0o755)));
        Ok(())
    }

    /// A file that the user names keeps what he says of it, and gets the contents if it has none.
    fn file(&mut self, tree: &Node, path: String, source: &str, executable: bool) -> Result<(), String> {
        let has_contents = |file: &Map| {
            let contents = file.get("contents");
            contents.is_some_and(|contents| text(contents, "source").is_some())
        };
        match self.find(FILES, &path) {
            Some(file) if has_contents(file) => return Err(taken(&path)),
            Some(_) => {}
            None => {
                self.add(FILES, tree, path.clone())?;
            }
        }
        let bytes = self.local.contents(source)?;
        let at = tree.position;
        let compressed_already = self.find(FILES, &path).is_some_and(|file| {
            let contents = file.get("contents");
            contents.is_some_and(|contents| text(contents, "compression").is_some())
        });
        let packer = (!compressed_already).then_some(&mut *self.packer);
        let (url, compressed) = data_url::shortest(&bytes, packer);
        let Some(file) = self.find(FILES, &path) else {
            return Ok(());
        };
        let contents = file.map_mut("contents");
        contents.insert("source", Node::at(at, url));
        if !compressed_already {
            contents.insert("compression", super::resource::compression(compressed, tree));
        }
        if file.get("mode").is_none() {
            let usual = if executable { 0o755 } else { 0o644 };
            let mode = tree.get("file_mode").cloned();
            file.insert("mode", mode.unwrap_or_else(|| Node::at(at, usual)));
        }
        Ok(())
    }

    /// A link that the user names keeps what he says of it, and gets the target if it has none.
    fn link(&mut self, tree: &Node, path: String, target: String) -> Result<(), String> {
        let at = tree.position;
        let link = match self.find(LINKS, &path) {
            Some(link)
                if link
                    .get("target")
                    .and_then(Node::as_text)
                    .is_some_and(|text| !text.is_empty()) =>
            {
                return Err(taken(&path));
            }
            Some(_) => self.find(LINKS, &path).ok_or_else(|| taken(&path))?,
            None => self.add(LINKS, tree, path)?,
        };
        link.insert("target", Node::at(at, target));
        Ok(())
    }

    fn find(&mut self, kind: usize, path: &str) -> Option<&mut Map> {
        let index = *self.known.get(kind)?.get(path)?;
        let list = self.storage.get_mut(KINDS.get(kind)?)?;
        list.as_list_mut()?.get_mut(index)?.as_map_mut()
    }

    /// A new node with the tree's owner.
    ///
    /// # Errors
    /// When the path is taken.
    fn add(&mut self, kind: usize, tree: &Node, path: String) -> Result<&mut Map, String> {
        if self.known.iter().any(|known| known.contains_key(&path)) {
            return Err(taken(&path));
        }
        let mut node = Map::from([("path", Node::at(tree.position, path.clone()))]);
        for (key, owner) in owner(tree) {
            node.insert(key, owner.clone());
        }
        let list = self.storage.list_mut(KINDS.get(kind).copied().unwrap_or_default());
        if let Some(known) = self.known.get_mut(kind) {
            known.insert(path.clone(), list.len());
        }
        list.push(Node::at(tree.position, node));
        self.find(kind, &path).ok_or_else(|| taken(&path))
    }
}

fn taken(path: &str) -> String {
    format!("{path} is there already, with contents or as something else")
}

/// What the tree says of the owner of its files.
fn owner(tree: &Node) -> impl Iterator<Item = (&'static str, &Node)> {
    ["user", "group"].into_iter().filter_map(|key| {
        let owner = tree.get(key)?;
        let says_something = matches!(&owner.value, Value::Map(map) if !map.is_empty());
        says_something.then_some((key, owner))
    })
}

/// One path below another, without `.`, `..` and doubled slashes.
fn join(top: &str, path: &str) -> String {
    let absolute = top.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in top.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if absolute => {}
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (absolute, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("/", "a/b", "/a/b")]
    #[case("/etc/", "a", "/etc/a")]
    #[case("/etc/../usr//", "", "/usr")]
    #[case("/..", "", "/")]
    #[case("etc", "a", "etc/a")]
    #[case("..", "a", "../a")]
    fn paths_are_joined(#[case] top: &str, #[case] path: &str, #[case] joined: &str) {
        assert_eq!(join(top, path), joined);
    }
}
