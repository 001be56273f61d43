//! What Ignition itself refuses or warns of, once the keys and types are right.
//! (The rules of `config/v3_*/types` of Ignition; <https://coreos.github.io/ignition/specs/>.)

mod disks;
mod luks;
mod nodes;
mod passwd;
mod resource;
mod units;

use crate::{
    node::Node,
    report::{Place, Report},
    rules::{Key, Once, contents::Inspector},
};

/// Checks a configuration that was held against [`super::LANGUAGE`].
pub(crate) fn check(root: &Node, minor: u8, report: &mut Report) {
    let mut check = Check {
        minor,
        inspector: Inspector::default(),
        report,
    };
    check.ignition(root);
    check.kernel_arguments(root);
    check.passwd(root);
    check.disks(root);
    check.raid(root);
    check.luks(root);
    check.filesystems(root);
    check.nodes(root);
    check.units(root);
}

struct Check<'a> {
    minor: u8,
    inspector: Inspector,
    report: &'a mut Report,
}

impl Check<'_> {
    /// Tells of the node if something is wrong with it.
    fn expect(&mut self, node: &Node, place: &Place<'_>, outcome: Result<(), String>) {
        if let Err(message) = outcome {
            self.report.error(node, place, message);
        }
    }

    /// Elements of the list that have the key of an earlier one.
    fn once(&mut self, list: Option<&Node>, place: &Place<'_>, key: Key) {
        Once::new(self.report).list(list, place, key);
    }

    fn kernel_arguments(&mut self, root: &Node) {
        let place = Place::ROOT.key("kernelArguments");
        let mut once = Once::new(self.report);
        for key in ["shouldExist", "shouldNotExist"] {
            once.list(root.find(&["kernelArguments", key]), &place.key(key), Key::Itself);
        }
    }
}

#[cfg(test)]
mod tests;
