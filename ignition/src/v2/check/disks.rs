//! Disks, partitions, arrays and filesystems.

use std::collections::HashSet;

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{self, at, int, is_false, is_true, text},
};

/// Sectors of a MiB, on which partitions begin.
const ALIGNMENT: i64 = 2048;

impl Check<'_> {
    pub(super) fn disks(&mut self, root: &Node) {
        let place = Place::ROOT.key("storage");
        let place = place.key("disks");
        let disks = root.find(&["storage", "disks"]).map(Node::items).unwrap_or_default();
        for (index, disk) in disks.iter().enumerate() {
            let place = place.index(index);
            let outcome = rules::absolute(text(disk, "device"));
            self.expect(at(disk, "device"), &place.key("device"), outcome);
            if let Some(partitions) = disk.get("partitions") {
                self.partitions(partitions, &place.key("partitions"));
            }
        }
    }

    fn partitions(&mut self, list: &Node, place: &Place<'_>) {
        let partitions = list.items();
        let mut numbers = HashSet::new();
        let mut dimensions = Vec::new();
        for (index, partition) in partitions.iter().enumerate() {
            let place = place.index(index);
            self.partition(partition, &place);
            let number = int(partition, "number").unwrap_or(0);
            if number != 0 && !numbers.insert(number) {
                let message = format!("another partition has the number {number}");
                self.report
                    .error(at(partition, "number"), &place.key("number"), message);
            }
            let (start, size) = (int(partition, "start"), int(partition, "size"));
            match (start, size) {
                (Some(start), Some(size)) => dimensions.push((index, start, size)),
                // Until 2.2 what is not said is 0.
                (Some(start), None) if self.minor <= 2 => dimensions.push((index, start, 0)),
                _ => {}
            }
        }
        for index in rules::overlapping(&dimensions) {
            if let Some(partition) = partitions.get(index) {
                self.report
                    .error(partition, &place.index(index), "overlaps with another partition");
            }
        }
        let unnumbered = |partition: &Node| int(partition, "number").unwrap_or(0) == 0;
        if partitions.iter().any(|partition| is_false(partition, "shouldExist")) && partitions.iter().any(unnumbered) {
            let message = "where a partition is to be deleted, all of them need their number";
            self.report.error(list, place, message);
        }
        let says = |keys: [&str; 2]| {
            let says = |partition: &Node| keys.iter().any(|key| partition.get(key).is_some());
            partitions.iter().any(says)
        };
        if says(["size", "start"]) && says(["sizeMiB", "startMiB"]) {
            let message = "a disk's partitions are measured in sectors or in MiB; one of them is expected";
            self.report.error(list, place, message);
        }
    }

    fn partition(&mut self, partition: &Node, place: &Place<'_>) {
        let start = at(partition, "start");
        if int(partition, "start").is_some_and(|sector| sector % ALIGNMENT != 0) {
            let message = format!("is not at a MiB: a multiple of {ALIGNMENT} sectors is expected");
            self.report.error(start, &place.key("start"), message);
        }
        for (key, instead) in [("size", "sizeMiB"), ("start", "startMiB")] {
            let Some(node) = partition.get(key) else { continue };
            if self.minor >= 3 {
                let message = format!("is the way of 2.2.0 and before: {instead} is its successor");
                self.report.info(node, &place.key(key), message);
            } else if self.minor == 0 && node.as_int().is_some_and(|number| number < 0) {
                self.report.error(node, &place.key(key), "cannot be less than 0");
            }
        }
        let has_guid = ["typeGuid", "guid"].iter().any(|key| !text(partition, key).is_empty());
        let has_other = ["label", "start", "size"]
            .iter()
            .any(|key| partition.get(key).is_some());
        if is_false(partition, "shouldExist") && (has_guid || has_other) {
            let message = "a partition that is to be deleted has nothing but its number";
            self.report
                .error(at(partition, "shouldExist"), &place.key("shouldExist"), message);
        }
        let label = text(partition, "label");
        let (node, place_of_label) = (at(partition, "label"), place.key("label"));
        if label.len() > rules::PARTITION_LABEL_MAX {
            let message = format!("is too long: {} bytes are the most", rules::PARTITION_LABEL_MAX);
            self.report.error(node, &place_of_label, message);
        }
        if label.contains(':') {
            let message = "only what is before the colon will be the label";
            self.report.warning(node, &place_of_label, message);
        }
        for key in ["guid", "typeGuid"] {
            let outcome = rules::guid(text(partition, key));
            self.expect(at(partition, key), &place.key(key), outcome);
        }
    }

    pub(super) fn raid(&mut self, root: &Node) {
        let place = Place::ROOT.key("storage");
        let place = place.key("raid");
        let arrays = root.find(&["storage", "raid"]).map(Node::items).unwrap_or_default();
        for (index, array) in arrays.iter().enumerate() {
            let place = place.index(index);
            let level = rules::raid_level(text(array, "level"), int(array, "spares"));
            self.expect(at(array, "level"), &place.key("level"), level);
            let place = place.key("devices");
            let devices = array.get("devices").map(Node::items).unwrap_or_default();
            for (index, device) in devices.iter().enumerate() {
                if let Some(path) = device.as_text() {
                    self.expect(device, &place.index(index), rules::absolute(path));
                }
            }
        }
    }

    pub(super) fn filesystems(&mut self, root: &Node) {
        let place = Place::ROOT.key("storage");
        let place = place.key("filesystems");
        let filesystems = root
            .find(&["storage", "filesystems"])
            .map(Node::items)
            .unwrap_or_default();
        let mut names = HashSet::from(["root"]);
        for (index, filesystem) in filesystems.iter().enumerate() {
            let place = place.index(index);
            if !names.insert(text(filesystem, "name")) {
                let message = "another filesystem has this name (root is always there), which is then this one's";
                self.report.warning(at(filesystem, "name"), &place.key("name"), message);
            }
            let (mount, path) = (filesystem.get("mount"), filesystem.get("path"));
            if mount.is_some() == path.is_some() {
                let message = "one of `mount` and `path` is expected";
                self.report.error(filesystem, &place, message);
            }
            if let Some(mount) = mount {
                self.mount(mount, &place.key("mount"));
            }
            if let Some(path) = path {
                let outcome = rules::absolute(path.as_text().unwrap_or_default());
                self.expect(path, &place.key("path"), outcome);
            }
        }
    }

    fn mount(&mut self, mount: &Node, place: &Place<'_>) {
        let outcome = rules::absolute(text(mount, "device"));
        self.expect(at(mount, "device"), &place.key("device"), outcome);
        let format = text(mount, "format");
        match format {
            "ext4" | "btrfs" | "xfs" => {}
            "swap" | "vfat" if self.minor >= 1 => {}
            _ => {
                let more = if self.minor >= 1 { ", swap, vfat" } else { "" };
                let message = format!("is no format: ext4, btrfs, xfs{more} are");
                self.report.error(at(mount, "format"), &place.key("format"), message);
            }
        }
        let outcome = rules::filesystem_label(format, text(mount, "label"));
        self.expect(at(mount, "label"), &place.key("label"), outcome);
        let Some(create) = mount.get("create").filter(|_| self.minor >= 1) else {
            return;
        };
        let place_of_create = place.key("create");
        let message = "`create` is the way of 2.0.0: options and wipeFilesystem of the mount are its successors";
        self.report.warning(create, &place_of_create, message);
        if is_true(mount, "wipeFilesystem") {
            let message = "cannot be with wipeFilesystem";
            self.report.error(create, &place_of_create, message);
        }
        if mount.get("options").is_some_and(|options| !options.items().is_empty()) {
            let message = "cannot be with options of the mount";
            self.report.error(create, &place_of_create, message);
        }
    }
}
