//! Container Linux Config, as `ct` 0.9 reads it: what it writes, this writes, down to the last byte of every file and unit.
//! (<https://github.com/coreos/container-linux-config-transpiler/tree/v0.9.0>)

mod dynamic_data;
mod etcd;
mod flannel;
mod language;
mod names;
mod platform;
mod quantity;
mod semver;
mod service;
mod storage;
mod update;
mod verification;

use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
    transpile::{Options, Translation},
    version::Version,
};

pub use platform::Platform;
pub(crate) use service::quoted;

/// The version of Ignition that ct writes.
const VERSION: Version = Version::v2(2);

pub(crate) fn translate(mut tree: Node, options: &Options<'_>, report: &mut Report) -> Option<Translation> {
    if tree.value == Value::Null {
        report.warning(&tree, &Place::ROOT, "the configuration is empty");
        tree.value = Map::new().into();
    }
    let platform = options.platform;
    let mut units = service::of_platform(platform);
    let mut take = |key: &str| tree.as_map_mut()?.remove(key).filter(|node| node.value != Value::Null);
    let (etcd, flannel) = (take("etcd"), take("flannel"));
    let mut root = language::LANGUAGE.shape(tree, 0, report);
    let map = root.as_map_mut()?;

    let (update, locksmith) = (map.remove("update"), map.remove("locksmith"));
    units.extend(map.remove("docker").as_ref().map(docker_unit));
    units.extend(etcd.and_then(|section| etcd::unit(section, platform, report)));
    units.extend(flannel.and_then(|section| flannel::unit(section, platform, report)));
    units.append(map.map_mut("systemd").list_mut("units"));
    map.map_mut("systemd").insert("units", Node::ours(units));

    let storage = map.map_mut("storage");
    storage::translate(storage, options.files, report);
    if let Some(file) = update::file(update.as_ref(), locksmith.as_ref(), report) {
        storage.list_mut("files").push(file);
    }
    // ct writes these even when there is nothing in them.
    for section in ["networkd", "passwd"] {
        map.map_mut(section);
    }
    let ignition = map.map_mut("ignition");
    ignition.map_mut("config");
    ignition.map_mut("timeouts");
    ignition.map_mut("security").map_mut("tls");

    check_ids(&root, report);
    verification::translate(&mut root, "", &Place::ROOT, report);
    Some((VERSION, names::renamed(root, "")))
}

/// Ignition would take a number below 0 for some of them, ct does not.
fn check_ids(root: &Node, report: &mut Report) {
    let passwd = Place::ROOT.key("passwd");
    let mut check = |list: &str, path: &[&str]| {
        let items = root.find(&["passwd", list]).map(Node::items).unwrap_or_default();
        for (index, item) in items.iter().enumerate() {
            if let Some(node) = item.find(path).filter(|node| node.as_int().is_some_and(|id| id < 0)) {
                let place = passwd.key(list);
                let place = place.index(index);
                let message = format!("{} cannot be below 0", path.join("."));
                report.error(node, &place, message);
            }
        }
    };
    check("users", &["create", "uid"]);
    check("groups", &["gid"]);
}

fn docker_unit(docker: &Node) -> Node {
    let flags: Vec<_> = docker
        .get("flags")
        .map(Node::items)
        .unwrap_or_default()
        .iter()
        .filter_map(Node::as_text)
        .collect();
    service::enabled(
        "docker.service",
        "20-clct-docker.conf",
        format!("[Service]\nEnvironment=\"DOCKER_OPTS={}\"", flags.join(" ")),
        docker.position,
    )
}
