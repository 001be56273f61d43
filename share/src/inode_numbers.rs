//! Which inode number a file has in the guest.
//!
//! A file's number is unique on its file system, and many file systems are mounted below the shared directory: root file
//! systems of containers, volumes. virtiofs has a mount in the guest for each of them (`--announce-submounts`), and so a device
//! number; /dev/fuse has one device for all, on which files of equal number are one file to cp, tar or find. So the host's
//! devices are counted as they are met, and the count goes into the upper [`DEVICE_BITS`] of the number, by exclusive or: files
//! of one device never get equal numbers thereby, and those of the first one, the shared directory's own, keep theirs.
//!
//! Two files of different devices could still meet if a file system used those bits itself, in just the pattern of another
//! one's count. overlayfs does set some (`xino`), but from the top, where the count arrives with the 8192nd device.

use std::collections::HashMap;

use virtiofsd::filesystem::ROOT_ID;

/// Bits of an inode number that tell devices apart.
const DEVICE_BITS: u32 = 16;

/// A device's place in the order in which they were met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Device(u16);

impl Device {
    /// The shared directory's own.
    pub(crate) const FIRST: Self = Self(0);

    /// The number in the guest of the file that has `number` on this device.
    pub(crate) fn number(self, number: u64) -> u64 {
        number ^ (u64::from(self.0) << (u64::BITS - DEVICE_BITS))
    }
}

/// The devices met so far, and the device of each node that the guest remembers. A node is a file by the name that the
/// file system's server and the guest's kernel have for it; it never moves to another device, and its name is never used again.
#[derive(Debug)]
pub(crate) struct InodeNumbers {
    /// By `st_dev`. No more than there are counts: the kernel gives the numbers of devices that went to those that come, so
    /// that they could run out only if as many were mounted at once. All others would share the last count.
    devices: HashMap<u64, Device>,
    nodes: HashMap<u64, Node>,
}

#[derive(Debug)]
struct Node {
    device: Device,
    /// How many times the guest was told of it without having forgotten it.
    lookups: u64,
}

impl InodeNumbers {
    /// `root` is the `st_dev` of the shared directory.
    pub(crate) fn new(root: u64) -> Self {
        Self {
            devices: HashMap::from([(root, Device::FIRST)]),
            nodes: HashMap::new(),
        }
    }

    /// The device with this `st_dev`.
    pub(crate) fn device(&mut self, st_dev: u64) -> Device {
        let next = Device(u16::try_from(self.devices.len()).unwrap_or(u16::MAX));
        if next.0 == u16::MAX {
            return self.devices.get(&st_dev).copied().unwrap_or(next);
        }
        *self.devices.entry(st_dev).or_insert(next)
    }

    /// The device of a node; the first one for a node that is not remembered, of which nobody has anything to tell either.
    pub(crate) fn device_of(&self, node: u64) -> Device {
        self.nodes.get(&node).map_or(Device::FIRST, |node| node.device)
    }

    /// The guest is told of a node once more: its device, if it is remembered.
    pub(crate) fn remembered(&mut self, node: u64) -> Option<Device> {
        if node == ROOT_ID {
            return Some(Device::FIRST);
        }
        let node = self.nodes.get_mut(&node)?;
        node.lookups = node.lookups.saturating_add(1);
        Some(node.device)
    }

    /// The guest is told of a node for the first time.
    pub(crate) fn remember(&mut self, node: u64, device: Device) {
        self.nodes.insert(node, Node { device, lookups: 1 });
    }

    /// The guest forgets having been told of a node so many times. True when it remembers nothing of it any more.
    pub(crate) fn forget(&mut self, node: u64, lookups: u64) -> bool {
        let Some(known) = self.nodes.get_mut(&node) else {
            return true;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        let gone = known.lookups == 0;
        if gone {
            self.nodes.remove(&node);
        }
        gone
    }

    /// The guest has forgotten all nodes. Devices keep their counts.
    pub(crate) fn forget_all(&mut self) {
        self.nodes = HashMap::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_first_device_keep_their_numbers_and_those_of_others_get_numbers_of_their_own() {
        let mut numbers = InodeNumbers::new(40);
        let (second, third) = (numbers.device(41), numbers.device(7));
        assert_eq!(numbers.device(40).number(2), 2);
        assert_eq!(second.number(2), 1 << 48 | 2);
        assert_eq!(third.number(2), 2 << 48 | 2);
        assert_eq!(numbers.device(41), second);
    }

    #[test]
    fn numbers_that_use_the_upper_bits_stay_apart_on_their_device() {
        let mut numbers = InodeNumbers::new(40);
        let overlay = numbers.device(41);
        assert_ne!(overlay.number(1 << 62 | 2), overlay.number(2));
    }

    #[test]
    fn a_node_is_remembered_until_it_was_forgotten_as_often_as_it_was_told() {
        let mut numbers = InodeNumbers::new(40);
        let device = numbers.device(41);
        assert_eq!(numbers.remembered(9), None);
        numbers.remember(9, device);
        assert_eq!(numbers.remembered(9), Some(device));
        assert!(!numbers.forget(9, 1));
        assert_eq!(numbers.device_of(9), device);
        assert!(numbers.forget(9, u64::MAX));
        assert_eq!(numbers.remembered(9), None);
    }

    #[test]
    fn devices_beyond_the_count_share_the_last_one() {
        let mut numbers = InodeNumbers::new(0);
        for st_dev in 1..70_000 {
            numbers.device(st_dev);
        }
        assert_eq!(numbers.device(65_534), Device(65_534));
        assert_eq!(numbers.device(65_535), Device(65_535));
        assert_eq!(numbers.device(69_999), Device(65_535));
        assert_eq!(numbers.device(1_000_000), Device(65_535));
        assert_eq!(numbers.devices.len(), 65_535);
    }
}
