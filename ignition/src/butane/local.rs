//! The files that `local` and its kin name.

use crate::{
    files::{Bounded, Files, TreeEntry},
    node::Node,
    report::{Place, Report},
};

pub(super) struct Local<'a> {
    files: Bounded<'a>,
}

impl<'a> Local<'a> {
    pub(super) fn new(files: &'a dyn Files) -> Self {
        let files = Bounded::new(files);
        Self { files }
    }

    /// The contents of the file whose path the node is.
    pub(super) fn read(&mut self, node: &Node, place: &Place<'_>, report: &mut Report) -> Option<Vec<u8>> {
        let path = node.as_text()?;
        let read = below(path).and_then(|path| self.contents(&path));
        read.map_err(|why| report.error(node, place, why)).ok()
    }

    /// As [`Self::read`], for what has to be text.
    pub(super) fn read_text(&mut self, node: &Node, place: &Place<'_>, report: &mut Report) -> Option<String> {
        let bytes = self.read(node, place, report)?;
        let text = String::from_utf8(bytes);
        text.map_err(|_| report.error(node, place, "the file is no text in UTF-8"))
            .ok()
    }

    /// The contents of a file at a path that [`below`] has made.
    pub(super) fn contents(&mut self, path: &str) -> Result<Vec<u8>, String> {
        self.files.read(path).map_err(|why| format!("{path}: {why}"))
    }

    /// Everything below a directory, in the order in which a walk through it meets it.
    pub(super) fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        let mut entries = self.files.walk(path).map_err(|why| format!("{path}: {why}"))?;
        entries.sort_by(|one, other| one.path.split('/').cmp(other.path.split('/')));
        Ok(entries)
    }
}

/// A path below the directory of local files, without `.`, `..` and doubled slashes. One that begins with a slash begins at
/// that directory.
///
/// # Errors
/// When it climbs out.
pub(super) fn below(path: &str) -> Result<String, String> {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                if parts.pop().is_none() {
                    return Err(format!("{path:?} is outside of the directory of local files"));
                }
            }
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("a/b", Some("a/b"))]
    #[case("./a//b/../c", Some("a/c"))]
    #[case("/a", Some("a"))]
    #[case("", Some(""))]
    #[case("..", None)]
    #[case("a/../../a", None)]
    #[case("/../a", None)]
    fn paths_stay_below(#[case] path: &str, #[case] expected: Option<&str>) {
        assert_eq!(below(path).ok().as_deref(), expected);
    }
}
