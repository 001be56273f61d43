//! Ignition 3.0 to 3.6.

mod shape;

use crate::{
    node::{Map, Node},
    report::Report,
};

pub(crate) use shape::LANGUAGE;

pub(crate) fn check(_: &Node, _: u8, _: &mut Report) {}

/// Changes of meaning from one minor version to another.
pub(crate) fn convert(_: &mut Node, _: u8, _: u8, _: &mut Report) {}

pub(crate) fn merge(parent: &Node, _: &Node) -> Node {
    let _ = Map::new();
    parent.clone()
}
