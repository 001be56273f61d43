//! Raw Ignition, specification 3.0 to 3.6.

use std::{fmt, str::FromStr};

use ignition_config::{Config as Typed, Error, Warning};
use serde_json::Value;

use crate::{
    check,
    report::{Entry, Report},
};

/// Longest text that is read, in bytes.
pub const TEXT_MAX: usize = 1024 * 1024;

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    major: u32,
    minor: u32,
    patch: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = Report;

    fn from_str(text: &str) -> Result<Self, Report> {
        let invalid = || Report::one("ignition.version", format!("{text:?} is no version such as 3.3.0"));
        let mut numbers = text.split('.').map(|number| number.parse().map_err(|_| invalid()));
        let mut next = || numbers.next().ok_or_else(invalid)?;
        let version = Self {
            major: next()?,
            minor: next()?,
            patch: next()?,
        };
        if numbers.next().is_some() {
            Err(invalid())
        } else {
            Ok(version)
        }
    }
}

/// A configuration that Ignition would accept, as far as can be told without a machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    version: Version,
    value: Value,
    /// Keys that the version does not know, which Ignition passes over with a warning.
    unknown: Vec<String>,
}

impl Config {
    /// Reads a configuration and checks it.
    ///
    /// # Errors
    /// When it is too long, no JSON (with line and column), of a version that is none of 3.0.0 to 3.6.0, not of the
    /// specification's shape, or contradicts itself.
    pub fn parse(text: &str) -> Result<Self, Report> {
        if text.len() > TEXT_MAX {
            let message = format!(
                "the configuration has {} bytes; at most {TEXT_MAX} are read",
                text.len()
            );
            return Err(Report::one("", message));
        }
        // serde_json bounds the depth at 128 levels.
        let value: Value = serde_json::from_str(text).map_err(|error| syntax(&error))?;
        let Some(version) = value.pointer("/ignition/version").and_then(Value::as_str) else {
            return Err(Report::one(
                "ignition.version",
                "is missing: every Ignition configuration names its version, such as 3.3.0",
            ));
        };
        let version: Version = version.parse()?;
        // From the text again, for the positions.
        let unknown = shape(text, version)?;
        match Report::of(check::check(&value)) {
            Some(report) => Err(report),
            None => Ok(Self {
                version,
                value,
                unknown,
            }),
        }
    }

    /// The version of the specification that it follows.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Keys that its version does not know, as paths.
    pub fn unknown_keys(&self) -> &[String] {
        &self.unknown
    }

    pub(crate) fn value(&self) -> &Value {
        &self.value
    }

    pub(crate) fn with_value(&self, value: Value) -> Self {
        Self {
            version: self.version,
            value,
            unknown: self.unknown.clone(),
        }
    }

    /// The same configuration in a version that the guest accepts: its own if that is among them, else the highest.
    ///
    /// # Errors
    /// When it uses something that none of them has; the field is named.
    pub fn for_guest(&self, accepted: &[Version]) -> Result<Self, Report> {
        if accepted.contains(&self.version) {
            return Ok(self.clone());
        }
        let Some(&target) = accepted.iter().filter(|version| version.major == 3).max() else {
            return Err(Report::one(
                "ignition.version",
                format!("{} is none that this guest accepts ({})", self.version, list(accepted)),
            ));
        };
        let mut value = self.value.clone();
        if let Some(version) = value.pointer_mut("/ignition/version") {
            *version = Value::String(target.to_string());
        }
        let unknown = shape(&value.to_string(), target).map_err(|report| {
            let entry = report
                .entries()
                .next()
                .map(|entry| entry.message.clone())
                .unwrap_or_default();
            Report::one(
                "ignition.version",
                format!(
                    "the configuration needs {}, but this guest accepts {}: {entry}",
                    self.version,
                    list(accepted)
                ),
            )
        })?;
        let lost = unknown
            .iter()
            .filter(|key| !self.unknown.contains(key))
            .map(|key| Entry {
                position: None,
                path: key.clone(),
                message: format!(
                    "needs Ignition {}, but this guest accepts {}",
                    self.version,
                    list(accepted)
                ),
            });
        match Report::of(lost.collect()) {
            Some(report) => Err(report),
            None => Ok(Self {
                version: target,
                value,
                unknown,
            }),
        }
    }

