//! Partitions of the system's own disk, whose labels and numbers mean something.

use super::{dialect::Dialect, is_true, items};
use crate::{
    node::Node,
    report::{Place, Report},
};

/// The labels of Fedora CoreOS's own partitions, and their numbers.
const OWN: [(&str, i64); 5] = [
    ("BIOS-BOOT", 1),
    ("PowerPC-PReP-boot", 1),
    ("EFI-SYSTEM", 2),
    ("boot", 3),
    ("root", 4),
];
/// What the root filesystem has to hold in time: several deployments of the system.
const ROOT_MIN_MIB: i64 = 8192;
/// Ignition's name for the disk that was booted from.
const BOOT_DISK: &str = "/dev/disk/by-id/coreos-boot-disk";

/// Warns of partitions that have a label alone, on a disk whose partitions are kept: a label does not find one again.
pub(super) fn check_numbers(source: &Node, dialect: Dialect, report: &mut Report) {
    if !matches!(dialect, Dialect::Fcos(6..)) {
        return;
    }
    let storage = Place::ROOT.key("storage");
    let disks = storage.key("disks");
    for (index, disk) in items(source, &["storage", "disks"]).iter().enumerate() {
        if disk.text("device") == Some(BOOT_DISK) || is_true(disk, "wipe_table") {
            continue;
        }
        let disk_place = disks.index(index);
        let place = disk_place.key("partitions");
        for (index, partition) in items(disk, &["partitions"]).iter().enumerate() {
            if number(partition) == 0 && partition.get("label").is_some() {
                let node = partition.get("number").unwrap_or(partition);
                let message = format!(
                    "is missing: a label does not find a partition again, but on {BOOT_DISK}; \
                     a number does, or wipe_table is wanted"
                );
                report.warning(node, &place.index(index).key("number"), message);
            }
        }
    }
}

/// Warns of partitions of the outcome that would not be what their label says, and of a root that is or stays too small.
pub(super) fn check(root: &Node, dialect: Dialect, report: &mut Report) {
    let Dialect::Fcos(minor) = dialect else { return };
    let storage = Place::ROOT.key("storage");
    let disks = storage.key("disks");
    for (index, disk) in items(root, &["storage", "disks"]).iter().enumerate() {
        let kept = !is_true(disk, "wipeTable");
        let partitions = items(disk, &["partitions"]);
        let disk_place = disks.index(index);
        let place = disk_place.key("partitions");
        let starts_anywhere = partitions.iter().filter(|partition| start(partition) == 0).count();
        for (index, partition) in partitions.iter().enumerate() {
            let Some(label) = partition.get("label") else { continue };
            let Some(name) = label.as_text() else { continue };
            let place = place.index(index);
            if name == "root" && minor >= 3 {
                let others_anywhere = starts_anywhere - usize::from(start(partition) == 0);
                check_root(partition, label, others_anywhere > 0, &place, report);
            }
            let own = OWN.iter().find(|(own, _)| *own == name);
            if let Some((_, expected)) = own.filter(|(_, expected)| kept && number(partition) != *expected) {
                let message = format!(
                    "{name:?} is the label of the system's own partition {expected}; with another number this is a \
                     new partition"
                );
                report.warning(label, &place.key("label"), message);
            }
        }
    }
}

fn check_root(partition: &Node, label: &Node, others_anywhere: bool, place: &Place<'_>, report: &mut Report) {
    match partition.get("sizeMiB").and_then(Node::as_int).unwrap_or_default() {
        0 if others_anywhere => {
            let message = "the root partition takes what is free, but a partition without start_mib comes after it";
            report.warning(label, &place.key("label"), message);
        }
        0 => {}
        size if size < ROOT_MIN_MIB => {
            let node = partition.get("sizeMiB").unwrap_or(label);
            let message = format!("{size} MiB are few for the root partition: {ROOT_MIN_MIB} are advised");
            report.warning(node, &place.key("size_mib"), message);
        }
        _ => {}
    }
}

fn number(partition: &Node) -> i64 {
    partition.get("number").and_then(Node::as_int).unwrap_or_default()
}

fn start(partition: &Node) -> i64 {
    partition.get("startMiB").and_then(Node::as_int).unwrap_or_default()
}
