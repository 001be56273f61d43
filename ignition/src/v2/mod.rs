//! Ignition 2.0 to 2.4.

mod shape;

use crate::{node::Node, report::Report, transpile::Translation, version::Version};

pub(crate) use shape::LANGUAGE;

pub(crate) fn check(_: &Node, _: u8, _: &mut Report) {}

pub(crate) fn append(parent: &Node, _: &Node) -> Node {
    parent.clone()
}

pub(crate) fn to_v3(root: &Node, _: &mut Report) -> Translation {
    (Version::v3(0), root.clone())
}
