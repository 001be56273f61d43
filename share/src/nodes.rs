//! What is known of the nodes that the guest remembers. A node is a file by the name that the file system's server and the guest's
//! kernel have for it; it never moves to another device, and its name is never used again.
//!
//! A folder of the shared directory may have a folder that nobody changes but the guest. Of all that is in it, the guest's kernel may keep
//! what it has seen, also that there is no such file.

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
};

use virtiofsd::filesystem::ROOT_ID;

use crate::inode_numbers::Device;

/// The nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    known: HashMap<u64, Node>,
    /// Name of the folders that are the guest's own.
    own: Option<CString>,
}

#[derive(Debug)]
struct Node {
    device: Device,
    place: Place,
    /// How many times the guest was told of it without having forgotten it.
    lookups: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Right in the shared directory.
    Top,
    /// A folder that is the guest's own, or in one.
    Own,
    Elsewhere,
}

impl Nodes {
    /// `own` is the name of the folders that are the guest's own.
    pub(crate) fn new(own: Option<CString>) -> Self {
        Self {
            known: HashMap::new(),
            own,
        }
    }

    /// The device of a node; the first one for a node that is not remembered, of which nobody has anything to tell either.
    pub(crate) fn device_of(&self, node: u64) -> Device {
        self.known.get(&node).map_or(Device::FIRST, |node| node.device)
    }

    /// The guest is told of a node once more: its device, if it is remembered.
    pub(crate) fn remembered(&mut self, node: u64) -> Option<Device> {
        if node == ROOT_ID {
            return Some(Device::FIRST);
        }
        let node = self.known.get_mut(&node)?;
        node.lookups = node.lookups.saturating_add(1);
        Some(node.device)
    }

    /// The guest is told of a node for the first time, found as `name` in `parent`.
    pub(crate) fn remember(&mut self, node: u64, device: Device, (parent, name): (u64, &CStr)) {
        let place = match self.known.get(&parent).map(|parent| parent.place) {
            _ if parent == ROOT_ID => Place::Top,
            Some(Place::Top) if self.own.as_deref() == Some(name) => Place::Own,
            Some(Place::Own) => Place::Own,
            _ => Place::Elsewhere,
        };
        let node_of_guest = Node {
            device,
            place,
            lookups: 1,
        };
        self.known.insert(node, node_of_guest);
    }

    /// Nobody changes the node but the guest, nor what is in it.
    pub(crate) fn is_own(&self, node: u64) -> bool {
        self.known.get(&node).is_some_and(|node| node.place == Place::Own)
    }

    /// The guest forgets having been told of a node so many times. True when it remembers nothing of it any more.
    pub(crate) fn forget(&mut self, node: u64, lookups: u64) -> bool {
        let Some(known) = self.known.get_mut(&node) else {
            return true;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        let gone = known.lookups == 0;
        if gone {
            self.known.remove(&node);
        }
        gone
    }

    /// The guest has forgotten all nodes.
    pub(crate) fn forget_all(&mut self) {
        self.known = HashMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inode_numbers::Devices;

    #[test]
    fn a_node_is_remembered_until_it_was_forgotten_as_often_as_it_was_told() {
        let (mut nodes, device) = (Nodes::new(None), Devices::new(40).device(41));
        assert_eq!(nodes.remembered(9), None);
        nodes.remember(9, device, (ROOT_ID, c"a"));
        assert_eq!(nodes.remembered(9), Some(device));
        assert!(!nodes.forget(9, 1));
        assert_eq!(nodes.device_of(9), device);
        assert!(nodes.forget(9, u64::MAX));
        assert_eq!(nodes.remembered(9), None);
    }

    #[test]
    fn a_folder_of_that_name_is_the_guests_own_in_a_folder_of_the_directory_alone() {
        let mut nodes = Nodes::new(Some(c"own".into()));
        for (node, parent, name, own) in [
            (2, ROOT_ID, c"own", false),
            (3, 2, c"own", true),
            (4, 3, c"a", true),
            (5, 4, c"b", true),
            (6, 2, c"other", false),
            (7, 6, c"own", false),
            (8, 99, c"own", false),
        ] {
            nodes.remember(node, Device::FIRST, (parent, name));
            assert_eq!(nodes.is_own(node), own, "{node}");
        }
        assert!(!nodes.is_own(ROOT_ID));
    }
}
