//! What is wrong with a configuration.

use std::fmt;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Line and column in the user's own text, both from 1, where they are known.
    pub position: Option<(usize, usize)>,
    /// The place in the structure, as in `storage.files.0.mode`; empty for the whole.
    pub path: String,
    /// A sentence without a full stop.
    pub message: String,
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((line, column)) = self.position {
            write!(f, "line {line}, column {column}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Everything that is wrong with a configuration, at least one thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    first: Entry,
    others: Vec<Entry>,
}

impl Report {
    pub(crate) fn one(path: impl Into<String>, message: impl Into<String>) -> Self {
        let entry = Entry {
            position: None,
            path: path.into(),
            message: message.into(),
        };
        Self {
            first: entry,
            others: Vec::new(),
        }
    }

    pub(crate) fn at(line: usize, column: usize, message: impl Into<String>) -> Self {
        let entry = Entry {
            position: Some((line, column)),
            path: String::new(),
            message: message.into(),
        };
        Self {
            first: entry,
            others: Vec::new(),
        }
    }

    /// None where nothing is wrong.
    pub(crate) fn of(entries: Vec<Entry>) -> Option<Self> {
        let mut entries = entries.into_iter();
        Some(Self {
            first: entries.next()?,
            others: entries.collect(),
        })
    }

    /// In the order in which they stand in the configuration.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        match self.others.len() {
            0 => Ok(()),
            count => write!(f, " (and {count} more)"),
        }
    }
}

impl std::error::Error for Report {}
