//! What both majors of Ignition ask of single values: paths, URLs, hashes, unit files, GUIDs.

pub(crate) mod contents;
pub(crate) mod unit;
pub(crate) mod url;

use std::collections::HashSet;

use crate::{
    node::{Node, Value},
    report::{Place, Report},
};

/// The node of a key, or the map that misses it: the nearest thing that has a position.
pub(crate) fn at<'a>(node: &'a Node, key: &str) -> &'a Node {
    node.get(key).unwrap_or(node)
}

/// The text of a key; empty where there is none.
pub(crate) fn text<'a>(node: &'a Node, key: &str) -> &'a str {
    node.text(key).unwrap_or_default()
}

/// Whether the key is there and true.
pub(crate) fn is_true(node: &Node, key: &str) -> bool {
    node.get(key).and_then(Node::as_bool).unwrap_or(false)
}

/// Whether the key is there and false.
pub(crate) fn is_false(node: &Node, key: &str) -> bool {
    node.get(key).and_then(Node::as_bool) == Some(false)
}

/// The number of a key, where there is one.
pub(crate) fn int(node: &Node, key: &str) -> Option<i64> {
    node.get(key)?.as_int()
}

/// A path without `//`, `.`, `..` and a slash at the end; `..` at the root stays there.
pub(crate) fn clean(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if path.starts_with('/') || parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (path.starts_with('/'), joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

/// # Errors
/// When the path is not absolute.
pub(crate) fn absolute(path: &str) -> Result<(), String> {
    if path.starts_with('/') {
        Ok(())
    } else if path.is_empty() {
        Err("a path is expected, which begins with /".to_owned())
    } else {
        Err("has to be absolute: a path that begins with /".to_owned())
    }
}

/// # Errors
/// When the path is not absolute, or says what it says in a roundabout way.
pub(crate) fn absolute_and_clean(path: &str) -> Result<(), String> {
    absolute(path)?;
    let clean = clean(path);
    if clean == path {
        Ok(())
    } else {
        Err(format!("is not in its simplest form, which is {clean}"))
    }
}

/// # Errors
/// When permissions have bits beyond 07777.
pub(crate) fn mode(mode: i64) -> Result<(), String> {
    if (0..=0o7777).contains(&mode) {
        Ok(())
    } else {
        Err(format!(
            "is no mode: 0 to 4095 (octal 7777) is expected, and JSON's numbers are decimal: {} is {}",
            "octal 644", 0o644
        ))
    }
}

/// # Errors
/// When the text is neither empty nor a GUID.
pub(crate) fn guid(text: &str) -> Result<(), String> {
    let groups: Vec<&str> = text.split('-').collect();
    let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    let digits = text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    if text.is_empty() || (digits && lengths == [8, 4, 4, 4, 12]) {
        Ok(())
    } else {
        Err("is no GUID such as 01234567-89AB-CDEF-EDCB-A98765432101".to_owned())
    }
}

/// # Errors
/// When a filesystem of the format cannot have so long a label.
pub(crate) fn filesystem_label(format: &str, label: &str) -> Result<(), String> {
    let longest = match format {
        "ext4" => 16,
        "btrfs" => 256,
        "xfs" => 12,
        "swap" => 15,
        "vfat" => 11,
        _ => return Ok(()),
    };
    if label.len() <= longest {
        Ok(())
    } else {
        Err(format!("is too long: a label of {format} has at most {longest} bytes"))
    }
}

/// Longest label of a GPT partition, in bytes.
pub(crate) const PARTITION_LABEL_MAX: usize = 36;

/// # Errors
/// When `mdadm` knows no such level, or it has no use for the spares.
pub(crate) fn raid_level(level: &str, spares: Option<i64>) -> Result<(), String> {
    match level {
        "linear" | "raid0" | "0" | "stripe" => {
            if spares.unwrap_or(0) == 0 {
                Ok(())
            } else {
                Err(format!("arrays of level {level} have no spares"))
            }
        }
        "raid1" | "1" | "mirror" | "raid4" | "4" | "raid5" | "5" | "raid6" | "6" | "raid10" | "10" => Ok(()),
        "" => Err("is missing: linear, raid0, raid1, raid4, raid5, raid6 or raid10 is expected".to_owned()),
        _ => Err("is no level: linear, raid0, raid1, raid4, raid5, raid6 or raid10 is expected".to_owned()),
    }
}

/// Which of the partitions share room with another: places in the list of those that do. Each is start and size; only those
/// whose place on the disk is said are asked about. A size of 0 is all that is left, of which nobody knows how much it is.
pub(crate) fn overlapping(partitions: &[(usize, i64, i64)]) -> Vec<usize> {
    let mut sorted: Vec<(i64, i64, usize)> = partitions
        .iter()
        .filter(|(_, start, _)| *start != 0)
        .map(|&(index, start, size)| {
            let end = if size == 0 {
                start
            } else {
                start.saturating_add(size).saturating_sub(1)
            };
            (start, end, index)
        })
        .collect();
    sorted.sort_unstable();
    let mut found = Vec::new();
    let mut reached: Option<(i64, usize)> = None;
    for (start, end, index) in sorted {
        if let Some((furthest, other)) = reached
            && start <= furthest
        {
            found.push(index.max(other));
        }
        if reached.is_none_or(|(furthest, _)| end > furthest) {
            reached = Some((end, index));
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// Tells of what is there twice. One set may serve several lists, where they share their keys.
pub(crate) struct Once<'a> {
    seen: HashSet<String>,
    report: &'a mut Report,
}

impl<'a> Once<'a> {
    pub(crate) fn new(report: &'a mut Report) -> Self {
        let seen = HashSet::new();
        Self { seen, report }
    }

    /// Elements whose keys were seen before.
    pub(crate) fn list(&mut self, list: Option<&Node>, place: &Place<'_>, key: Key) {
        for (index, item) in list.map(Node::items).unwrap_or_default().iter().enumerate() {
            let Some(text) = key.of(item) else { continue };
            if self.seen.contains(text) {
                let what = match key {
                    Key::Name(_) if !text.is_empty() => format!(": {}", shortened(text)),
                    _ => String::new(),
                };
                let message = format!("is there twice{what}");
                self.report.error(item, &place.index(index), message);
            } else {
                self.seen.insert(text.to_owned());
            }
        }
    }
}

/// What two elements of a list may not have in common.
#[derive(Clone, Copy)]
pub(crate) enum Key {
    /// The element, which is a text.
    Itself,
    /// The name or path at this key.
    Name(&'static str),
    /// The URL at this key. A report does not quote it: it may be the contents, or name a password.
    Source(&'static str),
}

impl Key {
    /// An element that is no map has no name.
    fn of(self, node: &Node) -> Option<&str> {
        match self {
            Self::Itself => node.as_text(),
            Self::Name(key) | Self::Source(key) => matches!(node.value, Value::Map(_)).then(|| text(node, key)),
        }
    }
}

/// Enough of a key to know it again.
pub(crate) fn shortened(text: &str) -> String {
    const LENGTH: usize = 60;
    let mut begin: String = text.chars().take(LENGTH).collect();
    if begin.len() < text.len() {
        begin.push('…');
    }
    begin
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("/", "/")]
    #[case("/a/b/", "/a/b")]
    #[case("//a/./b/../c", "/a/c")]
    #[case("/..", "/")]
    #[case("a/..", ".")]
    #[case("../a", "../a")]
    #[case("../../a", "../../a")]
    #[case("", ".")]
    fn paths_are_cleaned(#[case] path: &str, #[case] expected: &str) {
        assert_eq!(clean(path), expected);
    }

    #[rstest]
    #[case("", true)]
    #[case("01234567-89AB-cdef-EDCB-A98765432101", true)]
    #[case("0123456789ABCDEFEDCBA98765432101", false)]
    #[case("01234567-89AB-CDEF-EDCB-A9876543210g", false)]
    fn guids(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(guid(text).is_ok(), valid);
    }

    #[rstest]
    #[case(&[(1, 10), (11, 10)], &[])]
    #[case(&[(1, 10), (10, 10)], &[1])]
    #[case(&[(10, 10), (1, 100)], &[1])]
    #[case(&[(0, 10), (1, 10)], &[])]
    #[case(&[(1, 0), (1, 10)], &[1])]
    #[case(&[(1, 0), (2, 10)], &[])]
    #[case(&[(1, 100), (5, 1), (7, 1)], &[1, 2])]
    fn partitions_that_overlap_are_found(#[case] partitions: &[(i64, i64)], #[case] expected: &[usize]) {
        let partitions: Vec<_> = partitions
            .iter()
            .enumerate()
            .map(|(index, &(start, size))| (index, start, size))
            .collect();
        assert_eq!(overlapping(&partitions), expected);
    }
}
