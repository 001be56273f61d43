//! Whether a tree is what a configuration of spec 3 said. Works on the JSON alone, so that it shares no mistake with the library.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::accounts::{Accounts, Line};
use crate::contents::contents_of;
use crate::tree::{Tree, offline};

const UNITS: &str = "/etc/systemd/system";
const PRESETS: &str = "/etc/systemd/system-preset/20-ignition.preset";
/// What `ignition` and the programs that it calls leave beside what was asked for.
const BY_THE_WAY: [&str; 11] = [
    PRESETS,
    "/etc/.ignition-result.json",
    "/etc/.pwd.lock",
    "/etc/passwd-",
    "/etc/shadow-",
    "/etc/group-",
    "/etc/gshadow-",
    "/etc/subuid",
    "/etc/subgid",
    "/etc/subuid-",
    "/etc/subgid-",
];

/// Every difference between what `config` says and what is in the tree, in sentences; empty if there is none.
///
/// A configuration that merges or replaces itself by others has to be given merged (`Tree::merged`).
pub(crate) fn differences(config: &str, tree: &Tree) -> Vec<String> {
    let config: Value = match serde_json::from_str(config) {
        Ok(config) => offline(config),
        Err(error) => return vec![format!("the expectation is not JSON: {error}")],
    };
    let refers = !list(&config, "/ignition/config/merge").is_empty()
        || config
            .pointer("/ignition/config/replace/source")
            .is_some_and(|source| !source.is_null());
    if refers {
        return vec!["the expectation refers to other configurations; they have to be merged before".to_owned()];
    }
    let mut check = Check {
        tree,
        accounts: Accounts::of(tree),
        found: Vec::new(),
        known: BTreeSet::new(),
    };
    // Users first: files belong to them.
    check.groups(&config);
    check.users(&config);
    check.directories(&config);
    check.files(&config);
    check.links(&config);
    check.units(&config);
    check.nothing_else();
    check.found
}

struct Check<'a> {
    tree: &'a Tree,
    accounts: Accounts,
    found: Vec<String>,
    /// Paths that were asked for.
    known: BTreeSet<PathBuf>,
}

