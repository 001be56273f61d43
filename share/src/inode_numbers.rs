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

/// The devices met so far.
#[derive(Debug)]
pub(crate) struct Devices {
    /// By `st_dev`. No more than there are counts: the kernel gives the numbers of devices that went to those that come, so
    /// that they could run out only if as many were mounted at once. All others would share the last count.
    counted: HashMap<u64, Device>,
}

impl Devices {
    /// `root` is the `st_dev` of the shared directory.
    pub(crate) fn new(root: u64) -> Self {
        Self {
            counted: HashMap::from([(root, Device::FIRST)]),
        }
    }

    /// The device with this `st_dev`.
    pub(crate) fn device(&mut self, st_dev: u64) -> Device {
        let next = Device(u16::try_from(self.counted.len()).unwrap_or(u16::MAX));
        if next.0 == u16::MAX {
            return self.counted.get(&st_dev).copied().unwrap_or(next);
        }
        *self.counted.entry(st_dev).or_insert(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_first_device_keep_their_numbers_and_those_of_others_get_numbers_of_their_own() {
        let mut devices = Devices::new(40);
        let (second, third) = (devices.device(41), devices.device(7));
        assert_eq!(devices.device(40).number(2), 2);
        assert_eq!(second.number(2), 1 << 48 | 2);
        assert_eq!(third.number(2), 2 << 48 | 2);
        assert_eq!(devices.device(41), second);
    }

    #[test]
    fn numbers_that_use_the_upper_bits_stay_apart_on_their_device() {
        let mut devices = Devices::new(40);
        let overlay = devices.device(41);
        assert_ne!(overlay.number(1 << 62 | 2), overlay.number(2));
    }

    #[test]
    fn devices_beyond_the_count_share_the_last_one() {
        let mut devices = Devices::new(0);
        for st_dev in 1..70_000 {
            devices.device(st_dev);
        }
        assert_eq!(devices.device(65_534), Device(65_534));
        assert_eq!(devices.device(65_535), Device(65_535));
        assert_eq!(devices.device(69_999), Device(65_535));
        assert_eq!(devices.device(1_000_000), Device(65_535));
        assert_eq!(devices.counted.len(), 65_535);
    }
}
