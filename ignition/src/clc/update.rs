//! Sections `update` and `locksmith`: both are in `/etc/coreos/update.conf`.

use super::{quantity, service::quoted};
use crate::{
    data_url,
    node::{Map, Node},
    report::{Place, Report},
    rules::url,
};

/// Options of locksmithd and what they are called in the file.
const LOCKSMITH: &[(&str, &str)] = &[
    ("reboot_strategy", "REBOOT_STRATEGY"),
    ("window_start", "LOCKSMITHD_REBOOT_WINDOW_START"),
    ("window_length", "LOCKSMITHD_REBOOT_WINDOW_LENGTH"),
    ("group", "LOCKSMITHD_GROUP"),
    ("etcd_endpoints", "LOCKSMITHD_ENDPOINT"),
    ("etcd_cafile", "LOCKSMITHD_ETCD_CAFILE"),
    ("etcd_certfile", "LOCKSMITHD_ETCD_CERTFILE"),
    ("etcd_keyfile", "LOCKSMITHD_ETCD_KEYFILE"),
];

const GROUPS: [&str; 3] = ["stable", "beta", "alpha"];
const STRATEGIES: [&str; 3] = ["reboot", "etcd-lock", "off"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// The file that the two sections ask for, if any.
pub(super) fn file(update: Option<&Node>, locksmith: Option<&Node>, report: &mut Report) -> Option<Node> {
    let mut contents = String::new();
    if let Some(update) = update {
        check_group(update, report);
        check_server(update, report);
        if let Some(group) = given(update, "group").and_then(Node::as_text) {
            contents.push_str(&format!("GROUP={}", group.to_lowercase()));
        }
        if let Some(server) = given(update, "server").and_then(Node::as_text) {
            contents.push_str(&format!("\nSERVER={server}"));
        }
    }
    if let Some(locksmith) = locksmith {
        check_strategy(locksmith, report);
        check_window(locksmith, report);
        for (key, variable) in LOCKSMITH {
            if let Some(value) = locksmith.text(key) {
                contents.push_str(&format!("\n{variable}={}", quoted(value)));
            }
        }
    }
    if contents.is_empty() {
        return None;
    }
    let source = Node::ours(data_url::percent(contents.as_bytes()));
    Some(Node::ours(Map::from([
        ("filesystem", Node::ours("root")),
        ("path", Node::ours("/etc/coreos/update.conf")),
        ("mode", Node::ours(0o644)),
        (
            "contents",
            Node::ours(Map::from([
                ("source", source),
                ("verification", Node::ours(Map::new())),
            ])),
        ),
    ])))
}

/// A text that says something.
fn given<'a>(section: &'a Node, key: &str) -> Option<&'a Node> {
    section.get(key).filter(|node| node.as_text() != Some(""))
}

fn check_group(update: &Node, report: &mut Report) {
    let group = given(update, "group");
    let known = group
        .and_then(Node::as_text)
        .is_some_and(|group| GROUPS.contains(&group.to_lowercase().as_str()));
    if !known && given(update, "server").is_none() {
        let place = Place::ROOT.key("update");
        let message = "stable, beta or alpha is expected: only a server of your own has other groups";
        report.warning(group.unwrap_or(update), &place.key("group"), message);
    }
}

fn check_server(update: &Node, report: &mut Report) {
    if let Some(node) = given(update, "server")
        && let Err(message) = url::parse(node.as_text().unwrap_or_default())
    {
        let place = Place::ROOT.key("update");
        report.error(node, &place.key("server"), message);
    }
}

fn check_strategy(locksmith: &Node, report: &mut Report) {
    let Some(node) = given(locksmith, "reboot_strategy") else {
        return;
    };
    let strategy = node.as_text().unwrap_or_default().to_lowercase();
    if !STRATEGIES.contains(&strategy.as_str()) {
        let place = Place::ROOT.key("locksmith");
        report.error(
            node,
            &place.key("reboot_strategy"),
            "reboot, etcd-lock or off is expected",
        );
    }
}

fn check_window(locksmith: &Node, report: &mut Report) {
    let place = Place::ROOT.key("locksmith");
    let (start, length) = (given(locksmith, "window_start"), given(locksmith, "window_length"));
    match (start, length) {
        (Some(node), None) => {
            let message = "needs window_length beside it: how long the window is open";
            report.error(node, &place.key("window_start"), message);
        }
        (None, Some(node)) => {
            let message = "needs window_start beside it: when the window opens";
            report.error(node, &place.key("window_length"), message);
        }
        _ => {}
    }
    if let Some(node) = start.filter(|node| !is_window_start(node.as_text().unwrap_or_default())) {
        let message = "a time is expected, with a day or without, such as `Sun 1:00` or `14:00`";
        report.error(node, &place.key("window_start"), message);
    }
    if let Some(node) = length.filter(|node| !quantity::is_duration(node.as_text().unwrap_or_default())) {
        let message = "a length of time is expected, such as 2h or 1h30m";
        report.error(node, &place.key("window_length"), message);
    }
}

fn is_window_start(text: &str) -> bool {
    let mut words = text.split_whitespace();
    let time = match (words.next(), words.next()) {
        (Some(day), Some(time)) => {
            if !DAYS.contains(&day.to_lowercase().as_str()) {
                return false;
            }
            time
        }
        _ => text,
    };
    let Some((hour, minute)) = time.split_once(':') else {
        return false;
    };
    let number = |digits: &str| {
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| digits.parse::<u8>().ok()).flatten()
    };
    let hour = number(hour).filter(|number| hour.len() <= 2 && *number < 24);
    let minute = number(minute).filter(|number| minute.len() == 2 && *number < 60);
    hour.is_some() && minute.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("Sun 1:00", true)]
    #[case("thu 23:59", true)]
    #[case("14:00", true)]
    #[case("Sun", false)]
    #[case("Someday 1:00", false)]
    #[case("24:00", false)]
    #[case("1:0", false)]
    #[case("Sun 1", false)]
    fn window_starts(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(is_window_start(text), expected);
    }
}
