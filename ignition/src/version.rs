//! Versions of the Ignition specification.

use std::{fmt, str::FromStr};

use crate::report::Report;

/// A version of the Ignition specification that this library knows: 2.0.0 to 2.4.0 and 3.0.0 to 3.6.0.
/// (<https://coreos.github.io/ignition/specs/>)
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    major: u8,
    minor: u8,
}

impl Version {
    /// Newest minor versions of the two majors.
    const NEWEST: [(u8, u8); 2] = [(2, 4), (3, 6)];

    pub(crate) const fn v2(minor: u8) -> Self {
        Self { major: 2, minor }
    }

    pub(crate) const fn v3(minor: u8) -> Self {
        Self { major: 3, minor }
    }

    /// 2 or 3. The two are different languages.
    pub fn major(self) -> u8 {
        self.major
    }

    /// The second number.
    pub fn minor(self) -> u8 {
        self.minor
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.0", self.major, self.minor)
    }
}

impl FromStr for Version {
    type Err = Report;

    /// # Errors
    /// When the text is no version, or one that this library does not know.
    fn from_str(text: &str) -> Result<Self, Report> {
        let wrong = |what: &str| Report::of(None, "ignition.version", format!("{text:?} {what}"));
        let numbers: Vec<u32> = text
            .split('.')
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()
            .filter(|numbers: &Vec<u32>| numbers.len() == 3)
            .ok_or_else(|| wrong("is no version such as 3.3.0"))?;
        let known = Self::NEWEST
            .into_iter()
            .flat_map(|(major, newest)| (0..=newest).map(move |minor| Self { major, minor }))
            .find(|version| numbers == [u32::from(version.major), u32::from(version.minor), 0]);
        known.ok_or_else(|| wrong("is not supported: Ignition 2.0.0 to 2.4.0 and 3.0.0 to 3.6.0 are"))
    }
}
