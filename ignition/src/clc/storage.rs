//! Section `storage`: what it says otherwise than Ignition does.

use super::quantity;
use crate::{
    data_url,
    files::{Bounded, Files},
    node::{Map, Node},
    report::{Place, Report},
};

const FILE_MODE: i64 = 0o644;
const DIRECTORY_MODE: i64 = 0o755;

/// Names for types of partitions.
const TYPE_GUIDS: &[(&str, &str)] = &[
    ("raid_containing_root", "be9067b9-ea49-4f15-b4f6-f36f8c9e1818"),
    ("linux_filesystem_data", "0fc63daf-8483-4772-8e79-3d69d8477de4"),
    ("swap_partition", "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f"),
    ("raid_partition", "a19d880f-05fc-4d3b-a006-743f0f84911e"),
];

/// Says the section in Ignition's way, still under ct's names.
pub(super) fn translate(storage: &mut Map, files: &dyn Files, report: &mut Report) {
    let mut files = Bounded::new(files);
    let place = Place::ROOT.key("storage");
    each(storage, "disks", &place, |disk, place| {
        each(disk, "partitions", place, |partition, place| {
            translate_partition(partition, place, report);
        });
    });
    each(storage, "directories", &place, |directory, place| {
        set_mode(directory, "directory", DIRECTORY_MODE, place, report);
    });
    each(storage, "files", &place, |file, place| {
        set_mode(file, "file", FILE_MODE, place, report);
        let contents = file.remove("contents").unwrap_or_else(|| Node::ours(Map::new()));
        let contents = translate_contents(contents, &mut files, &place.key("contents"), report);
        file.insert("contents", contents);
    });
}

/// Goes through the maps of a list, if there is one.
fn each(map: &mut Map, key: &str, place: &Place<'_>, mut step: impl FnMut(&mut Map, &Place<'_>)) {
    let Some(items) = map.get_mut(key).and_then(Node::as_list_mut) else {
        return;
    };
    let place = place.key(key);
    for (index, item) in items.iter_mut().enumerate() {
        if let Some(item) = item.as_map_mut() {
            step(item, &place.index(index));
        }
    }
}

fn translate_partition(partition: &mut Map, place: &Place<'_>, report: &mut Report) {
    for key in ["size", "start"] {
        let Some(node) = partition.get_mut(key) else { continue };
        match node.as_text().and_then(quantity::sectors) {
            Some(sectors) => *node = Node::at(node.position, sectors),
            None => {
                let message = "a size with its unit is expected, such as 512MiB or 10GiB (KiB, MiB, GiB, TiB)";
                report.error(node, &place.key(key), message);
                // Said once: a number is expected from here on.
                partition.remove(key);
            }
        }
    }
    if let Some(node) = partition.get_mut("type_guid") {
        let known = TYPE_GUIDS.iter().find(|(name, _)| node.as_text() == Some(name));
        if let Some((_, guid)) = known {
            *node = Node::at(node.position, *guid);
        }
    }
}

fn set_mode(map: &mut Map, what: &str, mode: i64, place: &Place<'_>, report: &mut Report) {
    if map.get("mode").is_none() {
        let node = map.get("path").cloned().unwrap_or_default();
        let message = format!("the {what} names no mode and gets {mode:#o}").replace("0o", "0");
        report.warning(&node, &place.key("mode"), message);
        map.insert("mode", Node::ours(mode));
    }
}

fn translate_contents(mut contents: Node, files: &mut Bounded<'_>, place: &Place<'_>, report: &mut Report) -> Node {
    let position = contents.position;
    let mut out = Map::new();
    let mut remote = Map::new();
    let mut sources = Vec::new();
    if let Some(map) = contents.as_map_mut() {
        let mut take = |key: &str| map.remove(key).filter(|node| node.as_text() != Some(""));
        if let Some(inline) = take("inline") {
            let url = data_url::percent(inline.as_text().unwrap_or_default().as_bytes());
            sources.push(("inline", Node::at(inline.position, url)));
        }
        if let Some(local) = take("local") {
            let url = match files.read(local.as_text().unwrap_or_default()) {
                Ok(bytes) => data_url::percent(&bytes),
                Err(message) => {
                    report.error(&local, &place.key("local"), message);
                    String::new()
                }
            };
            sources.push(("local", Node::at(local.position, url)));
        }
        if let Some(map) = take("remote").as_mut().and_then(Node::as_map_mut) {
            std::mem::swap(&mut remote, map);
        }
        if let Some(url) = remote.remove("url").filter(|node| node.as_text() != Some("")) {
            let source = written_out(url.as_text().unwrap_or_default());
            sources.push(("remote.url", Node::at(url.position, source)));
        }
    }
    if let [_, (more, node), ..] = sources.as_slice() {
        let message = "only one of inline, local and remote.url can say what is in the file";
        report.error(node, &place.key(more), message);
    }
    let source = sources.into_iter().next().map(|(_, node)| node);
    out.insert("source", source.unwrap_or_else(|| Node::ours("data:,")));
    for key in ["compression", "verification"] {
        if let Some(node) = remote.remove(key) {
            out.insert(key, node);
        }
    }
    Node::at(position, out)
}

/// A URL as Go writes it out again: the scheme in small letters, what cannot stand in a URL percent-encoded.
fn written_out(url: &str) -> String {
    let mut out = String::with_capacity(url.len());
    let scheme = url.find(':').filter(|end| {
        let name = url.get(..*end).unwrap_or_default();
        name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
    });
    let (scheme, rest) = url.split_at(scheme.unwrap_or_default());
    out.push_str(&scheme.to_ascii_lowercase());
    // What is no path, as in `data:`, and a query stay as they are.
    if !rest.starts_with(":/") {
        out.push_str(rest);
        return out;
    }
    let (path, query) = rest.split_at(rest.find('?').unwrap_or(rest.len()));
    for c in path.chars() {
        if c.is_ascii_graphic() && !"\"<>\\^`{|}".contains(c) {
            out.push(c);
        } else {
            let mut bytes = [0; 4];
            for byte in c.encode_utf8(&mut bytes).bytes() {
                out.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    out.push_str(query);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("HTTP://Example.com/a b/ä?c=d e", "http://Example.com/a%20b/%C3%A4?c=d e")]
    #[case("data:,hello world", "data:,hello world")]
    #[case("s3://bucket/key", "s3://bucket/key")]
    #[case("nothing", "nothing")]
    fn urls(#[case] url: &str, #[case] expected: &str) {
        assert_eq!(written_out(url), expected);
    }
}
