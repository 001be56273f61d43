//! cloud-config.

use crate::{
    node::Node,
    report::Report,
    transpile::{Options, Translation},
};

/// What is known of the machine's name and addresses before it boots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Addresses {
    pub hostname: Option<String>,
    pub private_ipv4: Option<String>,
    pub public_ipv4: Option<String>,
    pub private_ipv6: Option<String>,
    pub public_ipv6: Option<String>,
}

pub(crate) fn translate(_: Node, _: &Options<'_>, _: &mut Report) -> Option<Translation> {
    None
}

pub(crate) fn translate_script(_: &Node) -> Option<Translation> {
    None
}
