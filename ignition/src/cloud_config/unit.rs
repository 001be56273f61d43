//! Units: those of `coreos.units`, and drop-ins of services with options.

use std::collections::HashMap;

use super::file::Files;
use crate::{
    node::{Map, Node},
    report::{Place, Report},
};

/// What says when a unit begins with the machine.
const WANTS: &str = "/etc/systemd/system/multi-user.target.wants";

/// Units of the machine; a name is there once.
#[derive(Debug, Default)]
pub(super) struct Units {
    units: Vec<Unit>,
    by_name: HashMap<String, usize>,
    /// Names of units to be started, and where that is said.
    started: Vec<Node>,
}

#[derive(Debug, Default)]
struct Unit {
    name: Node,
    content: Option<Node>,
    enable: bool,
    mask: bool,
    dropins: Vec<(String, Node)>,
    dropin_by_name: HashMap<String, usize>,
}

impl Units {
    fn of_name(&mut self, name: &Node) -> &mut Unit {
        let key = name.as_text().unwrap_or_default().to_owned();
        let next = self.units.len();
        let index = *self.by_name.entry(key).or_insert(next);
        if index == next {
            self.units.push(Unit {
                name: name.clone(),
                ..Unit::default()
            });
        }
        // It was there, or was just put at the end.
        &mut self.units[index]
    }

    /// A drop-in of ours.
    pub(super) fn add_dropin(&mut self, unit: &str, content: String) {
        let unit = self.of_name(&Node::ours(unit));
        unit.set_dropin("20-cloudinit.conf", Node::ours(content));
    }

    pub(super) fn mask(&mut self, unit: &str) {
        self.of_name(&Node::ours(unit)).mask = true;
    }

    /// A unit of ours that begins with the machine.
    pub(super) fn add_enabled(&mut self, unit: &str, content: String) {
        let unit = self.of_name(&Node::ours(unit));
        unit.content = Some(Node::ours(content));
        unit.enable = true;
    }

    fn has_content(&self, name: &str) -> bool {
        let unit = self.by_name.get(name).and_then(|index| self.units.get(*index));
        unit.is_some_and(|unit| unit.content.is_some())
    }

    /// A link for each unit to be started, as `systemctl enable` would make it of `WantedBy=multi-user.target`.
    pub(super) fn links(&self) -> Vec<Node> {
        let mut seen = std::collections::HashSet::new();
        let mut links = Vec::new();
        for node in &self.started {
            let name = node.as_text().unwrap_or_default();
            let unit = self.by_name.get(name).and_then(|index| self.units.get(*index));
            if unit.is_some_and(|unit| unit.mask || unit.wants_itself()) || !seen.insert(name) {
                continue;
            }
            let link = [
                ("filesystem", Node::ours("root")),
                ("path", Node::at(node.position, format!("{WANTS}/{name}"))),
                ("target", Node::ours(self.path_of(name))),
                ("overwrite", Node::ours(true)),
            ];
            links.push(Node::ours(Map::from(link)));
        }
        links
    }

    /// Where the unit is, or the template that it is an instance of.
    fn path_of(&self, name: &str) -> String {
        let template = name.split_once('@').and_then(|(before, after)| {
            let (_, kind) = after.rsplit_once('.')?;
            Some(format!("{before}@.{kind}"))
        });
        let mut names = [Some(name), template.as_deref()].into_iter().flatten();
        match names.clone().find(|name| self.has_content(name)) {
            Some(name) => format!("/etc/systemd/system/{name}"),
            None => format!("/usr/lib/systemd/system/{}", names.next_back().unwrap_or(name)),
        }
    }

    pub(super) fn into_list(self) -> Vec<Node> {
        self.units.into_iter().filter_map(Unit::into_node).collect()
    }
}

impl Unit {
    fn set_dropin(&mut self, name: &str, content: Node) {
        let next = self.dropins.len();
        let index = *self.dropin_by_name.entry(name.to_owned()).or_insert(next);
        match self.dropins.get_mut(index) {
            Some((_, existing)) => *existing = content,
            None => self.dropins.push((name.to_owned(), content)),
        }
    }

    /// Whether enabling it makes the very link that starts it.
    fn wants_itself(&self) -> bool {
        let content = self.content.as_ref().and_then(Node::as_text).unwrap_or_default();
        let wants = |line: &str| line.trim().starts_with("WantedBy=") && line.contains("multi-user.target");
        self.enable && content.lines().any(wants)
    }

    fn into_node(self) -> Option<Node> {
        let mut unit = Map::from([("name", self.name)]);
        // Nothing but a link stands where a unit is masked.
        if let Some(content) = self.content.filter(|_| !self.mask) {
            unit.insert("contents", content);
        }
        if self.enable {
            unit.insert("enabled", Node::ours(true));
        }
        if self.mask {
            unit.insert("mask", Node::ours(true));
        }
        if !self.dropins.is_empty() {
            let dropins = self.dropins.into_iter().map(|(name, content)| {
                let dropin = [("name", Node::ours(name)), ("contents", content)];
                Node::ours(Map::from(dropin))
            });
            unit.insert("dropins", Node::ours(dropins.collect::<Vec<_>>()));
        }
        (unit.len() > 1).then(|| Node::ours(unit))
    }
}

