//! What a variant has no support for.

use super::{dialect::Dialect, items};
use crate::{
    node::{Node, Value},
    report::{Place, Report},
};

/// Flatcar's initramfs has no Clevis.
pub(super) fn check(source: &Node, dialect: Dialect, report: &mut Report) {
    if !matches!(dialect, Dialect::Flatcar(_)) {
        return;
    }
    let storage = Place::ROOT.key("storage");
    let place = storage.key("luks");
    for (index, luks) in items(source, &["storage", "luks"]).iter().enumerate() {
        if let Some(clevis) = luks.get("clevis").filter(|clevis| says_something(clevis)) {
            let message = "Flatcar has no Clevis: a key_file is the only way to open this volume";
            report.error(clevis, &place.index(index).key("clevis"), message);
        }
    }
}

fn says_something(node: &Node) -> bool {
    match &node.value {
        Value::Map(map) => map.iter().any(|(_, value)| says_something(value)),
        Value::List(items) => !items.is_empty(),
        value => *value != Value::Null,
    }
}
