//! Files: those of `write_files`, and those that other keys stand for.

use std::collections::HashMap;

use base64::{Engine, prelude::BASE64_STANDARD};

use crate::{
    data_url,
    gzip::{Packed, Packer, UNPACKED_MAX, Unpacker},
    node::{Map, Node},
    report::{Place, Report},
    rules,
};

const MODE: i64 = 0o644;

/// Files of the machine; a path is there once.
#[derive(Debug, Default)]
pub(super) struct Files {
    files: Vec<Node>,
    by_path: HashMap<String, usize>,
    packer: Packer,
}

impl Files {
    /// Adds a file, or puts it in the place of the one at its path; whether there was none.
    pub(super) fn add(&mut self, path: &Node, source: Node, compressed: bool, rest: Vec<(&str, Node)>) -> bool {
        let mut contents = Map::from([("source", source)]);
        if compressed {
            contents.insert("compression", Node::ours("gzip"));
        }
        let mut file = Map::from([("filesystem", Node::ours("root")), ("path", path.clone())]);
        for (key, node) in rest {
            file.insert(key, node);
        }
        file.insert("contents", Node::ours(contents));
        let key = path.as_text().unwrap_or_default().to_owned();
        let next = self.files.len();
        let index = *self.by_path.entry(key).or_insert(next);
        match self.files.get_mut(index) {
            Some(existing) => *existing = Node::ours(file),
            None => self.files.push(Node::ours(file)),
        }
        index == next
    }

    /// The URL of contents, and whether they are compressed in it.
    pub(super) fn encode(&mut self, contents: &[u8]) -> (String, bool) {
        data_url::shortest(contents, Some(&mut self.packer))
    }

    /// A file of ours, which takes the place of what the image has there.
    pub(super) fn write(&mut self, path: &str, contents: &str) {
        self.write_with_mode(path, contents, MODE);
    }

    pub(super) fn write_with_mode(&mut self, path: &str, contents: &str, mode: i64) {
        let (url, compressed) = self.encode(contents.as_bytes());
        let rest = vec![("overwrite", Node::ours(true)), ("mode", Node::ours(mode))];
        self.add(&Node::ours(path), Node::ours(url), compressed, rest);
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.by_path.contains_key(path)
    }

    pub(super) fn into_list(self) -> Vec<Node> {
        self.files
    }
}

/// Adds the files of `write_files`.
pub(super) fn translate(root: &Node, files: &mut Files, report: &mut Report) {
    let place = Place::ROOT.key("write_files");
    let mut unpacker = Unpacker::default();
    for (index, file) in root
        .get("write_files")
        .map(Node::items)
        .unwrap_or_default()
        .iter()
        .enumerate()
    {
        let place = place.index(index);
        let Some(path) = file.get("path").filter(|path| path.as_text() != Some("")) else {
            report.error(file, &place, "needs a path");
            continue;
        };
        let absolute = Node::at(path.position, from_root(path.as_text().unwrap_or_default()));
        check_path(&absolute, &place.key("path"), report);
        let contents = file.get("content").cloned().unwrap_or_default();
        let (url, compressed) = match decode(file, &contents, &mut unpacker, &place, report) {
            Decoded::Plain(bytes) => files.encode(&bytes),
            Decoded::Packed(bytes) => (data_url::base64(&bytes), true),
        };
        let mut rest = vec![("overwrite", Node::ours(true)), ("mode", mode(file, &place, report))];
        rest.extend(owner(file, &place, report));
        let source = Node::at(contents.position, url);
        if !files.add(&absolute, source, compressed, rest) {
            let message = "is written before already: the last one stays";
            report.warning(path, &place.key("path"), message);
        }
    }
}

/// The absolute path, without parts that lead nowhere.
fn from_root(path: &str) -> String {
    rules::clean(&format!("/{path}"))
}

fn check_path(path: &Node, place: &Place<'_>, report: &mut Report) {
    let text = path.as_text().unwrap_or_default();
    let below = |directory: &str| text.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'));
    if text == "/" {
        report.error(path, place, "a file is expected, not the root directory");
    } else if below("/usr") {
        let message = "/usr cannot be written to in Container Linux: programs go to /opt/bin, all else to /etc or /var";
        report.warning(path, place, message);
    } else if ["/run", "/tmp", "/proc", "/sys", "/dev"].into_iter().any(below) {
        let message = "is in memory, and files are written to disk before the machine boots: \
                       write it below /etc or /var, or write a unit that makes it";
        report.error(path, place, message);
    }
}

/// Contents as they are to be written, or in gzip, which Ignition unpacks itself.
enum Decoded {
    Plain(Vec<u8>),
    Packed(Vec<u8>),
}