/// Adds what `coreos.units` says.
pub(super) fn translate(root: &Node, units: &mut Units, files: &mut Files, report: &mut Report) {
    let place = Place::ROOT.key("coreos");
    let place = place.key("units");
    let list = root.find(&["coreos", "units"]).map(Node::items).unwrap_or_default();
    for (index, unit) in list.iter().enumerate() {
        let place = place.index(index);
        let Some(name) = unit.get("name").filter(|name| name.as_text() != Some("")) else {
            report.warning(unit, &place, "has no name and is passed over");
            continue;
        };
        let text = name.as_text().unwrap_or_default();
        if !is_name(text) {
            report.error(name, &place.key("name"), "a name is expected, without a directory");
            continue;
        }
        let kind = text.rsplit_once('.').map(|(_, kind)| kind);
        if matches!(kind, Some("network" | "netdev" | "link")) {
            network_unit(unit, name, files, &place, report);
        } else {
            system_unit(unit, name, units, &place, report);
        }
    }
}

fn is_name(text: &str) -> bool {
    !text.contains('/') && text != "." && text != ".."
}

/// Drop-ins that have a name and say something.
fn dropins<'a>(unit: &'a Node, place: &Place<'_>, report: &mut Report) -> Vec<(&'a str, &'a Node)> {
    let place = place.key("drop_ins");
    let mut found = Vec::new();
    for (index, dropin) in unit
        .get("drop_ins")
        .map(Node::items)
        .unwrap_or_default()
        .iter()
        .enumerate()
    {
        let place = place.index(index);
        let name = dropin.text("name").unwrap_or_default();
        match dropin.get("content").filter(|content| content.as_text() != Some("")) {
            Some(_) if !is_name(name) => {
                report.error(dropin, &place, "a name is expected, without a directory");
            }
            Some(content) if !name.is_empty() => found.push((name, content)),
            _ => report.warning(dropin, &place, "has no name or no content and is passed over"),
        }
    }
    found
}

/// systemd-networkd reads them when the machine boots, so they are files and nothing has to be started.
fn network_unit(unit: &Node, name: &Node, files: &mut Files, place: &Place<'_>, report: &mut Report) {
    let file = format!("/etc/systemd/network/{}", name.as_text().unwrap_or_default());
    if unit.get("mask").and_then(Node::as_bool) == Some(true) {
        files.write(&file, "");
        return;
    }
    let mut write = |path: String, content: &Node| {
        let (url, compressed) = files.encode(content.as_text().unwrap_or_default().as_bytes());
        let rest = vec![("overwrite", Node::ours(true)), ("mode", Node::ours(0o644))];
        files.add(
            &Node::at(name.position, path),
            Node::at(content.position, url),
            compressed,
            rest,
        );
    };
    for (dropin, content) in dropins(unit, place, report) {
        write(format!("{file}.d/{dropin}"), content);
    }
    if let Some(content) = unit.get("content").filter(|content| content.as_text() != Some("")) {
        write(file, content);
    }
}

fn system_unit(unit: &Node, name: &Node, units: &mut Units, place: &Place<'_>, report: &mut Report) {
    let says = |key: &str| unit.get(key).and_then(Node::as_bool) == Some(true);
    let content = unit.get("content").filter(|content| content.as_text() != Some(""));
    let (mask, enable) = (says("mask"), says("enable"));
    if mask && content.is_some() {
        report.warning(
            unit,
            &place.key("mask"),
            "the unit is masked: its content is passed over",
        );
    }
    let mut start = false;
    let mut stop = false;
    if let Some(command) = unit.get("command").filter(|command| command.as_text() != Some("")) {
        let place = place.key("command");
        match command.as_text().unwrap_or_default() {
            "start" | "restart" | "reload-or-restart" => start = true,
            // The machine boots with all of its configuration: there is nothing that could have to be read again.
            "reload" | "try-restart" | "reload-or-try-restart" => {}
            "stop" if content.is_some() && !enable => {}
            "stop" => {
                stop = true;
                if !mask {
                    let message = "the unit is masked, so that it does not start; unmask it to start it by hand";
                    report.warning(command, &place, message);
                }
            }
            _ => {
                let message = "is no command that is known: start, stop, restart, reload, try-restart, \
                               reload-or-restart and reload-or-try-restart are";
                report.error(command, &place, message);
            }
        }
    }
    let dropins = dropins(unit, place, report);
    let known = units.of_name(name);
    if let Some(content) = content
        && known.content.replace(content.clone()).is_some()
    {
        let message = "is written before already: the last one stays";
        report.warning(name, &place.key("name"), message);
    }
    known.enable |= enable;
    known.mask |= mask || stop;
    for (dropin, content) in dropins {
        known.set_dropin(dropin, content.clone());
    }
    if start {
        units.started.push(name.clone());
    }
}
