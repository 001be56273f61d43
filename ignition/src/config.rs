//! A configuration that Ignition would accept.

use crate::{
    node::Node,
    report::{Place, Report, Severity},
    text, v2, v3,
    version::Version,
};

/// An Ignition configuration, 2.x or 3.x, that Ignition would accept, as far as can be told without a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    version: Version,
    /// Keys of the version alone, in the specification's order; `ignition.version` is `version`.
    root: Node,
}

impl Config {
    /// Reads raw Ignition (JSON) and checks it. The report has warnings and infos.
    ///
    /// # Errors
    /// Everything that is wrong: too long, no JSON, of a version that this library does not know, not of the specification's
    /// shape, or in contradiction with itself.
    pub fn parse(text: &str) -> Result<(Self, Report), Report> {
        let mut report = Report::default();
        let node = text::parse_json(text, &mut report)?;
        Self::from_raw(node, report)
    }

    /// A raw configuration's tree, held against its version and checked.
    pub(crate) fn from_raw(node: Node, mut report: Report) -> Result<(Self, Report), Report> {
        let version = raw_version(&node)?;
        let root = language(version).shape(node, version.minor(), &mut report);
        let config = Self { version, root };
        config.check(&mut report);
        report.sort();
        if report.has_errors() {
            Err(report)
        } else {
            Ok((config, report))
        }
    }

    /// A translation's outcome, whose report is in places of the outcome.
    pub(crate) fn from_translation(version: Version, mut root: Node, report: &mut Report) -> Self {
        set_version(&mut root, version);
        let root = language(version).shape(root, version.minor(), report);
        let config = Self { version, root };
        config.check(report);
        config
    }

    fn check(&self, report: &mut Report) {
        match self.version.major() {
            2 => v2::check(&self.root, self.version.minor(), report),
            _ => v3::check(&self.root, self.version.minor(), report),
        }
    }

    /// The version of the specification that it follows.
    pub fn version(&self) -> Version {
        self.version
    }

    pub(crate) fn root(&self) -> &Node {
        &self.root
    }

    /// The same configuration in a version that the guest accepts: its own if that is among them, else the next higher one of
    /// the same major, else the highest lower one that loses nothing. Version 2 is translated to 3 where no 2 can have it.
    ///
    /// # Errors
    /// When it uses something that none of them has; the fields are named, for the version that comes nearest.
    pub fn for_guest(&self, accepted: &[Version]) -> Result<Self, Report> {
        if accepted.contains(&self.version) {
            return Ok(self.clone());
        }
        let mut nearest = None;
        for target in self.nearest_first(accepted) {
            match self.to_minor(target) {
                Ok(config) => return Ok(config),
                Err(report) => nearest = nearest.or(Some(report)),
            }
        }
        if self.version.major() == 2 && accepted.iter().any(|version| version.major() == 3) {
            return match self.to_v3().and_then(|config| config.for_guest(accepted)) {
                Ok(config) => Ok(config),
                Err(report) => Err(nearest.unwrap_or(report)),
            };
        }
        Err(nearest.unwrap_or_else(|| {
            let message = if accepted.is_empty() {
                "this guest accepts no Ignition".to_owned()
            } else {
                format!("{} is none that this guest accepts: {}", self.version, names(accepted))
            };
            Report::of(None, "ignition.version", message)
        }))
    }

    /// Versions of the same major: higher ones upwards, then lower ones downwards.
    fn nearest_first(&self, accepted: &[Version]) -> Vec<Version> {
        let same = accepted
            .iter()
            .copied()
            .filter(|version| version.major() == self.version.major());
        let (mut higher, mut lower): (Vec<_>, Vec<_>) = same.partition(|version| *version > self.version);
        higher.sort_unstable();
        lower.sort_unstable_by(|one, other| other.cmp(one));
        higher.into_iter().chain(lower).collect()
    }

    /// To another version of the same major.
    fn to_minor(&self, target: Version) -> Result<Self, Report> {
        let mut root = self.root.clone();
        let mut report = Report::default();
        if target.major() == 3 {
            v3::convert(&mut root, self.version.minor(), target.minor(), &mut report);
        }
        set_version(&mut root, target);
        // Whatever the target's table does not know would be lost, and that is an error here.
        let mut lost = Report::default();
        let root = language(target).shape(root, target.minor(), &mut lost);
        for entry in lost.entries() {
            report.say(
                Severity::Error,
                entry.position,
                entry.path.as_str(),
                entry.message.as_str(),
            );
        }
        let config = Self { version: target, root };
        config.check(&mut report);
        report.sort();
        if report.has_errors() { Err(report) } else { Ok(config) }
    }

    fn to_v3(&self) -> Result<Self, Report> {
        let mut report = Report::default();
        let (version, root) = v2::to_v3(&self.root, &mut report);
        if report.has_errors() {
            return Err(report);
        }
        let config = Self::from_translation(version, root, &mut report);
        if report.has_errors() { Err(report) } else { Ok(config) }
    }

    /// `child` over this one, in this one's version, by Ignition's own rules: of version 3 those of `ignition.config.merge`
    /// (the child wins, lists are unions by key), of version 2 those of `ignition.config.append`.
    ///
    /// # Errors
    /// When the child cannot be brought to this one's version, or the two contradict each other.
    pub fn merge(&self, child: &Self) -> Result<Self, Report> {
        let child = child.for_guest(&[self.version])?;
        let mut root = match self.version.major() {
            2 => v2::append(&self.root, &child.root),
            _ => v3::merge(&self.root, &child.root),
        };
        set_version(&mut root, self.version);
        let config = Self {
            version: self.version,
            root,
        };
        let mut report = Report::default();
        config.check(&mut report);
        if report.has_errors() { Err(report) } else { Ok(config) }
    }

    /// As JSON without blanks: the same configuration gives the same bytes.
    pub fn to_json(&self) -> String {
        self.root.to_json()
    }

    /// As JSON for people, indented by two blanks.
    pub fn to_json_pretty(&self) -> String {
        self.root.to_json_pretty()
    }
}

fn language(version: Version) -> &'static crate::shape::Language {
    match version.major() {
        2 => &v2::LANGUAGE,
        _ => &v3::LANGUAGE,
    }
}

/// The version that a raw configuration names.
fn raw_version(node: &Node) -> Result<Version, Report> {
    let place = Place::ROOT.key("ignition");
    let place = place.key("version");
    let refused = |node: &Node, message: &str| Report::of(node.position, place.to_string(), message);
    match node.find(&["ignition", "version"]) {
        Some(version) => match version.as_text() {
            Some(text) => text.parse().map_err(|report: Report| match report.entries().first() {
                Some(entry) => refused(version, &entry.message),
                None => report,
            }),
            None => Err(refused(version, "a text such as \"3.3.0\" is expected")),
        },
        None if node.get("ignitionVersion").is_some() => Err(refused(
            node,
            "this is Ignition of version 1, which is not supported: 2.0.0 to 2.4.0 and 3.0.0 to 3.6.0 are",
        )),
        None => Err(refused(
            node,
            "is missing: every Ignition configuration names its version, such as 3.3.0",
        )),
    }
}

fn set_version(root: &mut Node, version: Version) {
    if let Some(map) = root.as_map_mut() {
        map.map_mut("ignition")
            .insert("version", Node::ours(version.to_string()));
    }
}

fn names(versions: &[Version]) -> String {
    versions.iter().map(Version::to_string).collect::<Vec<_>>().join(", ")
}
