//! Units of systemd and networkd, and their drop-ins.

use super::Check;
use crate::{
    node::Node,
    report::Place,
    rules::{at, is_true, text, unit},
};

impl Check<'_> {
    pub(super) fn systemd(&mut self, root: &Node) {
        let place = Place::ROOT.key("systemd");
        let place = place.key("units");
        let units = root.find(&["systemd", "units"]).map(Node::items).unwrap_or_default();
        for (index, item) in units.iter().enumerate() {
            let place = place.index(index);
            let outcome = unit::check_name(text(item, "name"));
            self.expect(at(item, "name"), &place.key("name"), outcome);
            self.dropins(item, &place);
            let contents = at(item, "contents");
            let place = place.key("contents");
            match unit::parse(text(item, "contents")) {
                Ok(unit) => {
                    let enabled = is_true(item, "enable") || is_true(item, "enabled");
                    if enabled && unit.has_settings && !unit.has_install {
                        let message =
                            "is enabled, but has no [Install] section that says for what: nothing will start it";
                        self.report.warning(contents, &place, message);
                    }
                }
                Err(message) => self.report.error(contents, &place, message),
            }
        }
    }

    pub(super) fn networkd(&mut self, root: &Node) {
        let place = Place::ROOT.key("networkd");
        let place = place.key("units");
        let units = root.find(&["networkd", "units"]).map(Node::items).unwrap_or_default();
        for (index, item) in units.iter().enumerate() {
            let place = place.index(index);
            let outcome = unit::check_networkd_name(text(item, "name"));
            self.expect(at(item, "name"), &place.key("name"), outcome);
            let outcome = unit::parse(text(item, "contents"));
            self.expect(at(item, "contents"), &place.key("contents"), outcome.map(|_| ()));
            self.dropins(item, &place);
        }
    }

    fn dropins(&mut self, unit: &Node, place: &Place<'_>) {
        let place = place.key("dropins");
        for (index, dropin) in unit
            .get("dropins")
            .map(Node::items)
            .unwrap_or_default()
            .iter()
            .enumerate()
        {
            let place = place.index(index);
            let outcome = unit::check_dropin_name(text(dropin, "name"));
            self.expect(at(dropin, "name"), &place.key("name"), outcome);
            let outcome = unit::parse(text(dropin, "contents"));
            self.expect(at(dropin, "contents"), &place.key("contents"), outcome.map(|_| ()));
        }
    }
}
