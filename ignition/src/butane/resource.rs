//! `inline` and `local`, wherever contents are fetched: they become a `data:` URL, the shortest that there is.

use super::{dialect::Dialect, local::Local};
use crate::{
    config::Config,
    data_url,
    gzip::{Packed, Packer, Unpacker},
    node::Node,
    report::{Place, Report, Severity},
    text,
    version::Version,
};

pub(super) fn translate(
    source: &mut Node,
    dialect: Dialect,
    local: &mut Local<'_>,
    packer: &mut Packer,
    report: &mut Report,
) {
    let mut resources = Resources {
        dialect,
        local,
        packer,
        unpacker: Unpacker::default(),
        report,
    };
    let root = Place::ROOT;
    within(source, &root, "ignition", |ignition, place| {
        within(ignition, place, "config", |config, place| {
            each(config, place, "merge", |node, place| {
                resources.configuration(node, place)
            });
            within(config, place, "replace", |node, place| {
                resources.configuration(node, place);
            });
        });
        within(ignition, place, "security", |security, place| {
            within(security, place, "tls", |tls, place| {
                each(tls, place, "certificate_authorities", |node, place| {
                    resources.contents(node, place);
                });
            });
        });
    });
    within(source, &root, "storage", |storage, place| {
        each(storage, place, "files", |file, place| {
            within(file, place, "contents", |node, place| {
                resources.contents(node, place);
            });
            each(file, place, "append", |node, place| {
                resources.contents(node, place);
            });
        });
        each(storage, place, "luks", |luks, place| {
            within(luks, place, "key_file", |node, place| {
                resources.contents(node, place);
            });
        });
    });
}

/// Visits the value of a key.
pub(super) fn within(node: &mut Node, place: &Place<'_>, key: &str, visit: impl FnOnce(&mut Node, &Place<'_>)) {
    if let Some(node) = node.as_map_mut().and_then(|map| map.get_mut(key)) {
        visit(node, &place.key(key));
    }
}

/// Visits the elements of the list that a key has.
pub(super) fn each(node: &mut Node, place: &Place<'_>, key: &str, mut visit: impl FnMut(&mut Node, &Place<'_>)) {
    within(node, place, key, |list, place| {
        for (index, item) in list.as_list_mut().into_iter().flatten().enumerate() {
            visit(item, &place.index(index));
        }
    });
}

struct Resources<'a, 'f> {
    dialect: Dialect,
    local: &'a mut Local<'f>,
    packer: &'a mut Packer,
    unpacker: Unpacker,
    report: &'a mut Report,
}

impl Resources<'_, '_> {
    /// Another configuration, which is looked into if its version is known.
    fn configuration(&mut self, node: &mut Node, place: &Place<'_>) {
        let Some((contents, sugar, key)) = self.contents(node, place) else {
            return;
        };
        // What is packed is not looked into; too much of it is not even unpacked.
        let packed = node.text("compression") == Some("gzip");
        if packed && self.unpacker.check(&contents) != Err(Packed::Broken) {
            return;
        }
        let place = place.key(key);
        let Ok(text) = String::from_utf8(contents) else {
            return self
                .report
                .error(&sugar, &place, "the configuration is no text in UTF-8");
        };
        let ours = self.dialect.ignition();
        let known = match version_of(&text) {
            Some(version) => {
                let known = version.parse::<Version>().ok().filter(|version| version.major() == 3);
                if known.is_none_or(|version| version > ours) {
                    let message = format!(
                        "the configuration is of Ignition {version}, which a guest that takes {ours} may not take"
                    );
                    self.report.warning(&sugar, &place, message);
                }
                known.is_some()
            }
            None => true,
        };
        if !known {
            return;
        }
        let found = Config::parse(&text).err();
        let entries = found.iter().flat_map(Report::entries);
        for entry in entries.filter(|entry| entry.severity == Severity::Error) {
            let message = format!("in the configuration, {entry}");
            self.report.error(&sugar, &place, message);
        }
    }

    /// Contents of any kind; their bytes, if they were sugar, the sugar and its key.
    fn contents(&mut self, node: &mut Node, place: &Place<'_>) -> Option<(Vec<u8>, Node, &'static str)> {
        let map = node.as_map_mut()?;
        let (inline, local) = (map.remove("inline"), map.remove("local"));
        let given = [
            ("local", local.as_ref()),
            ("inline", inline.as_ref()),
            ("source", map.get("source")),
        ];
        let mut given = given.iter().rev().filter_map(|(key, node)| Some((*key, (*node)?)));
        if let (Some((key, last)), Some(_)) = (given.next(), given.next()) {
            let message = "one of inline, local and source is expected, not several";
            self.report.error(last, &place.key(key), message);
        }
        let (sugar, key, bytes) = match (inline, local) {
            (Some(inline), _) => {
                let bytes = inline.as_text()?.as_bytes().to_vec();
                (inline, "inline", Some(bytes))
            }
            (None, Some(local)) => {
                let bytes = self.local.read(&local, &place.key("local"), self.report);
                (local, "local", bytes)
            }
            (None, None) => return None,
        };
        let contents = bytes.as_deref().unwrap_or_default();
        let position = sugar.position;
        if self.dialect == Dialect::Fcos(0) {
            map.insert("source", Node::at(position, data_url::percent(contents)));
        } else {
            let compressed_already = map
                .get("compression")
                .and_then(Node::as_text)
                .is_some_and(|text| !text.is_empty());
            let (url, compressed) = data_url::shortest(contents, (!compressed_already).then_some(&mut *self.packer));
            map.insert("source", Node::at(position, url));
            if !compressed_already {
                map.insert("compression", compression(compressed, &sugar));
            }
        }
        Some((bytes?, sugar, key))
    }
}

/// What `compression` says of contents that were encoded here: always something, so that no configuration that is merged
/// with this one says it.
pub(super) fn compression(compressed: bool, cause: &Node) -> Node {
    Node::at(cause.position, if compressed { "gzip" } else { "" })
}

/// The version that a configuration names, if it names one.
fn version_of(text: &str) -> Option<String> {
    let node = text::parse_json(text, &mut Report::default()).ok()?;
    let version = node.find(&["ignition", "version"])?;
    version.as_text().map(str::to_owned)
}