    /// As JSON, keys in order: the same configuration gives the same bytes.
    pub fn to_json(&self) -> String {
        self.value.to_string()
    }
}

fn list(versions: &[Version]) -> String {
    versions.iter().map(Version::to_string).collect::<Vec<_>>().join(", ")
}

/// Compares with the version's types. Answers the keys that it does not know.
fn shape(text: &str, version: Version) -> Result<Vec<String>, Report> {
    match Typed::parse_str(text) {
        Ok((_, warnings)) => Ok(warnings
            .into_iter()
            .map(|warning| match warning {
                Warning::UnusedKey(path) => path.trim_start_matches("$.").to_owned(),
                warning => warning.to_string(),
            })
            .collect()),
        Err(Error::Serialization(error)) => Err(syntax(&error)),
        Err(_) => {
            let message = format!(
                "{version} is not supported: Ignition 3.0.0 to 3.6.0 are; a configuration of version 2 has to be translated first"
            );
            Err(Report::one("ignition.version", message))
        }
    }
}

fn syntax(error: &serde_json::Error) -> Report {
    let text = error.to_string();
    // The position is said apart.
    let message = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(message, _)| message);
    let what = if error.is_data() {
        "this is not what Ignition expects"
    } else {
        "this is not JSON"
    };
    Report::at(error.line(), error.column(), format!("{what}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn versions(texts: &[&str]) -> Vec<Version> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[rstest]
    #[case("{\n  \"ignition\": {,", "line 2, column 16: this is not JSON")]
    #[case("", "this is not JSON")]
    #[case("variant: fcos\nversion: 1.5.0", "line 1, column 1: this is not JSON")]
    #[case("{}", "ignition.version: is missing")]
    #[case(
        r#"{"ignition":{"version":"2.3.0"}}"#,
        "2.3.0 is not supported: Ignition 3.0.0 to 3.6.0 are"
    )]
    #[case(r#"{"ignition":{"version":"3.9.0"}}"#, "3.9.0 is not supported")]
    #[case(r#"{"ignition":{"version":"three"}}"#, "\"three\" is no version")]
    #[case(
        r#"{"ignition":{"version":"3.3.0"},"storage":{"files":[{"path":"/a","mode":"0644"}]}}"#,
        "column 78: this is not what Ignition expects"
    )]
    #[case(
        r#"{"ignition":{"version":"3.3.0"},"storage":{"files":[{"path":"a"}]}}"#,
        "storage.files.0.path: \"a\" is not absolute"
    )]
    fn what_is_wrong_is_said_with_its_place(#[case] text: &str, #[case] expected: &str) {
        let said = Config::parse(text).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
    }

    #[test]
    fn a_text_that_is_too_long_or_too_deep_is_refused() {
        assert!(Config::parse(&" ".repeat(TEXT_MAX + 1)).is_err());
        assert!(Config::parse(&"[".repeat(100_000)).is_err());
    }

    #[test]
    fn a_newer_version_is_brought_down_where_nothing_is_lost() {
        let config = Config::parse(r#"{"ignition":{"version":"3.5.0"},"storage":{"files":[{"path":"/a"}]}}"#).unwrap();
        let converted = config.for_guest(&versions(&["3.0.0", "3.3.0"])).unwrap();
        assert_eq!(converted.version().to_string(), "3.3.0");
        assert!(converted.to_json().contains(r#""version":"3.3.0""#));
    }

    #[test]
    fn what_would_be_lost_is_named() {
        let text = r#"{"ignition":{"version":"3.3.0"},"kernelArguments":{"shouldExist":["quiet"]}}"#;
        let said = Config::parse(text)
            .unwrap()
            .for_guest(&versions(&["3.0.0"]))
            .unwrap_err()
            .to_string();
        assert!(
            said.starts_with("kernelArguments") && said.contains("accepts 3.0.0"),
            "{said}"
        );
    }
}
