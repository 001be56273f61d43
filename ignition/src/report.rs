//! What there is to say of a configuration: errors, warnings, infos, each with its place in the user's own text.

use std::{collections::HashMap, fmt};

use crate::node::{Node, Position, Value};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The configuration cannot be used.
    Error,
    /// It can be used, but its author may have meant something else. Strict translation takes it for an error.
    Warning,
    /// Worth knowing.
    Info,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Info => "info",
        })
    }
}

/// One thing that there is to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// How bad it is.
    pub severity: Severity,
    /// Line and column in the user's own text, where it is about something that stands there.
    pub position: Option<Position>,
    /// The place in the structure, as in `storage.files.0.mode`; empty for the whole.
    pub path: String,
    /// A sentence without a full stop.
    pub message: String,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(position) = self.position {
            write!(f, "{position}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Everything that there is to say of a configuration, in the order of its text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    entries: Vec<Entry>,
}

/// More than this is not said: whoever mends a thousand things looks again. A hostile text must not become a longer report.
const ENTRIES_MAX: usize = 1000;

impl Report {
    /// A report of one error.
    pub(crate) fn of(position: Option<Position>, path: impl Into<String>, message: impl Into<String>) -> Self {
        let mut report = Self::default();
        report.say(Severity::Error, position, path, message);
        report
    }

    pub(crate) fn say(
        &mut self,
        severity: Severity,
        position: Option<Position>,
        path: impl Into<String>,
        message: impl Into<String>,
    ) {
        let entry = Entry {
            severity,
            position,
            path: path.into(),
            message: message.into(),
        };
        // An error always finds room: whether there is one decides.
        if self.entries.len() < ENTRIES_MAX || (severity == Severity::Error && !self.has_errors()) {
            self.entries.push(entry);
        }
    }

    /// Something is wrong with `node`, which is at `place`.
    pub(crate) fn error(&mut self, node: &Node, place: &Place<'_>, message: impl Into<String>) {
        self.say(Severity::Error, node.position, place.to_string(), message);
    }

    /// Something about `node`, which is at `place`, may not be meant.
    pub(crate) fn warning(&mut self, node: &Node, place: &Place<'_>, message: impl Into<String>) {
        self.say(Severity::Warning, node.position, place.to_string(), message);
    }

    /// Something about `node`, which is at `place`, is worth knowing.
    pub(crate) fn info(&mut self, node: &Node, place: &Place<'_>, message: impl Into<String>) {
        self.say(Severity::Info, node.position, place.to_string(), message);
    }

    /// In the order of the text.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Whether there is nothing to say.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the configuration cannot be used.
    pub fn has_errors(&self) -> bool {
        self.entries.iter().any(|entry| entry.severity == Severity::Error)
    }

    /// Whether something may not be meant.
    pub fn has_warnings(&self) -> bool {
        self.entries.iter().any(|entry| entry.severity == Severity::Warning)
    }

    /// Adds what another report says.
    pub(crate) fn append(&mut self, other: Self) {
        self.entries.extend(other.entries);
    }

    /// In the order of the text; what has no place in it comes first.
    pub(crate) fn sort(&mut self) {
        self.entries.sort_by_key(|entry| entry.position);
        self.entries.dedup();
    }

    /// Names the places of the entries as they are called in the user's own text: what a check found in the `outcome` of a
    /// translation is where the user wrote it in `source`, known by the position that translated nodes keep. A key that is
    /// missing has none: it is named below the map that lacks it, as the user's language spells it.
    pub(crate) fn in_the_words_of(mut self, source: &Node, outcome: &Node) -> Self {
        if self.entries.is_empty() {
            return self;
        }
        let (mut theirs, mut ours) = (HashMap::new(), HashMap::new());
        collect(source, &mut String::new(), &mut theirs);
        collect(outcome, &mut String::new(), &mut ours);
        for entry in &mut self.entries {
            let Some(position) = entry.position else { continue };
            let Some(path) = theirs.get(&position) else { continue };
            let below = ours
                .get(&position)
                .and_then(|ours| entry.path.strip_prefix(ours.as_str()));
            let below = below.filter(|below| below.starts_with('.')).map(snake_case);
            entry.path = format!("{path}{}", below.unwrap_or_default());
        }
        self
    }
}

/// `sshAuthorizedKeys` as Butane and Container Linux Config spell it: `ssh_authorized_keys`.
fn snake_case(path: &str) -> String {
    let mut spelled = String::with_capacity(path.len() + 4);
    for c in path.chars() {
        if c.is_ascii_uppercase() {
            spelled.push('_');
        }
        spelled.push(c.to_ascii_lowercase());
    }
    // Of mebibytes, which are written sizeMiB.
    spelled.replace("_mi_b", "_mib")
}

/// The paths of all nodes by their positions. Of nodes that begin at one place the outer one stands for all.
fn collect(node: &Node, path: &mut String, paths: &mut HashMap<Position, String>) {
    if let Some(position) = node.position {
        paths.entry(position).or_insert_with(|| path.clone());
    }
    let length = path.len();
    let mut step = |child: &Node, segment: fmt::Arguments<'_>| {
        let dot = if length == 0 { "" } else { "." };
        // Writing to a string cannot fail.
        let _ = fmt::Write::write_fmt(path, format_args!("{dot}{segment}"));
        collect(child, path, paths);
        path.truncate(length);
    };
    match &node.value {
        Value::List(items) => items
            .iter()
            .enumerate()
            .for_each(|(index, item)| step(item, format_args!("{index}"))),
        Value::Map(map) => map.iter().for_each(|(key, value)| step(value, format_args!("{key}"))),
        _ => {}
    }
}

/// Each entry on a line of its own, as `error at line 3, column 5, storage.files.0.path: ...`.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, entry) in self.entries.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{}: {entry}", entry.severity)?;
        }
        Ok(())
    }
}

impl std::error::Error for Report {}

/// A place in the structure, made on the way down without allocating: `root().key("storage").key("files").index(0)`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    parent: Option<&'a Place<'a>>,
    segment: Segment<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Segment<'a> {
    Root,
    Key(&'a str),
    Index(usize),
}

impl<'a> Place<'a> {
    pub(crate) const ROOT: Place<'static> = Place {
        parent: None,
        segment: Segment::Root,
    };

    pub(crate) fn key(&'a self, key: &'a str) -> Self {
        Place {
            parent: Some(self),
            segment: Segment::Key(key),
        }
    }

    pub(crate) fn index(&'a self, index: usize) -> Self {
        Place {
            parent: Some(self),
            segment: Segment::Index(index),
        }
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(parent) = self.parent else { return Ok(()) };
        if !matches!(parent.segment, Segment::Root) {
            write!(f, "{parent}.")?;
        }
        match self.segment {
            Segment::Root => Ok(()),
            Segment::Key(key) => f.write_str(key),
            Segment::Index(index) => write!(f, "{index}"),
        }
    }
}
