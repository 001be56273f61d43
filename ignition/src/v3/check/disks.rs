//! Disks, partitions, arrays and filesystems.

use std::collections::{HashMap, HashSet};

use super::Check;
use crate::{
    node::{Node, Value},
    report::Place,
    rules::{self, Key, at, int, is_false, is_true, text},
};

impl Check<'_> {
    pub(super) fn disks(&mut self, root: &Node) {
        let Some(disks) = root.find(&["storage", "disks"]) else {
            return;
        };
        let place = Place::ROOT.key("storage");
        let place = place.key("disks");
        for (index, disk) in disks.items().iter().enumerate() {
            let place = place.index(index);
            let device = at(disk, "device");
            self.expect(
                device,
                &place.key("device"),
                rules::absolute_and_clean(text(disk, "device")),
            );
            if let Some(partitions) = disk.get("partitions") {
                self.partitions(partitions, &place.key("partitions"));
            }
        }
        self.once(Some(disks), &place, Key::Name("device"));
    }

    fn partitions(&mut self, list: &Node, place: &Place<'_>) {
        let partitions = list.items();
        let mut numbers = HashSet::new();
        let mut labels = HashSet::new();
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
            if let Some(label) = partition.text("label")
                && !labels.insert(label)
            {
                let message = format!("another partition has the label {:?}", rules::shortened(label));
                self.report.error(at(partition, "label"), &place.key("label"), message);
            }
            if let (Some(start), Some(size)) = (int(partition, "startMiB"), int(partition, "sizeMiB")) {
                dimensions.push((index, start, size));
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
    }

    fn partition(&mut self, partition: &Node, place: &Place<'_>) {
        let has_guid = ["typeGuid", "guid"].iter().any(|key| !text(partition, key).is_empty());
        let has_other = ["label", "startMiB", "sizeMiB"]
            .iter()
            .any(|key| partition.get(key).is_some());
        if is_false(partition, "shouldExist") && (has_guid || has_other) {
            let message = "a partition that is to be deleted has nothing but its number";
            self.report
                .error(at(partition, "shouldExist"), &place.key("shouldExist"), message);
        }
        if int(partition, "number").unwrap_or(0) == 0 && partition.get("label").is_none() {
            let message = "a partition needs a number from 1 on, or a label";
            self.report.error(partition, place, message);
        }
        if let Some(label) = partition.text("label") {
            let node = at(partition, "label");
            let place = place.key("label");
            if label.len() > rules::PARTITION_LABEL_MAX {
                let message = format!("is too long: {} bytes are the most", rules::PARTITION_LABEL_MAX);
                self.report.error(node, &place, message);
            }
            if label.contains(':') {
                self.report.error(node, &place, "cannot have a colon");
            }
        }
        for key in ["guid", "typeGuid"] {
            self.expect(at(partition, key), &place.key(key), rules::guid(text(partition, key)));
        }
    }

    pub(super) fn raid(&mut self, root: &Node) {
        let Some(list) = root.find(&["storage", "raid"]) else {
            return;
        };
        let place = Place::ROOT.key("storage");
        let place = place.key("raid");
        for (index, array) in list.items().iter().enumerate() {
            let place = place.index(index);
            let level = rules::raid_level(text(array, "level"), int(array, "spares"));
            self.expect(at(array, "level"), &place.key("level"), level);
            let devices = array.get("devices");
            let place = place.key("devices");
            if devices.is_none_or(|devices| devices.items().is_empty()) {
                self.report.error(at(array, "devices"), &place, "are missing");
            }
            for (index, device) in devices.map(Node::items).unwrap_or_default().iter().enumerate() {
                if let Some(path) = device.as_text() {
                    self.expect(device, &place.index(index), rules::absolute_and_clean(path));
                }
            }
            self.once(devices, &place, Key::Itself);
        }
        self.once(Some(list), &place, Key::Name("name"));
    }

    pub(super) fn filesystems(&mut self, root: &Node) {
        let Some(list) = root.find(&["storage", "filesystems"]) else {
            return;
        };
        let disks = root.find(&["storage", "disks"]).map(Node::items).unwrap_or_default();
        let disks: HashMap<&str, &Node> = disks.iter().map(|disk| (text(disk, "device"), disk)).collect();
        let place = Place::ROOT.key("storage");
        let place = place.key("filesystems");
        for (index, filesystem) in list.items().iter().enumerate() {
            let place = place.index(index);
            self.filesystem(filesystem, &place);
            let device = text(filesystem, "device");
            let Some(disk) = disks.get(device) else { continue };
            let (node, place) = (at(filesystem, "device"), place.key("device"));
            if disk.get("partitions").is_some_and(|list| !list.items().is_empty()) {
                let message = "this is a disk with partitions, which the filesystem overwrites";
                self.report.warning(node, &place, message);
            } else if is_true(disk, "wipeTable") && !is_true(filesystem, "wipeFilesystem") {
                let message = "this disk's table is wiped, and with it the filesystem: wipeFilesystem would say so";
                self.report.warning(node, &place, message);
            }
        }
        self.once(Some(list), &place, Key::Name("device"));
    }

    fn filesystem(&mut self, filesystem: &Node, place: &Place<'_>) {
        let device = at(filesystem, "device");
        let outcome = rules::absolute_and_clean(text(filesystem, "device"));
        self.expect(device, &place.key("device"), outcome);
        if let Some(path) = filesystem.text("path").filter(|path| !path.is_empty()) {
            let outcome = rules::absolute_and_clean(path);
            self.expect(at(filesystem, "path"), &place.key("path"), outcome);
        }
        let format = text(filesystem, "format");
        let label = text(filesystem, "label");
        let (node, place_of_format) = (at(filesystem, "format"), place.key("format"));
        match format {
            "ext4" | "btrfs" | "xfs" | "swap" | "vfat" => {}
            "none" if self.minor >= 3 => {}
            "" => {
                let texts = ["path", "label", "uuid"]
                    .iter()
                    .any(|key| !text(filesystem, key).is_empty());
                let lists = ["mountOptions", "options"]
                    .iter()
                    .any(|key| matches!(filesystem.get(key).map(|list| &list.value), Some(Value::List(list)) if !list.is_empty()));
                if texts || lists || is_true(filesystem, "wipeFilesystem") {
                    let message = "is missing, which all else that is said of the filesystem needs";
                    self.report.error(node, &place_of_format, message);
                }
            }
            _ => {
                let none = if self.minor >= 3 { ", none" } else { "" };
                let message = format!("is no format: ext4, btrfs, xfs, swap, vfat{none} are");
                self.report.error(node, &place_of_format, message);
            }
        }
        let outcome = rules::filesystem_label(format, label);
        self.expect(at(filesystem, "label"), &place.key("label"), outcome);
    }
}
