//! Butane.

use crate::{
    node::Node,
    report::Report,
    transpile::{Options, Translation},
};

pub(crate) fn translate(_: Node, _: &Options<'_>, _: &mut Report) -> Option<Translation> {
    None
}
