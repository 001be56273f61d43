//! `contents_local` of units and drop-ins.

use super::{
    local::Local,
    resource::{each, within},
};
use crate::{
    node::{Map, Node},
    report::{Place, Report},
};

pub(super) fn translate(source: &mut Node, local: &mut Local<'_>, report: &mut Report) {
    within(source, &Place::ROOT, "systemd", |systemd, place| {
        each(systemd, place, "units", |unit, place| {
            each(unit, place, "dropins", |dropin, place| {
                if let Some(dropin) = dropin.as_map_mut() {
                    contents(dropin, place, local, report);
                }
            });
            if let Some(unit) = unit.as_map_mut() {
                contents(unit, place, local, report);
            }
        });
    });
}

fn contents(map: &mut Map, place: &Place<'_>, local: &mut Local<'_>, report: &mut Report) {
    const LOCAL: &str = "contents_local";
    let Some(file) = map.remove(LOCAL) else { return };
    let place = place.key(LOCAL);
    if map.get("contents").is_some() {
        report.error(
            &file,
            &place,
            "one of contents and contents_local is expected, not both",
        );
    } else if file.as_text().is_some_and(|path| !path.is_empty())
        && let Some(text) = local.read_text(&file, &place, report)
    {
        map.insert("contents", Node::at(file.position, text));
    }
}
