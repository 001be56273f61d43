//! Versions of etcd and flannel, as they are named in a configuration. (<https://semver.org>)

use std::fmt;

use crate::{
    node::{Map, Node},
    report::{Place, Report},
};

/// A version such as `3.1.6` or `3.3.0-rc.1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SemVer {
    pub(super) major: u64,
    pub(super) minor: u64,
    patch: u64,
    /// With its `-`; empty for none.
    pre_release: String,
    /// With its `+`; empty for none.
    metadata: String,
}

impl SemVer {
    fn parse(text: &str) -> Option<Self> {
        let (text, metadata) = split_off(text, '+')?;
        let (text, pre_release) = split_off(text, '-')?;
        let mut numbers = text.splitn(3, '.').map(|number| {
            let digits = number.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| number.parse::<u64>().ok()).flatten()
        });
        let mut number = || numbers.next().flatten();
        Some(Self {
            major: number()?,
            minor: number()?,
            patch: number()?,
            pre_release,
            metadata,
        })
    }

    /// Whether it is before `major.minor.0`; a pre-release of that is.
    pub(super) fn is_before(&self, major: u64, minor: u64) -> bool {
        let numbers = (self.major, self.minor, self.patch);
        numbers < (major, minor, 0) || (numbers == (major, minor, 0) && !self.pre_release.is_empty())
    }
}

/// What stands before the mark, and the rest with its mark.
fn split_off(text: &str, mark: char) -> Option<(&str, String)> {
    let Some((before, after)) = text.split_once(mark) else {
        return Some((text, String::new()));
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    (!after.is_empty() && after.chars().all(fits)).then(|| (before, format!("{mark}{after}")))
}

impl fmt::Display for SemVer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            major, minor, patch, ..
        } = self;
        write!(f, "{major}.{minor}.{patch}{}{}", self.pre_release, self.metadata)
    }
}

/// The version that a section names, and where; `Ok(None)` if it names none.
///
/// # Errors
/// Nothing more: the report has it, when what is named is no version.
pub(super) fn of_section<'a>(
    section: &'a Map,
    place: &Place<'_>,
    report: &mut Report,
) -> Result<Option<(SemVer, &'a Node)>, ()> {
    use crate::node::Value::{Null, Plain, Text};
    let Some(node) = section.get("version") else {
        return Ok(None);
    };
    let parsed = match &node.value {
        Null => return Ok(None),
        Text(text) | Plain(text) => SemVer::parse(text),
        _ => None,
    };
    parsed.map(|version| Some((version, node))).ok_or_else(|| {
        let message = "a version of three numbers is expected, such as 3.1.6";
        report.error(node, &place.key("version"), message);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("3.1.6", Some("3.1.6"))]
    #[case("3.3.0-rc.1+build", Some("3.3.0-rc.1+build"))]
    #[case("03.1.0", Some("3.1.0"))]
    #[case("3.1", None)]
    #[case("3.1.2.3", None)]
    #[case("v3.1.0", None)]
    #[case("+3.1.0", None)]
    #[case("3.1.0-ä", None)]
    fn versions(#[case] text: &str, #[case] expected: Option<&str>) {
        assert_eq!(
            SemVer::parse(text).map(|version| version.to_string()).as_deref(),
            expected
        );
    }

    #[test]
    fn a_pre_release_is_before_the_release() {
        assert!(SemVer::parse("2.3.0-rc.1").unwrap().is_before(2, 3));
        assert!(!SemVer::parse("2.3.0").unwrap().is_before(2, 3));
        assert!(!SemVer::parse("3.0.0").unwrap().is_before(2, 3));
    }
}
