//! Modes that were meant octal: `mode: 644` is 01204.

use super::items;
use crate::{
    node::Node,
    report::{Place, Report},
};

/// Warns of modes that make sense only if their digits are read as octal ones.
pub(super) fn check(source: &Node, report: &mut Report) {
    let storage = Place::ROOT.key("storage");
    for (key, directory) in [("directories", true), ("files", false)] {
        let place = storage.key(key);
        for (index, item) in items(source, &["storage", key]).iter().enumerate() {
            let Some(node) = item.get("mode") else { continue };
            let Some(meant) = node.as_int().and_then(|mode| meant_octal(mode, directory)) else {
                continue;
            };
            let message = format!("is a decimal number; is 0{meant:o} meant, which begins with a zero?");
            report.warning(node, &place.index(index).key("mode"), message);
        }
    }
}

/// The mode that was meant, if the one given makes no sense and its decimal digits do as octal ones.
fn meant_octal(mode: i64, directory: bool) -> Option<i64> {
    if !(0..=7777).contains(&mode) {
        return None;
    }
    let octal = i64::from_str_radix(&mode.to_string(), 8).ok()?;
    (!is_usual(mode, directory) && is_usual(octal, directory)).then_some(octal)
}

const READ: i64 = 4;
const WRITE: i64 = 2;
const EXECUTE: i64 = 1;
const SETUID: i64 = 0o4000;
const SETGID: i64 = 0o2000;
const STICKY: i64 = 0o1000;

/// Whether people give such modes: whoever is nearer to the file may do at least what others may.
fn is_usual(mode: i64, directory: bool) -> bool {
    if mode == 0 {
        // Root reads it all the same.
        return true;
    }
    let [others, group, owner] = [mode & 7, mode >> 3 & 7, mode >> 6 & 7];
    let has = |rights: i64, right: i64| rights & right != 0;
    let nested = others & !group == 0 && group & !owner == 0;
    let readable_where_used = [others, group, owner]
        .iter()
        .all(|&rights| has(rights, READ) || rights == 0);
    // Reading without executing is odd for some where others, nearer, may execute.
    let reads_alone = |rights| has(rights, READ) && !has(rights, EXECUTE);
    let uneven = (has(group, EXECUTE) && reads_alone(others))
        || (has(owner, EXECUTE) && (reads_alone(others) || reads_alone(group)));
    if !nested || !readable_where_used || uneven || !has(owner, READ) {
        return false;
    }
    if directory {
        has(owner, EXECUTE) && !has(mode, SETUID) && (!has(mode, SETGID | STICKY) || has(owner, WRITE))
    } else {
        let privileged = has(mode, SETUID | SETGID);
        !has(mode, STICKY) && (!privileged || (has(owner, EXECUTE) && !has(others, WRITE)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case(644, false, Some(0o644))]
    #[case(0o644, false, None)]
    #[case(755, true, Some(0o755))]
    #[case(0o755, true, None)]
    #[case(4755, false, Some(0o4755))]
    #[case(1777, true, Some(0o1777))]
    #[case(600, false, Some(0o600))]
    #[case(400, false, Some(0o400))]
    #[case(0, false, None)]
    #[case(888, false, None)]
    #[case(-1, false, None)]
    #[case(99_999, false, None)]
    fn what_was_meant(#[case] mode: i64, #[case] directory: bool, #[case] expected: Option<i64>) {
        assert_eq!(meant_octal(mode, directory), expected);
    }
}
