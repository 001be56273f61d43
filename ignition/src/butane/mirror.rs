//! The system's own disk, twice or more: partitions as the image has them, and a RAID 1 over those that are written to.

use super::{
    boot_device::{Layout, filesystem},
    dialect::Dialect,
    items, text,
};
use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
};

/// The RAID with the root filesystem.
pub(super) const ROOT: &str = "/dev/md/md-root";

/// A partition of each disk: how its label begins, its size, its type.
type Part = (&'static str, i64, Option<&'static str>);

// Sizes and types are those of the image; no partition may be smaller than the one that it takes the place of.
const BIOS: Part = ("bios", 1, Some("21686148-6449-6E6F-744E-656564454649"));
const PREP: Part = ("prep", 4, Some("9E1A2D38-C612-4316-AA26-8B49521E5A8B"));
const RESERVED: Part = ("reserved", 1, Some("8DA63339-0007-60C0-C436-083AC8230908"));
const ESP: Part = ("esp", 127, Some("C12A7328-F81F-11D2-BA4B-00A0C93EC93B"));
const BOOT: Part = ("boot", 384, None);

/// The `storage` of a mirror over the devices.
pub(super) fn render(devices: &[Node], cause: &Node, layout: Layout) -> Map {
    let (first, second) = match layout {
        Layout::X86_64 => (BIOS, ESP),
        Layout::Aarch64 => (RESERVED, ESP),
        Layout::Ppc64le => (PREP, RESERVED),
        // There is no mirror on these; nothing but a report comes of it.
        Layout::S390xEckd | Layout::S390xVirt | Layout::S390xZfcp => (RESERVED, RESERVED),
    };
    let mut disks = Vec::new();
    let mut filesystems = Vec::new();
    for (number, device) in (1..).zip(devices) {
        disks.push(disk(device, number, [first, second]));
        if second == ESP {
            let label = format!("esp-{number}");
            filesystems.push(filesystem(device, by_label(&label), "vfat", label));
        }
    }
    let raids = vec![
        // With its superblock at the end, a firmware that knows nothing of RAIDs reads it too.
        raid(cause, "boot", devices.len(), Some("--metadata=1.0")),
        raid(cause, "root", devices.len(), None),
    ];
    filesystems.push(filesystem(
        cause,
        "/dev/md/md-boot".to_owned(),
        "ext4",
        "boot".to_owned(),
    ));
    let ours = |items: Vec<Node>| Node::at(cause.position, items);
    Map::from([
        ("disks", ours(disks)),
        ("raid", ours(raids)),
        ("filesystems", ours(filesystems)),
    ])
}

/// Before Ignition 3.3 a level that is not said is an empty one, which goes before the mirror's when the two are merged.
pub(super) fn check_levels(root: &Node, dialect: Dialect, report: &mut Report) {
    if dialect.ignition().minor() >= 3 {
        return;
    }
    let storage = Place::ROOT.key("storage");
    let place = storage.key("raid");
    for (index, raid) in items(root, &["storage", "raid"]).iter().enumerate() {
        let of_mirror = matches!(raid.text("name"), Some("md-boot" | "md-root"));
        if of_mirror && text(raid, "level").is_none() {
            let message = "is missing: in this version the mirror's RAIDs are changed by those alone that say raid1";
            report.error(raid, &place.index(index).key("level"), message);
        }
    }
}

fn by_label(label: &str) -> String {
    format!("/dev/disk/by-partlabel/{label}")
}

fn disk(device: &Node, number: usize, own: [Part; 2]) -> Node {
    let ours = |value: Value| Node::at(device.position, value);
    let partition = |(label, size, guid): Part| {
        let mut partition = Map::from([
            ("label", ours(format!("{label}-{number}").into())),
            ("sizeMiB", ours(size.into())),
        ]);
        if let Some(guid) = guid {
            partition.insert("typeGuid", ours(guid.into()));
        }
        ours(partition.into())
    };
    let mut partitions: Vec<Node> = own.into_iter().chain([BOOT]).map(partition).collect();
    let root = Map::from([("label", ours(format!("root-{number}").into()))]);
    partitions.push(ours(root.into()));
    ours(
        Map::from([
            ("device", device.clone()),
            ("partitions", ours(partitions.into())),
            ("wipeTable", ours(true.into())),
        ])
        .into(),
    )
}

fn raid(cause: &Node, label: &str, count: usize, option: Option<&str>) -> Node {
    let ours = |value: Value| Node::at(cause.position, value);
    let devices: Vec<Node> = (1..=count)
        .map(|number| ours(by_label(&format!("{label}-{number}")).into()))
        .collect();
    let mut raid = Map::from([
        ("devices", ours(devices.into())),
        ("level", ours("raid1".into())),
        ("name", ours(format!("md-{label}").into())),
    ]);
    if let Some(option) = option {
        raid.insert("options", ours(vec![ours(option.into())].into()));
    }
    ours(raid.into())
}
