//! From one minor version to another.

use crate::{
    node::Node,
    report::{Place, Report},
    rules::int,
};

/// Changes of meaning from one minor version to another. Whatever the other version has no key for, or refuses, is told by its
/// table and its checks; what remains is what it would take for something else:
/// - `mode`: setuid, setgid and sticky bits were passed over until 3.6.0, which sets them. On the way up they are taken away,
///   as Ignition does; on the way down they would be lost, which is told.
pub(crate) fn convert(root: &mut Node, from: u8, to: u8, report: &mut Report) {
    const SPECIAL_BITS: u8 = 6;
    if (from < SPECIAL_BITS) == (to < SPECIAL_BITS) {
        return;
    }
    let place = Place::ROOT.key("storage");
    for list in ["directories", "files"] {
        let Some(storage) = root.as_map_mut().and_then(|root| root.get_mut("storage")) else {
            return;
        };
        let Some(items) = storage
            .as_map_mut()
            .and_then(|storage| storage.get_mut(list))
            .and_then(Node::as_list_mut)
        else {
            continue;
        };
        let place = place.key(list);
        for (index, item) in items.iter_mut().enumerate() {
            let Some(mode) = int(item, "mode").filter(|mode| mode & 0o7000 != 0) else {
                continue;
            };
            let Some(node) = item.as_map_mut().and_then(|item| item.get_mut("mode")) else {
                continue;
            };
            if from < SPECIAL_BITS {
                *node = Node::at(node.position, mode & 0o777);
            } else {
                let message = "setuid, setgid and sticky bits need Ignition 3.6.0";
                report.error(node, &place.index(index).key("mode"), message);
            }
        }
    }
}
