//! Encrypted devices.

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{self, Key, at, int, is_true, text, url},
};

/// LUKS2 has 48 bytes for it, one of which ends it.
const LABEL_MAX: usize = 47;

impl Check<'_> {
    pub(super) fn luks(&mut self, root: &Node) {
        let Some(list) = root.find(&["storage", "luks"]) else {
            return;
        };
        let place = Place::ROOT.key("storage");
        let place = place.key("luks");
        for (index, item) in list.items().iter().enumerate() {
            self.encrypted(item, &place.index(index));
        }
        self.once(Some(list), &place, Key::Name("name"));
    }

    fn encrypted(&mut self, item: &Node, place: &Place<'_>) {
        if text(item, "name").contains('/') {
            self.report
                .error(at(item, "name"), &place.key("name"), "cannot have a slash");
        }
        if text(item, "label").len() > LABEL_MAX {
            let message = format!("is too long: {LABEL_MAX} bytes are the most");
            self.report.error(at(item, "label"), &place.key("label"), message);
        }
        let outcome = rules::absolute_and_clean(text(item, "device"));
        self.expect(at(item, "device"), &place.key("device"), outcome);
        let key_file = item.get("keyFile");
        if let Some(key_file) = key_file {
            self.resource(key_file, &place.key("keyFile"));
        }
        self.once(item.get("openOptions"), &place.key("openOptions"), Key::Itself);
        if let Some(clevis) = item.get("clevis") {
            self.clevis(clevis, &place.key("clevis"));
        }
        let Some(cex) = item.get("cex").filter(|cex| is_true(cex, "enabled")) else {
            return;
        };
        if item.get("clevis").is_some_and(is_clevis) {
            self.report.error(cex, &place.key("cex"), "cannot be with clevis");
        }
        if key_file.is_some_and(|key_file| !text(key_file, "source").is_empty()) {
            self.report.error(cex, &place.key("cex"), "cannot be with a key file");
        }
    }

    fn clevis(&mut self, clevis: &Node, place: &Place<'_>) {
        if let Some(custom) = clevis.get("custom") {
            // In 3.2 it is enough that it is there.
            let is_used = self.minor == 2 || !text(custom, "pin").is_empty();
            if is_used && has_pins(clevis) {
                let message = "custom cannot be with tpm2, tang or threshold";
                self.report.error(custom, &place.key("custom"), message);
            }
            self.custom(custom, &place.key("custom"));
        }
        let place = place.key("tang");
        let tang = clevis.get("tang");
        for (index, server) in tang.map(Node::items).unwrap_or_default().iter().enumerate() {
            self.tang(server, &place.index(index));
        }
        self.once(tang, &place, Key::Source("url"));
    }

    fn custom(&mut self, custom: &Node, place: &Place<'_>) {
        let pin = text(custom, "pin");
        let config = text(custom, "config");
        let needs_network = self.minor >= 3 && is_true(custom, "needsNetwork");
        if pin.is_empty() && config.is_empty() && !needs_network {
            return;
        }
        if pin.is_empty() {
            self.report.error(at(custom, "pin"), &place.key("pin"), "is missing");
        } else if self.minor < 6 && !["tpm2", "tang", "sss"].contains(&pin) {
            let message = "is no pin that is known before 3.6.0: tpm2, tang, sss are";
            self.report.error(at(custom, "pin"), &place.key("pin"), message);
        }
        if config.is_empty() {
            self.report
                .error(at(custom, "config"), &place.key("config"), "is missing");
        }
    }

    fn tang(&mut self, server: &Node, place: &Place<'_>) {
        let outcome = url::parse(text(server, "url")).and_then(|url| match url.scheme.as_str() {
            "http" | "https" => Ok(()),
            _ => Err("is no server's: http://... or https://... is expected".to_owned()),
        });
        self.expect(at(server, "url"), &place.key("url"), outcome);
        if text(server, "thumbprint").is_empty() {
            let place = place.key("thumbprint");
            self.report.error(at(server, "thumbprint"), &place, "is missing");
        }
        let advertisement = text(server, "advertisement");
        if !advertisement.is_empty() && serde_json::from_str::<serde::de::IgnoredAny>(advertisement).is_err() {
            let place = place.key("advertisement");
            self.report.error(at(server, "advertisement"), &place, "is no JSON");
        }
    }
}

fn has_pins(clevis: &Node) -> bool {
    clevis.get("tang").is_some_and(|tang| !tang.items().is_empty())
        || is_true(clevis, "tpm2")
        || int(clevis, "threshold").is_some_and(|threshold| threshold != 0)
}

fn is_clevis(clevis: &Node) -> bool {
    has_pins(clevis)
        || clevis
            .find(&["custom", "pin"])
            .is_some_and(|pin| pin.as_text() != Some(""))
}