fn decode(file: &Node, contents: &Node, unpacker: &mut Unpacker, place: &Place<'_>, report: &mut Report) -> Decoded {
    let text = contents.as_text().unwrap_or_default();
    let plain = || Decoded::Plain(text.as_bytes().to_vec());
    let Some(encoding) = file.get("encoding") else {
        return plain();
    };
    let name = encoding.as_text().unwrap_or_default();
    let broken = || format!("cannot be decoded as {name}");
    let from_base64 = || {
        let digits: String = text.split(['\r', '\n']).collect();
        BASE64_STANDARD.decode(digits).map_err(|_| broken())
    };
    let decoded = match name {
        "" => Ok(plain()),
        "b64" | "base64" => from_base64().map(Decoded::Plain),
        "gz" | "gzip" => Err("gzip is no text: write it in base64, with `encoding: gzip+base64`".to_owned()),
        "gz+base64" | "gzip+base64" | "gz+b64" | "gzip+b64" => {
            from_base64().and_then(|packed| match unpacker.check(&packed) {
                Ok(()) => Ok(Decoded::Packed(packed)),
                Err(Packed::Broken) => Err(broken()),
                Err(Packed::TooMuch) => Err(format!(
                    "this and the packed files before it unpack to more than {UNPACKED_MAX} bytes in all: so much is to \
                     be fetched by a service"
                )),
            })
        }
        _ => {
            let message = "is no encoding that is known: base64, b64, gzip, gz, and gzip+base64 are, among others";
            report.error(encoding, &place.key("encoding"), message);
            return Decoded::Plain(Vec::new());
        }
    };
    decoded.unwrap_or_else(|message| {
        report.error(contents, &place.key("content"), message);
        Decoded::Plain(Vec::new())
    })
}

/// Permissions are octal, whether or not they are quoted.
fn mode(file: &Node, place: &Place<'_>, report: &mut Report) -> Node {
    let Some(node) = file.get("permissions").filter(|node| node.as_text() != Some("")) else {
        return Node::ours(MODE);
    };
    let text = node.as_text().unwrap_or_default();
    // Three or four digits, and a 0 before them or not.
    let right = matches!(text.len(), 3..=4) || (text.len() == 5 && text.starts_with('0'));
    let octal = text.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
    match i64::from_str_radix(text, 8) {
        Ok(mode) if right && octal => Node::at(node.position, mode),
        _ => {
            let message = "permissions in octal are expected, such as 0644";
            report.error(node, &place.key("permissions"), message);
            Node::ours(MODE)
        }
    }
}

/// `user`, `user:group` or `:group`, by name or number.
fn owner(file: &Node, place: &Place<'_>, report: &mut Report) -> Vec<(&'static str, Node)> {
    let Some(node) = file.get("owner").filter(|node| node.as_text() != Some("")) else {
        return Vec::new();
    };
    let text = node.as_text().unwrap_or_default();
    let (user, group) = text
        .split_once(':')
        .map_or((text, None), |(user, group)| (user, Some(group)));
    if group.is_some_and(|group| group.is_empty() || group.contains(':')) {
        let message = "a user, or user and group with a colon between them, is expected, such as core:docker";
        report.error(node, &place.key("owner"), message);
        return Vec::new();
    }
    let named = |name: &str| {
        let (key, value) = match name.parse::<u32>() {
            Ok(number) => ("id", Node::at(node.position, i64::from(number))),
            Err(_) => ("name", Node::at(node.position, name)),
        };
        Node::at(node.position, Map::from([(key, value)]))
    };
    let mut out = Vec::new();
    if !user.is_empty() {
        out.push(("user", named(user)));
    }
    out.extend(group.map(|group| ("group", named(group))));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("/etc/motd", "/etc/motd")]
    #[case("etc//x/../motd", "/etc/motd")]
    #[case("/../..", "/")]
    fn paths(#[case] path: &str, #[case] expected: &str) {
        assert_eq!(from_root(path), expected);
    }

    #[rstest::rstest]
    #[case("0644", Some(0o644))]
    #[case("755", Some(0o755))]
    #[case("01777", Some(0o1777))]
    #[case("420", Some(0o420))]
    #[case("44", None)]
    #[case("0888", None)]
    #[case("+644", None)]
    #[case("11777", None)]
    fn permissions(#[case] text: &str, #[case] expected: Option<i64>) {
        let file = Node::ours(Map::from([("permissions", Node::ours(text))]));
        let mut report = Report::default();
        let mode = mode(&file, &Place::ROOT, &mut report).as_int();
        assert_eq!((!report.has_errors()).then_some(mode).flatten(), expected);
    }
}
