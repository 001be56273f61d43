//! cloud-config, as coreos-cloudinit 1.14 reads it. That ran at every boot, in the running system; Ignition runs once, before
//! the first boot. What the two do is the same for whoever looks at the machine afterwards; what would not be is refused.
//! (<https://github.com/coreos/coreos-cloudinit/tree/v1.14.0>)

mod addresses;
mod file;
mod language;
mod refused;
mod script;
mod service;
mod unit;
mod user;

use file::Files;
use unit::Units;

use crate::{
    kind::Kind,
    node::{Map, Node, Value},
    report::{Place, Report},
    transpile::{Options, Translation},
    version::Version,
};

pub use addresses::Addresses;

/// A version that both guests of version 2 take and version 3 can say.
const VERSION: Version = Version::v2(2);

/// The first line decides: coreos-cloudinit goes by nothing else.
///
/// # Errors
/// When the text is said to be a cloud-config or a script and does not begin like one.
pub(crate) fn check_first_line(kind: Kind, text: &str) -> Result<(), Report> {
    let expected = match kind {
        Kind::CloudConfig => "#cloud-config",
        Kind::Script => "#!",
        _ => return Ok(()),
    };
    if Kind::of_first_line(text) == Some(kind) {
        return Ok(());
    }
    let place = crate::node::Position { line: 1, column: 1 };
    let message = format!("the first line of a {kind} has to be `{expected}`").replace("be `#!`", "begin with `#!`");
    Err(Report::of(Some(place), "", message))
}

pub(crate) fn translate(tree: Node, options: &Options<'_>, report: &mut Report) -> Option<Translation> {
    let mut tree = options.addresses.put_into(tree, &Place::ROOT, report);
    if tree.value == Value::Null {
        report.warning(&tree, &Place::ROOT, "the configuration is empty");
        tree.value = Map::new().into();
    }
    refused::take_out(&mut tree, report);
    let root = language::LANGUAGE.shape(tree, 0, report);

    let mut files = Files::default();
    let mut units = Units::default();
    file::translate(&root, &mut files, report);
    unit::translate(&root, &mut units, &mut files, report);
    hostname(&root, options, &mut files, report);
    oem(&root, &mut files);
    update(&root, &mut files, &mut units, report);
    services(&root, &mut units, report);
    let users = user::translate(&root, report);
    Some(finished(files, units, users, options))
}

pub(crate) fn translate_script(text: &Node, options: &Options<'_>, report: &mut Report) -> Option<Translation> {
    let mut files = Files::default();
    let mut units = Units::default();
    let text = text.as_text().unwrap_or_default();
    script::translate(text, options, &mut files, &mut units, report);
    Some(finished(files, units, Vec::new(), options))
}

fn finished(mut files: Files, units: Units, users: Vec<Node>, options: &Options<'_>) -> Translation {
    const ENVIRONMENT: &str = "/etc/environment";
    let environment = options.addresses.environment();
    if !environment.is_empty() && !files.has(ENVIRONMENT) {
        files.write(ENVIRONMENT, &environment);
    }
    let links = units.links();
    let mut root = Map::new();
    let mut add = |section: &str, key: &str, items: Vec<Node>| {
        if !items.is_empty() {
            root.map_mut(section).insert(key, Node::ours(items));
        }
    };
    add("passwd", "users", users);
    add("storage", "files", files.into_list());
    add("storage", "links", links);
    add("systemd", "units", units.into_list());
    (VERSION, Node::ours(root))
}

/// The text of a key, if it says something.
fn given<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    node.text(key).filter(|text| !text.is_empty())
}

fn hostname(root: &Node, options: &Options<'_>, files: &mut Files, report: &mut Report) {
    let hostname = given(root, "hostname");
    if let Some(hostname) = hostname {
        files.write("/etc/hostname", &format!("{hostname}\n"));
    }
    let Some(node) = root.get("manage_etc_hosts").filter(|node| node.as_text() != Some("")) else {
        return;
    };
    let place = Place::ROOT.key("manage_etc_hosts");
    if node.as_text() != Some("localhost") {
        report.error(node, &place, "localhost is expected: nothing else is known here");
        return;
    }
    match hostname.or(options.addresses.hostname.as_deref()) {
        Some(hostname) => files.write("/etc/hosts", &format!("127.0.0.1 {hostname}\n")),
        None => report.error(node, &place, "needs the name of the machine at hostname"),
    }
}

fn oem(root: &Node, files: &mut Files) {
    let Some(oem) = root.find(&["coreos", "oem"]).filter(|oem| given(oem, "id").is_some()) else {
        return;
    };
    let said = |key: &str| oem.text(key).unwrap_or_default();
    let quoted = |key: &str| crate::clc::quoted(said(key));
    let release = format!(
        "ID={}\nVERSION_ID={}\nNAME={}\nHOME_URL={}\nBUG_REPORT_URL={}\n",
        said("id"),
        said("version_id"),
        quoted("name"),
        quoted("home_url"),
        quoted("bug_report_url")
    );
    files.write("/etc/oem-release", &release);
}

fn update(root: &Node, files: &mut Files, units: &mut Units, report: &mut Report) {
    let Some(update) = root.find(&["coreos", "update"]) else {
        return;
    };
    let mut lines = String::new();
    for (key, variable) in [
        ("group", "GROUP"),
        ("reboot_strategy", "REBOOT_STRATEGY"),
        ("server", "SERVER"),
    ] {
        if let Some(value) = given(update, key) {
            lines.push_str(&format!("{variable}={value}\n"));
        }
    }
    if let Some(node) = update.get("reboot_strategy") {
        match node.as_text().unwrap_or_default() {
            "" | "etcd-lock" | "reboot" => {}
            "off" => units.mask("locksmithd.service"),
            _ => {
                let place = Place::ROOT.key("coreos");
                let place = place.key("update");
                report.error(
                    node,
                    &place.key("reboot_strategy"),
                    "etcd-lock, reboot or off is expected",
                );
            }
        }
    }
    if !lines.is_empty() {
        files.write("/etc/coreos/update.conf", &lines);
    }
}

fn services(root: &Node, units: &mut Units, report: &mut Report) {
    let place = Place::ROOT.key("coreos");
    for service in service::SERVICES {
        let Some(node) = root.find(&["coreos", service.section]) else {
            continue;
        };
        let Some(section) = node.as_map() else { continue };
        let place = place.key(service.section);
        if let Some(deprecated) = service.deprecated {
            report.warning(node, &place, deprecated);
        }
        if let Some(content) = service::dropin(service, section, &place, report) {
            units.add_dropin(service.unit, content);
        }
    }
}
