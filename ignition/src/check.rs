//! What the types of the specification do not say, and Ignition checks all the same.

use std::collections::HashMap;

use serde_json::Value;

use crate::report::Entry;

/// Endings of unit names: systemd.unit(5).
const UNIT_TYPES: [&str; 11] = [
    "service",
    "socket",
    "device",
    "mount",
    "automount",
    "swap",
    "target",
    "path",
    "timer",
    "slice",
    "scope",
];

/// Everything that is wrong, in the order of the configuration.
pub(crate) fn check(config: &Value) -> Vec<Entry> {
    let mut checker = Checker::default();
    checker.paths(config);
    checker.names(config, "/systemd/units", "name");
    checker.names(config, "/passwd/users", "name");
    checker.names(config, "/passwd/groups", "name");
    checker.names(config, "/storage/disks", "device");
    checker.units(config);
    checker.entries
}

#[derive(Default)]
struct Checker {
    entries: Vec<Entry>,
}

impl Checker {
    fn say(&mut self, path: String, message: impl Into<String>) {
        self.entries.push(Entry {
            position: None,
            path,
            message: message.into(),
        });
    }

    /// Files, directories and links are absolute, and no two share a path.
    fn paths(&mut self, config: &Value) {
        let mut seen: HashMap<&str, String> = HashMap::new();
        for kind in ["directories", "files", "links"] {
            for (index, node) in list(config, &format!("/storage/{kind}")) {
                let place = format!("storage.{kind}.{index}.path");
                let Some(path) = node.get("path").and_then(Value::as_str) else {
                    continue;
                };
                if !path.starts_with('/') {
                    self.say(place.clone(), format!("{path:?} is not absolute"));
                } else if path.split('/').any(|part| part == "..") {
                    self.say(place.clone(), format!("{path:?} climbs with `..`"));
                }
                if let Some(first) = seen.get(path) {
                    self.say(place, format!("{path:?} is already at {first}"));
                } else {
                    seen.insert(path, place);
                }
                if node
                    .get("mode")
                    .and_then(Value::as_i64)
                    .is_some_and(|mode| !(0..=0o7777).contains(&mode))
                {
                    self.say(
                        format!("storage.{kind}.{index}.mode"),
                        "is no file mode: 0 to 4095 (0o7777) in decimal are",
                    );
                }
            }
        }
    }

    /// Every element of the list has a name of its own.
    fn names(&mut self, config: &Value, pointer: &str, key: &str) {
        let prefix = pointer.trim_start_matches('/').replace('/', ".");
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for (index, node) in list(config, pointer) {
            let Some(name) = node.get(key).and_then(Value::as_str) else {
                continue;
            };
            let place = format!("{prefix}.{index}.{key}");
            if name.is_empty() {
                self.say(place, "is empty");
            } else if let Some(first) = seen.insert(name, index) {
                self.say(place, format!("{name:?} is already at {prefix}.{first}"));
            }
        }
    }

    fn units(&mut self, config: &Value) {
        for (index, unit) in list(config, "/systemd/units") {
            let name = unit.get("name").and_then(Value::as_str).unwrap_or_default();
            let valid = name
                .rsplit_once('.')
                .is_some_and(|(stem, kind)| !stem.is_empty() && UNIT_TYPES.contains(&kind));
            if !name.is_empty() && (!valid || name.contains('/')) {
                self.say(
                    format!("systemd.units.{index}.name"),
                    format!("{name:?} is no unit: names end in .service, .mount, .timer and the like"),
                );
            }
            for (at, dropin) in list(unit, "/dropins") {
                let name = dropin.get("name").and_then(Value::as_str).unwrap_or_default();
                if !name.ends_with(".conf") || name.contains('/') {
                    self.say(
                        format!("systemd.units.{index}.dropins.{at}.name"),
                        format!("{name:?} does not end in .conf"),
                    );
                }
            }
        }
    }
}

fn list<'a>(config: &'a Value, pointer: &str) -> impl Iterator<Item = (usize, &'a Value)> {
    config
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .enumerate()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::json;

    #[rstest]
    #[case(json!({"storage": {"files": [{"path": "/a"}], "links": [{"path": "/a"}]}}), "storage.links.0.path: \"/a\" is already at storage.files.0.path")]
    #[case(json!({"storage": {"files": [{"path": "/a/../b"}]}}), "climbs")]
    #[case(json!({"storage": {"files": [{"path": "/a", "mode": 99999}]}}), "storage.files.0.mode: is no file mode")]
    #[case(json!({"systemd": {"units": [{"name": "a"}]}}), "systemd.units.0.name: \"a\" is no unit")]
    #[case(json!({"systemd": {"units": [{"name": "a.service"}, {"name": "a.service"}]}}), "systemd.units.1.name: \"a.service\" is already at systemd.units.0")]
    #[case(json!({"systemd": {"units": [{"name": "a.service", "dropins": [{"name": "x"}]}]}}), "dropins.0.name")]
    #[case(json!({"passwd": {"users": [{"name": ""}]}}), "passwd.users.0.name: is empty")]
    fn contradictions_are_found(#[case] config: Value, #[case] expected: &str) {
        let said: Vec<String> = check(&config).iter().map(ToString::to_string).collect();
        assert!(said.iter().any(|entry| entry.contains(expected)), "{said:?}");
    }
}
