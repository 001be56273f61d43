//! Ignition 2.0 to 2.4.

use crate::{
    node::Node,
    report::Report,
    shape::{Language, section, text},
    transpile::Translation,
    version::Version,
};

pub(crate) const LANGUAGE: Language = Language {
    fields: &[section("ignition", &[text("version")])],
    version_name: |minor| format!("2.{minor}.0"),
};

pub(crate) fn check(_: &Node, _: u8, _: &mut Report) {}

pub(crate) fn append(parent: &Node, _: &Node) -> Node {
    parent.clone()
}

pub(crate) fn to_v3(root: &Node, _: &mut Report) -> Translation {
    (Version::v3(0), root.clone())
}
