//! Disks, arrays and filesystems, and where these are mounted.

use std::collections::HashMap;

use super::{Translator, copy};
use crate::{
    node::{Map, Node},
    report::Place,
    rules::{self, int, is_true, text},
};

/// Sectors of 512 bytes.
const SECTORS_OF_MIB: i64 = 2048;

impl<'a> Translator<'a> {
    pub(super) fn storage(&mut self) -> Map {
        let mut out = Map::new();
        let mounts = self.mounts();
        self.directories_and_links(&mounts, &mut out);
        self.files(&mounts);
        self.networkd();
        let disks = self.disks();
        let files = std::mem::take(&mut self.files).into_iter().map(Node::ours).collect();
        let filesystems = self.filesystems(&mounts);
        let raid = self.list("storage", "raid").iter().map(array).collect();
        for (key, list) in [
            ("disks", disks),
            ("files", files),
            ("filesystems", filesystems),
            ("raid", raid),
        ] {
            let list: Vec<Node> = list;
            if !list.is_empty() {
                out.insert(key, Node::ours(list));
            }
        }
        out
    }

    /// Where filesystems are mounted, by their names; None where it cannot be told.
    fn mounts(&self) -> HashMap<&'a str, Option<String>> {
        let wheres = self.mount_units();
        let mut mounts = HashMap::from([("root", Some("/".to_owned()))]);
        for filesystem in self.list("storage", "filesystems") {
            let name = text(filesystem, "name");
            let place = match (filesystem.get("mount"), filesystem.text("path")) {
                (_, Some(path)) => {
                    // What Ignition 2 sees of the system to come is there.
                    let path = rules::clean(path);
                    path.strip_prefix("/sysroot")
                        .filter(|rest| rest.is_empty() || rest.starts_with('/'))
                        .map(|rest| rules::clean(&format!("/{rest}")))
                }
                (Some(_), None) if name == "root" => Some("/".to_owned()),
                (Some(mount), None) => {
                    let label = format!("/dev/disk/by-label/{}", text(mount, "label"));
                    let devices = [text(mount, "device"), label.as_str()];
                    devices.iter().find_map(|device| wheres.get(*device)).cloned()
                }
                (None, None) => None,
            };
            mounts.insert(name, place);
        }
        mounts
    }

    /// What the configuration's `.mount` units mount, and where.
    fn mount_units(&self) -> HashMap<String, String> {
        let mut wheres = HashMap::new();
        for unit in self.list("systemd", "units") {
            if !text(unit, "name").ends_with(".mount") {
                continue;
            }
            let mut section = "";
            let (mut what, mut place) = (None, None);
            for line in text(unit, "contents").lines().map(str::trim) {
                if line.starts_with('[') {
                    section = line;
                }
                let Some((key, value)) = line.split_once('=').filter(|_| section == "[Mount]") else {
                    continue;
                };
                match key.trim() {
                    "What" => what = Some(value.trim()),
                    "Where" => place = Some(value.trim()),
                    _ => {}
                }
            }
            if let (Some(what), Some(place)) = (what, place.filter(|place| place.starts_with('/'))) {
                let what = match what.split_once('=') {
                    Some((tag @ ("LABEL" | "PARTLABEL" | "UUID" | "PARTUUID"), value)) => {
                        format!("/dev/disk/by-{}/{value}", tag.to_ascii_lowercase())
                    }
                    _ => what.to_owned(),
                };
                wheres.insert(what, rules::clean(place));
            }
        }
        wheres
    }

    fn filesystems(&self, mounts: &HashMap<&'a str, Option<String>>) -> Vec<Node> {
        let mut out = Vec::new();
        for filesystem in self.list("storage", "filesystems") {
            // One with `path` is there already.
            let Some(mount) = filesystem.get("mount") else { continue };
            let mut translated = Map::new();
            if let Some(device) = mount.get("device") {
                let path = rules::clean(device.as_text().unwrap_or_default());
                translated.insert("device", Node::at(device.position, path));
            }
            copy(
                mount,
                &mut translated,
                &["format", "label", "options", "uuid", "wipeFilesystem"],
            );
            if let Some(create) = mount.get("create") {
                copy(create, &mut translated, &["options"]);
                if is_true(create, "force") {
                    translated.insert("wipeFilesystem", Node::at(rules::at(create, "force").position, true));
                }
            }
            let name = text(filesystem, "name");
            if let Some(Some(place)) = mounts.get(name).filter(|_| name != "root") {
                translated.insert("path", Node::at(filesystem.position, place.as_str()));
            }
            out.push(Node::at(mount.position, translated));
        }
        out
    }

    fn disks(&mut self) -> Vec<Node> {
        let place = Place::ROOT.key("storage");
        let place = place.key("disks");
        let mut out = Vec::new();
        for (index, disk) in self.list("storage", "disks").iter().enumerate() {
            let place = place.index(index);
            let place = place.key("partitions");
            let mut translated = Map::new();
            if let Some(device) = disk.get("device") {
                let path = rules::clean(device.as_text().unwrap_or_default());
                translated.insert("device", Node::at(device.position, path));
            }
            copy(disk, &mut translated, &["wipeTable"]);
            if let Some(partitions) = disk.get("partitions") {
                let items = partitions.items().iter().enumerate();
                let items: Vec<Node> = items
                    .map(|(index, partition)| self.partition(partition, &place.index(index)))
                    .collect();
                translated.insert("partitions", Node::at(partitions.position, items));
            }
            out.push(Node::at(disk.position, translated));
        }
        out
    }

    fn partition(&mut self, partition: &Node, place: &Place<'_>) -> Node {
        let mut out = Map::new();
        copy(
            partition,
            &mut out,
            &[
                "guid",
                "label",
                "number",
                "shouldExist",
                "sizeMiB",
                "startMiB",
                "typeGuid",
                "wipePartitionEntry",
            ],
        );
        for (key, instead) in [("size", "sizeMiB"), ("start", "startMiB")] {
            let (Some(node), Some(sectors)) = (partition.get(key), int(partition, key)) else {
                continue;
            };
            if sectors % SECTORS_OF_MIB == 0 {
                out.insert(instead, Node::at(node.position, sectors / SECTORS_OF_MIB));
            } else {
                let message = format!(
                    "Ignition 3 measures in MiB, and {sectors} sectors are no whole number of them: a multiple of \
                     {SECTORS_OF_MIB} is expected"
                );
                self.refuse(node, &place.key(key), message);
            }
        }
        Node::at(partition.position, out)
    }
}

fn array(array: &Node) -> Node {
    let mut out = Map::new();
    copy(array, &mut out, &["devices", "level", "name", "options"]);
    if int(array, "spares").is_some_and(|spares| spares != 0) {
        copy(array, &mut out, &["spares"]);
    }
    Node::at(array.position, out)
}
