//! What is fetched, and the section that says how: `ignition`.

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{Key, at, contents::Hash, text, url},
};

impl Check<'_> {
    pub(super) fn ignition(&mut self, root: &Node) {
        let Some(ignition) = root.get("ignition") else { return };
        let place = Place::ROOT.key("ignition");
        if let Some(config) = ignition.get("config") {
            let place = place.key("config");
            // In 3.0 a configuration without a source is passed over.
            self.references(config.get("merge"), &place.key("merge"), self.minor >= 1);
            if let Some(replace) = config.get("replace") {
                self.reference(replace, &place.key("replace"));
            }
        }
        if let Some(proxy) = ignition.get("proxy") {
            self.proxy(proxy, &place.key("proxy"));
        }
        let (security, tls) = (place.key("security"), "tls");
        let authorities = ignition.find(&["security", tls, "certificateAuthorities"]);
        self.references(authorities, &security.key(tls).key("certificateAuthorities"), true);
    }

    fn references(&mut self, list: Option<&Node>, place: &Place<'_>, required: bool) {
        let Some(list) = list else { return };
        for (index, item) in list.items().iter().enumerate() {
            let place = place.index(index);
            if required && text(item, "source").is_empty() {
                self.report
                    .error(at(item, "source"), &place.key("source"), "is missing");
            }
            self.reference(item, &place);
        }
        self.once(Some(list), place, Key::Source("source"));
    }

    /// A configuration or a certificate.
    fn reference(&mut self, reference: &Node, place: &Place<'_>) {
        if self.minor == 0 {
            self.source(reference, place);
            self.hash(reference, place);
        } else {
            self.resource(reference, place);
        }
    }

    /// Anything that Ignition fetches.
    pub(super) fn resource(&mut self, resource: &Node, place: &Place<'_>) {
        let compression = text(resource, "compression");
        if !["", "gzip"].contains(&compression) {
            let node = at(resource, "compression");
            let message = "is no compression: gzip is the only one";
            self.report.error(node, &place.key("compression"), message);
        }
        self.source(resource, place);
        if resource.find(&["verification", "hash"]).is_some() && resource.get("source").is_none() {
            let node = at(resource, "verification");
            let message = "there is nothing to verify: `source` is missing";
            self.report.error(node, &place.key("verification"), message);
        }
        self.hash(resource, place);
        if let Some(headers) = resource.get("httpHeaders") {
            self.headers(resource, headers, &place.key("httpHeaders"));
        }
    }

    fn source(&mut self, resource: &Node, place: &Place<'_>) {
        let schemes: &[&str] = match self.minor {
            0 | 1 => &["http", "https", "tftp", "s3"],
            2 | 3 => &["http", "https", "tftp", "s3", "gs"],
            _ => &["http", "https", "tftp", "s3", "gs", "arn"],
        };
        if let Some(source) = resource.get("source")
            && let Some(text) = source.as_text().filter(|text| !text.is_empty())
        {
            self.expect(source, &place.key("source"), url::check_source(text, schemes));
        }
    }

    fn hash(&mut self, resource: &Node, place: &Place<'_>) {
        let Some(node) = resource.find(&["verification", "hash"]) else {
            return;
        };
        let Some(text) = node.as_text() else { return };
        let place = place.key("verification");
        let outcome = Hash::parse(text, self.minor >= 1).and_then(|hash| match resource.get("source") {
            Some(_) => self.inspector.verify(resource, hash),
            None => Ok(()),
        });
        self.expect(node, &place.key("hash"), outcome);
    }

    fn headers(&mut self, resource: &Node, headers: &Node, place: &Place<'_>) {
        if !headers.items().is_empty() {
            let scheme = url::parse(text(resource, "source")).map(|url| url.scheme);
            if !scheme.is_ok_and(|scheme| ["http", "https"].contains(&scheme.as_str())) {
                let message = "only what is fetched by http or https has headers";
                self.report.error(headers, place, message);
            }
        }
        for (index, header) in headers.items().iter().enumerate() {
            let place = place.index(index);
            if text(header, "name").is_empty() {
                self.report.error(at(header, "name"), &place.key("name"), "is missing");
            }
            if header.text("value") == Some("") {
                let message = "is empty; without `value` the header is taken out of what it is merged with";
                self.report.error(at(header, "value"), &place.key("value"), message);
            }
        }
        self.once(Some(headers), place, Key::Name("name"));
    }

    fn proxy(&mut self, proxy: &Node, place: &Place<'_>) {
        for key in ["httpProxy", "httpsProxy"] {
            let Some(node) = proxy.get(key) else { continue };
            let place = place.key(key);
            match node.as_text().map(url::parse) {
                Some(Ok(url)) if url.scheme == "http" && key == "httpsProxy" => {
                    let message = "what is asked for by https goes to this proxy unencrypted: https://... is expected";
                    self.report.warning(node, &place, message);
                }
                Some(Ok(url)) if ["http", "https"].contains(&url.scheme.as_str()) => {}
                Some(Ok(_)) => self
                    .report
                    .error(node, &place, "is no proxy: http://... or https://... is expected"),
                Some(Err(message)) => self.report.error(node, &place, message),
                None => {}
            }
        }
        self.once(proxy.get("noProxy"), &place.key("noProxy"), Key::Itself);
    }
}
