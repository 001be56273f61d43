//! Hashes of what is fetched: `function` and `sum` are one text of Ignition's.

use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
};

/// The keys of what is fetched.
const FETCHED: [&str; 4] = ["append", "replace", "certificate_authorities", "contents"];

/// Says every `verification` of the tree in Ignition's way, and gives one to whatever is fetched; `name` is the key of the
/// node.
pub(super) fn translate(node: &mut Node, name: &str, place: &Place<'_>, report: &mut Report) {
    match &mut node.value {
        Value::List(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                translate(item, name, &place.index(index), report);
            }
        }
        Value::Map(map) => {
            for (key, value) in map.iter_mut() {
                let place = place.key(key);
                match (key, value.as_map_mut()) {
                    ("verification", Some(verification)) => join(verification, &place, report),
                    _ => translate(value, key, &place, report),
                }
            }
            if FETCHED.contains(&name) && map.get("verification").is_none() {
                map.insert("verification", Node::ours(Map::new()));
            }
        }
        _ => {}
    }
}

fn join(verification: &mut Map, place: &Place<'_>, report: &mut Report) {
    let Some(hash) = verification.remove("hash") else {
        return;
    };
    let said = |key| hash.text(key).unwrap_or_default();
    match (said("function"), said("sum")) {
        ("", "") => {}
        ("", _) | (_, "") => {
            let message = "needs both function and sum: without them nothing is verified";
            report.warning(&hash, &place.key("hash"), message);
        }
        (function, sum) => {
            let joined = Node::at(hash.position, format!("{function}-{sum}"));
            verification.insert("hash", joined);
        }
    }
}
