//! `boot_device`: a LUKS or a mirror, or one on the other, for the disk that the system itself is on.

use super::{dialect::Dialect, is_true, items, mirror, text};
use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
};

/// The architectures, and the disks of s390x, whose partitions differ.
const LAYOUTS: [(&str, Layout); 6] = [
    ("aarch64", Layout::Aarch64),
    ("ppc64le", Layout::Ppc64le),
    ("s390x-eckd", Layout::S390xEckd),
    ("s390x-virt", Layout::S390xVirt),
    ("s390x-zfcp", Layout::S390xZfcp),
    ("x86_64", Layout::X86_64),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Aarch64,
    Ppc64le,
    S390xEckd,
    S390xVirt,
    S390xZfcp,
    X86_64,
}

impl Layout {
    fn is_s390x(self) -> bool {
        matches!(self, Self::S390xEckd | Self::S390xVirt | Self::S390xZfcp)
    }

    /// For disks that are known by their device alone: how their names begin, and the number of the root partition.
    fn root_partition(self) -> Option<(&'static str, u8)> {
        match self {
            Self::S390xEckd => Some(("/dev/dasd", 2)),
            Self::S390xZfcp => Some(("/dev/sd", 4)),
            _ => None,
        }
    }

    /// The root partition of a disk that is known by its device alone; None where it is known otherwise, or is no such disk.
    fn root_on(self, disk: &str) -> Option<String> {
        let (prefix, number) = self.root_partition()?;
        let (_, letter) = disk.split_once(prefix)?;
        matches!(letter.as_bytes(), [b'a'..=b'z']).then(|| format!("{disk}{number}"))
    }

    /// None where nothing is said; an error where it is none of those that the version knows.
    fn of(boot_device: &Node, place: &Place<'_>, dialect: Dialect, report: &mut Report) -> Option<Self> {
        let node = boot_device.get("layout")?;
        let name = node.as_text()?;
        let known = LAYOUTS
            .into_iter()
            .filter(|(_, layout)| dialect.level() >= 6 || !layout.is_s390x());
        let found = known.clone().find(|(known, _)| *known == name);
        if found.is_none() {
            let names: Vec<_> = known.map(|(name, _)| name).collect();
            let message = format!("{name:?} is no layout: one of {} is expected", names.join(", "));
            report.error(node, &place.key("layout"), message);
        }
        found.map(|(_, layout)| layout)
    }
}

/// A configuration of disks, RAIDs, volumes and filesystems; None where neither LUKS nor a mirror is wanted.
/// `root` is what it will be merged with.
pub(super) fn render(boot_device: &Node, root: &Node, dialect: Dialect, report: &mut Report) -> Option<Node> {
    let place = &Place::ROOT.key("boot_device");
    let layout = Layout::of(boot_device, place, dialect, report);
    // On s390x there is no mirror, and nothing is to be said of what it would have been.
    let mirrors = !layout.is_some_and(Layout::is_s390x);
    let devices = items(boot_device, &["mirror", "devices"]);
    let devices = if mirrors { devices } else { &[] };
    check_mirror(boot_device, place, layout, dialect, report);
    let empty = Node::default();
    let luks = boot_device.get("luks").unwrap_or(&empty);
    check_luks(luks, boot_device, place, layout, dialect, report);
    check_cex(luks, boot_device, place, layout, report);

    let wants_cex = is_cex(luks);
    let wants_luks = wants_cex || is_true(luks, "tpm2") || !items(luks, &["tang"]).is_empty();
    if !wants_luks && devices.is_empty() {
        return None;
    }
    let mut storage = Map::new();
    let mut root_device = "/dev/disk/by-partlabel/root".to_owned();
    if !devices.is_empty() {
        let cause = boot_device.get("mirror").unwrap_or(boot_device);
        mirror::check_levels(root, dialect, report);
        storage = mirror::render(devices, cause, layout.unwrap_or(Layout::X86_64));
        root_device = mirror::ROOT.to_owned();
    }
    if wants_luks {
        if let (Some(layout), Some(disk)) = (layout, text(luks, "device")) {
            root_device = layout.root_on(disk).unwrap_or(root_device);
        }
        let ours = |value: Value| Node::at(luks.position, value);
        let volume = volume(luks, root_device);
        storage.insert("luks", ours(vec![ours(volume.into())].into()));
        root_device = "/dev/mapper/root".to_owned();
    }
    let root = filesystem(boot_device, root_device, "xfs", "root".to_owned());
    storage.list_mut("filesystems").push(root);
    let storage = Node::at(boot_device.position, storage);
    Some(Node::at(boot_device.position, Map::from([("storage", storage)])))
}

