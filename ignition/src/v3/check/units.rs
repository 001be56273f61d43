//! systemd's units and their drop-ins.

use std::collections::HashMap;

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{Key, at, is_true, text, unit},
};

impl Check<'_> {
    pub(super) fn units(&mut self, root: &Node) {
        let Some(units) = root.find(&["systemd", "units"]) else {
            return;
        };
        let place = Place::ROOT.key("systemd");
        let place = place.key("units");
        // What each unit's contents say, where they say something that can be read.
        let mut contents = HashMap::new();
        for (index, item) in units.items().iter().enumerate() {
            if let Some(unit) = self.unit(item, &place.index(index)) {
                contents.insert(text(item, "name"), unit);
            }
        }
        for (index, item) in units.items().iter().enumerate() {
            let Some(template) = template_of(text(item, "name")).filter(|_| is_true(item, "enabled")) else {
                continue;
            };
            if contents.get(template.as_str()).is_some_and(|unit| !unit.has_install) {
                let message =
                    format!("is enabled, but its template {template} has no [Install] section that says for what");
                self.report.warning(item, &place.index(index), message);
            }
        }
        self.once(Some(units), &place, Key::Name("name"));
    }

    fn unit(&mut self, item: &Node, place: &Place<'_>) -> Option<unit::Unit> {
        let name = text(item, "name");
        self.expect(at(item, "name"), &place.key("name"), unit::check_name(name));
        let dropins = place.key("dropins");
        for (index, dropin) in item
            .get("dropins")
            .map(Node::items)
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            let place = dropins.index(index);
            self.expect(
                at(dropin, "name"),
                &place.key("name"),
                unit::check_dropin_name(text(dropin, "name")),
            );
            let contents = unit::parse(text(dropin, "contents"));
            self.expect(at(dropin, "contents"), &place.key("contents"), contents.map(|_| ()));
        }
        self.once(item.get("dropins"), &dropins, Key::Name("name"));
        let contents = item.text("contents").filter(|text| !text.is_empty())?;
        let place = place.key("contents");
        match unit::parse(contents) {
            Ok(unit) => {
                if is_true(item, "enabled") && !unit.has_install {
                    let message = "is enabled, but has no [Install] section that says for what: nothing will start it";
                    self.report.warning(at(item, "contents"), &place, message);
                }
                Some(unit)
            }
            Err(message) => {
                self.report.error(at(item, "contents"), &place, message);
                None
            }
        }
    }
}

/// `name@.service` of `name@instance.service`.
fn template_of(name: &str) -> Option<String> {
    let (begin, instance) = name.strip_suffix(".service")?.split_once('@')?;
    (!begin.is_empty() && !instance.is_empty()).then(|| format!("{begin}@.service"))
}