impl Check<'_> {
    fn says<T: PartialEq + std::fmt::Debug>(&mut self, what: impl std::fmt::Display, expected: T, there: T) {
        if expected != there {
            self.found
                .push(format!("{what}: expected {expected:?}, there is {there:?}"));
        }
    }

    fn directories(&mut self, config: &Value) {
        for directory in list(config, "/storage/directories") {
            let path = text(directory, "path");
            let Some(place) = self.place(path) else { continue };
            self.says(format!("{path} is a directory"), true, place.is_dir());
            self.node(directory, &place, 0o755);
        }
    }

    fn files(&mut self, config: &Value) {
        for file in list(config, "/storage/files") {
            let path = text(file, "path");
            let Some(place) = self.place(path) else { continue };
            let mut expected = Vec::new();
            let appended = list(file, "/append");
            for resource in file.get("contents").into_iter().chain(appended) {
                match contents_of(resource) {
                    Ok(bytes) => expected.extend(bytes),
                    Err(error) => self.found.push(format!("{path}: {error}")),
                }
            }
            self.contents(path, &place, &expected);
            self.node(file, &place, 0o644);
        }
    }

    fn links(&mut self, config: &Value) {
        for link in list(config, "/storage/links") {
            let (path, target) = (text(link, "path"), text(link, "target"));
            let Some(place) = self.place(path) else { continue };
            if is(link, "hard") == Some(true) {
                let inode = |place: &Path| fs::symlink_metadata(place).map(|data| data.ino()).ok();
                self.says(
                    format!("{path} is {target}"),
                    inode(&self.tree.at(target)),
                    inode(&place),
                );
            } else {
                let there = fs::read_link(&place).ok();
                self.says(format!("the link {path}"), Some(PathBuf::from(target)), there);
                self.owner(link, &place);
            }
        }
    }

    /// Mode and owner of a file or directory.
    fn node(&mut self, node: &Value, place: &Path, default: u64) {
        let path = text(node, "path");
        let Ok(data) = fs::metadata(place) else { return };
        // The version that runs here sets no special bits.
        let expected = node.get("mode").and_then(Value::as_u64).unwrap_or(default) & 0o777;
        self.says(
            format!("the mode of {path}"),
            format!("{expected:o}"),
            format!("{:o}", data.mode() & 0o7777),
        );
        self.owner(node, place);
    }

    fn owner(&mut self, node: &Value, place: &Path) {
        let path = text(node, "path");
        let Ok(data) = fs::symlink_metadata(place) else { return };
        let user = Accounts::id(&self.accounts.users, &node["user"]);
        let group = Accounts::id(&self.accounts.groups, &node["group"]);
        self.says(format!("the user of {path}"), user, Some(data.uid()));
        self.says(format!("the group of {path}"), group, Some(data.gid()));
    }

    fn units(&mut self, config: &Value) {
        let mut presets = BTreeSet::new();
        for unit in list(config, "/systemd/units") {
            let name = text(unit, "name");
            let path = format!("{UNITS}/{name}");
            if is(unit, "mask") == Some(true) {
                if let Some(place) = self.place(&path) {
                    self.says(
                        format!("the mask of {name}"),
                        Some("/dev/null".into()),
                        fs::read_link(place).ok(),
                    );
                }
            } else if let Some(contents) = unit
                .get("contents")
                .and_then(Value::as_str)
                .filter(|text| !text.is_empty())
                && let Some(place) = self.place(&path)
            {
                self.contents(&path, &place, contents.as_bytes());
            }
            for dropin in list(unit, "/dropins") {
                let Some(contents) = dropin.get("contents").and_then(Value::as_str) else {
                    continue;
                };
                let path = format!("{path}.d/{}", text(dropin, "name"));
                if let Some(place) = self.place(&path) {
                    self.contents(&path, &place, contents.as_bytes());
                }
            }
            if let Some(enabled) = is(unit, "enabled") {
                presets.insert((if enabled { "enable" } else { "disable" }.to_owned(), name.to_owned()));
            }
        }
        let written = fs::read_to_string(self.tree.at(PRESETS)).unwrap_or_default();
        self.says("the presets", presets, written.lines().flat_map(presets_of).collect());
    }

    fn groups(&mut self, config: &Value) {
        for group in list(config, "/passwd/groups") {
            let name = text(group, "name");
            let line = self.accounts.groups.get(name).cloned();
            if is(group, "shouldExist") == Some(false) {
                self.says(format!("group {name} is there"), false, line.is_some());
                continue;
            }
            let Some(line) = line else {
                self.found.push(format!("group {name} is not there"));
                continue;
            };
            if let Some(gid) = group.get("gid").and_then(Value::as_u64) {
                self.says(format!("the id of group {name}"), gid, line.number(2));
            }
            if let Some(hash) = group
                .get("passwordHash")
                .and_then(Value::as_str)
                .filter(|hash| !hash.is_empty())
            {
                let there = self
                    .accounts
                    .group_passwords
                    .get(name)
                    .map(|line| line.field(1).to_owned());
                self.says(format!("the password of group {name}"), Some(hash.to_owned()), there);
            }
            if is(group, "system") == Some(true) && group.get("gid").is_none_or(Value::is_null) {
                self.says(format!("group {name} is a system group"), true, line.number(2) < 1000);
            }
        }
    }

    fn users(&mut self, config: &Value) {
        for user in list(config, "/passwd/users") {
            let name = text(user, "name");
            let line = self.accounts.users.get(name).cloned();
            if is(user, "shouldExist") == Some(false) {
                self.says(format!("user {name} is there"), false, line.is_some());
                continue;
            }
            match line {
                Some(line) => self.user(user, name, &line),
                None => self.found.push(format!("user {name} is not there")),
            }
        }
    }

    fn user(&mut self, user: &Value, name: &str, line: &Line) {
        let new = !self.tree.users_before.contains(name);
        for (key, field) in [("gecos", 4), ("homeDir", 5), ("shell", 6)] {
            if let Some(wanted) = user
                .get(key)
                .and_then(Value::as_str)
                .filter(|wanted| !wanted.is_empty())
            {
                self.says(format!("{key} of user {name}"), wanted, line.field(field));
            }
        }
        if let Some(uid) = user.get("uid").and_then(Value::as_u64) {
            self.says(format!("the id of user {name}"), uid, line.number(2));
        } else if is(user, "system") == Some(true) && new {
            self.says(format!("user {name} is a system user"), true, line.number(2) < 1000);
        }
        let password = match user.get("passwordHash").and_then(Value::as_str) {
            None if new => Some("*"),
            Some("") => Some("*"),
            said => said,
        };
        if let Some(password) = password {
            let there = self.accounts.passwords.get(name).map(|line| line.field(1).to_owned());
            self.says(format!("the password of user {name}"), Some(password.to_owned()), there);
        }
        if let Some(primary) = user
            .get("primaryGroup")
            .and_then(Value::as_str)
            .filter(|group| !group.is_empty())
        {
            let there = self
                .accounts
                .groups
                .get(primary)
                .map(|line| line.number(2))
                .or_else(|| primary.parse().ok());
            self.says(format!("the primary group of user {name}"), there, Some(line.number(3)));
        }
        for group in list(user, "/groups").iter().filter_map(Value::as_str) {
            let members = self
                .accounts
                .groups
                .get(group)
                .map(|line| line.field(3).to_owned())
                .unwrap_or_default();
            self.says(
                format!("user {name} is in group {group}"),
                true,
                members.split(',').any(|one| one == name),
            );
        }
        let home = line.field(5);
        if new {
            let wanted = is(user, "noCreateHome") != Some(true);
            let keys = !list(user, "/sshAuthorizedKeys").is_empty();
            self.says(
                format!("{home} of user {name} is there"),
                wanted || keys,
                self.tree.at(home).is_dir(),
            );
        }
        // What a new home brings along is not the configuration's.
        self.known.insert(home.into());
        let mut keys: Vec<_> = list(user, "/sshAuthorizedKeys")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        if keys.is_empty() {
            return;
        }
        keys.push("");
        let path = format!("{}/.ssh/authorized_keys.d/ignition", home.trim_end_matches('/'));
        if let Some(place) = self.place(&path) {
            self.contents(&path, &place, keys.join("\n").trim_start_matches('\n').as_bytes());
            let there = fs::metadata(&place)
                .map(|data| (data.uid().into(), data.mode() & 0o777))
                .ok();
            self.says(format!("user and mode of {path}"), Some((line.number(2), 0o600)), there);
        }
    }

    /// Where the path is, if there is anything; that it is missing is a difference.
    fn place(&mut self, path: &str) -> Option<PathBuf> {
        let place = self.tree.at(path);
        if fs::symlink_metadata(&place).is_err() {
            self.found.push(format!("{path} is not there"));
            return None;
        }
        let path = Path::new("/").join(place.strip_prefix(self.tree.root()).unwrap_or(&place));
        self.known.extend(path.ancestors().map(Path::to_owned));
        Some(place)
    }

    fn contents(&mut self, path: &str, place: &Path, expected: &[u8]) {
        match fs::read(place) {
            Ok(there) if there == expected => {}
            Ok(there) => {
                let at = there
                    .iter()
                    .zip(expected)
                    .take_while(|(one, other)| one == other)
                    .count();
                let from = |bytes: &[u8]| String::from_utf8_lossy(&bytes[at..bytes.len().min(at + 40)]).into_owned();
                self.found.push(format!(
                    "{path}: expected {} bytes, there are {}; from byte {at} on {:?} was expected, there is {:?}",
                    expected.len(),
                    there.len(),
                    from(expected),
                    from(&there)
                ));
            }
            Err(error) => self.found.push(format!("{path} cannot be read: {error}")),
        }
    }

    /// Whatever nobody asked for.
    fn nothing_else(&mut self) {
        let parents_of_presets = Path::new(PRESETS).ancestors().skip(1).map(Path::to_owned);
        self.known.extend(parents_of_presets);
        self.known.insert(UNITS.into());
        for path in self.tree.paths() {
            let asked = self.known.contains(&path) || self.tree.before.contains(&path);
            let by_the_way = BY_THE_WAY.iter().any(|known| path == Path::new(known));
            let parent_of_asked = self.known.iter().any(|known| known.starts_with(&path));
            if !asked && !by_the_way && !parent_of_asked {
                self.found
                    .push(format!("{} is there, and nobody asked for it", path.display()));
            }
        }
    }
}

/// `enable a@.service one two` is two presets: of `a@one.service` and of `a@two.service`.
fn presets_of(line: &str) -> Vec<(String, String)> {
    let mut words = line.split_whitespace();
    let (Some(verb), Some(unit)) = (words.next(), words.next()) else {
        return vec![];
    };
    let instances: Vec<_> = words.collect();
    match unit.split_once('@') {
        Some((before, after)) if !instances.is_empty() => instances
            .iter()
            .map(|instance| (verb.to_owned(), format!("{before}@{instance}{after}")))
            .collect(),
        _ => vec![(verb.to_owned(), unit.to_owned())],
    }
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn is(value: &Value, key: &str) -> Option<bool> {
    value.get(key).and_then(Value::as_bool)
}