/// A filesystem that takes the place of one of the system's own.
pub(super) fn filesystem(cause: &Node, device: String, format: &str, label: String) -> Node {
    let ours = |value: Value| Node::at(cause.position, value);
    ours(
        Map::from([
            ("device", ours(device.into())),
            ("format", ours(format.into())),
            ("label", ours(label.into())),
            ("wipeFilesystem", ours(true.into())),
        ])
        .into(),
    )
}

fn volume(luks: &Node, device: String) -> Map {
    let ours = |value: Value| Node::at(luks.position, value);
    let mut volume = Map::new();
    let (section, keys): (_, &[&str]) = if is_cex(luks) {
        ("cex", &[])
    } else {
        ("clevis", &["tang", "threshold", "tpm2"])
    };
    let mut opened_by = Map::new();
    if section == "cex" {
        opened_by.insert("enabled", ours(true.into()));
    }
    for key in keys {
        if let Some(node) = luks.get(key) {
            opened_by.insert(key, super::names::ignition(node.clone()));
        }
    }
    volume.insert(section, ours(opened_by.into()));
    volume.insert("device", ours(device.into()));
    if let Some(discard) = luks.get("discard") {
        volume.insert("discard", discard.clone());
    }
    volume.insert("label", ours("luks-root".into()));
    volume.insert("name", ours("root".into()));
    volume.insert("wipeVolume", ours(true.into()));
    volume
}

fn is_cex(luks: &Node) -> bool {
    luks.get("cex").is_some_and(|cex| is_true(cex, "enabled"))
}

fn check_mirror(boot_device: &Node, place: &Place<'_>, layout: Option<Layout>, dialect: Dialect, report: &mut Report) {
    let Some(mirror) = boot_device.get("mirror") else {
        return;
    };
    let devices = items(mirror, &["devices"]);
    if devices.is_empty() {
        return;
    }
    let mirror_place = place.key("mirror");
    if devices.len() == 1 {
        let node = mirror.get("devices").unwrap_or(mirror);
        report.error(node, &mirror_place.key("devices"), "a mirror has at least two devices");
    }
    if boot_device.get("layout").is_none() {
        let message = "a mirror needs boot_device.layout, such as x86_64";
        if dialect.level() >= 7 {
            report.error(mirror, &mirror_place, message);
        } else {
            report.warning(
                mirror,
                &mirror_place,
                format!("{message}, which is taken for granted here"),
            );
        }
    }
    if layout.is_some_and(Layout::is_s390x) {
        let node = boot_device.get("layout").unwrap_or(boot_device);
        report.error(node, &place.key("layout"), "on s390x there is no mirror");
    }
}

fn check_luks(
    luks: &Node,
    boot_device: &Node,
    place: &Place<'_>,
    layout: Option<Layout>,
    dialect: Dialect,
    report: &mut Report,
) {
    let device = text(luks, "device");
    let luks_place = place.key("luks");
    if let Some(layout) = layout
        && let Some((prefix, _)) = layout.root_partition()
        && device.and_then(|device| layout.root_on(device)).is_none()
    {
        let node = boot_device.get("layout").unwrap_or(boot_device);
        let message = format!("with this layout luks.device has to name the disk, as in {prefix}a");
        report.error(node, &place.key("layout"), message);
    }
    let opened = is_cex(luks)
        || is_true(luks, "tpm2")
        || items(luks, &["tang"])
            .iter()
            .any(|tang| tang.as_map().is_some_and(|map| !map.is_empty()));
    if dialect.level() >= 7 && device.is_some() && !opened {
        let node = luks.get("device").unwrap_or(luks);
        let message = "says nothing without a way to open the volume: tang, tpm2 or cex";
        report.error(node, &luks_place.key("device"), message);
    }
}

/// Keys in the crypto cards of s390x.
fn check_cex(luks: &Node, boot_device: &Node, place: &Place<'_>, layout: Option<Layout>, report: &mut Report) {
    if !is_cex(luks) {
        return;
    }
    let luks_place = place.key("luks");
    let cex = luks.get("cex").unwrap_or(luks);
    match boot_device.get("layout") {
        None => {
            let message = "there are crypto cards on s390x alone: boot_device.layout has to name one of its layouts";
            report.error(cex, &luks_place.key("cex"), message);
        }
        Some(node) if layout.is_some_and(|layout| !layout.is_s390x()) => {
            let message = "cex is for s390x alone";
            report.error(node, &place.key("layout"), message);
        }
        Some(_) => {}
    }
    if !items(luks, &["tang"]).is_empty() || is_true(luks, "tpm2") {
        report.error(luks, &luks_place, "cex goes with neither tang nor tpm2");
    }
}
