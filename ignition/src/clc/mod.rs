//! Container Linux Config.

use crate::{
    node::Node,
    report::Report,
    transpile::{Options, Translation},
};

/// Where a Container Linux runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Platform {
    /// Any other place: a unit of the user's, or of the launcher's, writes the data.
    Custom,
}

pub(crate) fn translate(_: Node, _: &Options<'_>, _: &mut Report) -> Option<Translation> {
    None
}
