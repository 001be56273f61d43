//! What Ignition itself refuses or warns of, once the keys and types are right.
//! (The rules of `config/v2_*/types` of Ignition 0.35; <https://coreos.github.io/ignition/specs/>.)

mod disks;
mod nodes;
mod passwd;
mod units;

use std::collections::HashSet;

use crate::{
    node::Node,
    report::{Place, Report},
    rules::{
        at,
        contents::{Hash, Inspector},
        text, url,
    },
};

/// Checks a configuration that was held against [`super::LANGUAGE`].
pub(crate) fn check(root: &Node, minor: u8, report: &mut Report) {
    let mut check = Check {
        minor,
        inspector: Inspector::default(),
        report,
    };
    check.ignition(root);
    check.networkd(root);
    check.passwd(root);
    check.disks(root);
    check.raid(root);
    check.filesystems(root);
    check.nodes(root);
    check.systemd(root);
}

struct Check<'a> {
    minor: u8,
    inspector: Inspector,
    report: &'a mut Report,
}

impl Check<'_> {
    /// Tells of the node if something is wrong with it.
    fn expect(&mut self, node: &Node, place: &Place<'_>, outcome: Result<(), String>) {
        if let Err(message) = outcome {
            self.report.error(node, place, message);
        }
    }

    fn ignition(&mut self, root: &Node) {
        let Some(ignition) = root.get("ignition") else { return };
        let place = Place::ROOT.key("ignition");
        if let Some(config) = ignition.get("config") {
            let place = place.key("config");
            self.fetched_all(config.get("append"), &place.key("append"));
            if let Some(replace) = config.get("replace") {
                self.fetched(replace, &place.key("replace"));
            }
        }
        let (security, tls) = (place.key("security"), "tls");
        let authorities = ignition.find(&["security", tls, "certificateAuthorities"]);
        self.fetched_all(authorities, &security.key(tls).key("certificateAuthorities"));
    }

    fn fetched_all(&mut self, list: Option<&Node>, place: &Place<'_>) {
        for (index, item) in list.map(Node::items).unwrap_or_default().iter().enumerate() {
            self.fetched(item, &place.index(index));
        }
    }

    /// Anything that Ignition fetches. An empty source stands for nothing.
    fn fetched(&mut self, node: &Node, place: &Place<'_>) {
        let schemes: &[&str] = match self.minor {
            0 => &["http", "https", "oem"],
            _ => &["http", "https", "oem", "tftp", "s3"],
        };
        let source = text(node, "source");
        if !source.is_empty() {
            let outcome = url::check_source(source, schemes);
            self.expect(at(node, "source"), &place.key("source"), outcome);
        }
        if !["", "gzip"].contains(&text(node, "compression")) {
            let message = "is no compression: gzip is the only one";
            self.report
                .error(at(node, "compression"), &place.key("compression"), message);
        }
        if let Some(hash) = node.find(&["verification", "hash"])
            && let Some(text) = hash.as_text()
        {
            let outcome = Hash::parse(text, false).and_then(|hash| self.inspector.verify(node, hash));
            self.expect(hash, &place.key("verification").key("hash"), outcome);
        }
        if let Some(headers) = node.get("httpHeaders") {
            self.headers(source, headers, &place.key("httpHeaders"));
        }
    }

    fn headers(&mut self, source: &str, headers: &Node, place: &Place<'_>) {
        let scheme = url::parse(source).map(|url| url.scheme);
        if !headers.items().is_empty() && !scheme.is_ok_and(|scheme| ["http", "https"].contains(&scheme.as_str())) {
            let message = "only what is fetched by http or https has headers";
            self.report.error(headers, place, message);
        }
        let mut names = HashSet::new();
        for (index, header) in headers.items().iter().enumerate() {
            let place = place.index(index);
            let name = text(header, "name");
            if name.is_empty() {
                self.report.error(at(header, "name"), &place.key("name"), "is missing");
            } else if !names.insert(name) {
                self.report
                    .error(at(header, "name"), &place.key("name"), "is there twice");
            }
        }
    }
}

#[cfg(test)]
mod tests;
