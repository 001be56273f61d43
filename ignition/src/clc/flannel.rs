//! Section `flannel`: options of the unit `flanneld.service`, and the network that it finds in etcd.

use super::{platform::Platform, semver, service, service::Wrapper};
use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
    shape::{Language, boolean, text},
    text,
};

/// Options of flannel, in the order of their flags. A version is 5 for 0.5, 6 for 0.6, 7 for 0.7.
const LANGUAGE: Language = Language {
    fields: &[
        text("version"),
        text("network_config"),
        text("etcd_username").since(6).until(NEWEST_MINOR),
        text("etcd_password").since(6).until(NEWEST_MINOR),
        text("etcd_endpoints").until(NEWEST_MINOR),
        text("etcd_cafile").until(NEWEST_MINOR),
        text("etcd_certfile").until(NEWEST_MINOR),
        text("etcd_keyfile").until(NEWEST_MINOR),
        text("etcd_prefix").until(NEWEST_MINOR),
        text("ip_masq").until(NEWEST_MINOR),
        text("subnet_file").until(NEWEST_MINOR),
        text("interface").until(NEWEST_MINOR),
        text("public_ip").until(NEWEST_MINOR),
        boolean("kube_subnet_mgr").since(7).until(NEWEST_MINOR),
    ],
    version_name: |version| match version {
        ONE => "a flannel that ct knows".to_owned(),
        minor => format!("flannel 0.{minor}"),
    },
};

/// The last version whose options are known.
const NEWEST_MINOR: u8 = 7;
/// Flannel 1.0 and later, of which ct 0.9 knows no option.
const ONE: u8 = u8::MAX;
/// The version whose options are taken if none is named.
const DEFAULT_MINOR: u8 = 6;

/// What writes the network, and how it is called there.
const ETCDCTL_FLAGS: &[(&str, &str)] = &[
    ("etcd_endpoints", "endpoints"),
    ("etcd_cafile", "ca-file"),
    ("etcd_certfile", "cert-file"),
    ("etcd_keyfile", "key-file"),
];

/// The unit that the section asks for; None if something is wrong with it, which the report has.
pub(super) fn unit(section: Node, platform: Option<Platform>, report: &mut Report) -> Option<Node> {
    let place = Place::ROOT.key("flannel");
    let position = section.position;
    let (version, tag) = match &section.value {
        Value::Map(map) => options_version(map, &place, report)?,
        _ => {
            report.error(&section, &place, "a map of flannel's options is expected here");
            return None;
        }
    };
    let mut shaped = LANGUAGE.shape_at(section, version, &place, report);
    let options = shaped.as_map_mut()?;
    options.remove("version");
    let network = options
        .remove("network_config")
        .filter(|node| node.as_text() != Some(""));
    if let Some(network) = &network {
        check_network(network, options, &place, report);
    }
    let mut wrapper = Wrapper::new("/usr/lib/coreos/flannel-wrapper $FLANNEL_OPTS", tag);
    let flag_of = |key: &str| match key {
        "interface" => "iface".to_owned(),
        _ => key.replace('_', "-"),
    };
    wrapper.add_flags(options, platform, flag_of, &place, report);
    let mut contents = wrapper.contents();
    if let Some(network) = network.as_ref().and_then(Node::as_text) {
        contents.push_str("\nExecStartPre=/usr/bin/etcdctl");
        for (key, flag) in ETCDCTL_FLAGS {
            if let Some(value) = options.get(key).and_then(Node::as_text) {
                contents.push_str(&format!(" --{flag}={}", service::quoted(value)));
            }
        }
        contents.push_str(&format!(" set /coreos.com/network/config {}", service::quoted(network)));
    }
    Some(service::enabled(
        "flanneld.service",
        "20-clct-flannel.conf",
        contents,
        position,
    ))
}

/// The version whose options the section takes, and what it says of the image.
fn options_version(section: &Map, place: &Place<'_>, report: &mut Report) -> Option<(u8, Option<String>)> {
    let Some((version, node)) = semver::of_section(section, place, report).ok()? else {
        return Some((DEFAULT_MINOR, None));
    };
    let place = place.key("version");
    if version.is_before(0, 5) {
        report.error(node, &place, "is too old: flannel 0.5.0 or later is expected");
        return None;
    }
    let minor = match (version.major, u8::try_from(version.minor)) {
        (0, Ok(minor)) if minor <= NEWEST_MINOR => minor,
        (0, _) => {
            let message = format!("is newer than what is known: it takes the options of flannel 0.{NEWEST_MINOR}");
            report.warning(node, &place, message);
            NEWEST_MINOR
        }
        _ => ONE,
    };
    Some((minor, Some(format!("FLANNEL_IMAGE_TAG=v{version}"))))
}

fn check_network(network: &Node, options: &Map, place: &Place<'_>, report: &mut Report) {
    let place = place.key("network_config");
    let parsed = text::parse_json(network.as_text().unwrap_or_default(), &mut Report::default());
    if !parsed.is_ok_and(|parsed| matches!(parsed.value, Value::Map(_) | Value::Null)) {
        report.error(
            network,
            &place,
            "a JSON object is expected, such as {\"Network\": \"10.1.0.0/16\"}",
        );
    }
    if options.get("kube_subnet_mgr").and_then(Node::as_bool) == Some(true) {
        let message = "cannot be given beside kube_subnet_mgr, with which Kubernetes has the network";
        report.error(network, &place, message);
    }
}
