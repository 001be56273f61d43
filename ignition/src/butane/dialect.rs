//! Variant and version: which keys there are, and for which Ignition they are.

use super::shape;
use crate::{
    node::Node,
    report::{Place, Report},
    shape::Language,
    version::Version,
};

/// Keys are numbered by the minor version of `fcos` that brought them; `flatcar` 1.0.0 has those of `fcos` 1.4.0.
const FLATCAR_LEVEL: u8 = 4;
const FCOS_NEWEST: u8 = 7;
const FLATCAR_NEWEST: u8 = 1;

/// The one of Butane's languages that a configuration is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// Fedora CoreOS, 1.x.0.
    Fcos(u8),
    /// Flatcar Container Linux, 1.x.0.
    Flatcar(u8),
}

impl Dialect {
    /// What the configuration says of itself, read before anything else; None, and an error, if it is none of these.
    pub(super) fn of(tree: &Node, report: &mut Report) -> Option<Self> {
        let scalar = |key| {
            tree.get(key).and_then(|node| match &node.value {
                crate::node::Value::Text(text) | crate::node::Value::Plain(text) => Some(text.as_str()),
                _ => None,
            })
        };
        let node_of = |key| tree.get(key).unwrap_or(tree);
        let place = Place::ROOT.key("variant");
        let (make, newest): (fn(u8) -> Self, u8) = match scalar("variant").unwrap_or_default() {
            "fcos" => (Self::Fcos, FCOS_NEWEST),
            "flatcar" => (Self::Flatcar, FLATCAR_NEWEST),
            "" => {
                report.error(
                    node_of("variant"),
                    &place,
                    "is missing: `fcos` or `flatcar` is expected",
                );
                return None;
            }
            variant => {
                let message = format!("{variant:?} is not supported: {SUPPORTED} are");
                report.error(node_of("variant"), &place, message);
                return None;
            }
        };
        let text = scalar("version").unwrap_or_default();
        let dialect = (0..=newest).find(|minor| text == format!("1.{minor}.0")).map(make);
        if dialect.is_none() {
            let place = Place::ROOT.key("version");
            let message = match text {
                "" => format!("is missing: {SUPPORTED} are supported"),
                _ => format!("{text:?} is not supported: {SUPPORTED} are; experimental versions never are"),
            };
            report.error(node_of("version"), &place, message);
        }
        dialect
    }

    /// The version of Ignition that it stands for.
    pub(super) fn ignition(self) -> Version {
        Version::v3(match self {
            // 1.3.0 brought keys of its own alone.
            Self::Fcos(minor @ 0..=2) => minor,
            Self::Fcos(minor) => minor.saturating_sub(1),
            Self::Flatcar(minor) => minor.saturating_add(3),
        })
    }

    /// What the tables call its version.
    pub(super) fn level(self) -> u8 {
        match self {
            Self::Fcos(minor) => minor,
            Self::Flatcar(minor) => minor.saturating_add(FLATCAR_LEVEL),
        }
    }

    pub(super) fn language(self) -> &'static Language {
        match self {
            Self::Fcos(_) => &FCOS,
            Self::Flatcar(_) => &FLATCAR,
        }
    }
}

const SUPPORTED: &str = "fcos 1.0.0 to 1.7.0 and flatcar 1.0.0 and 1.1.0";

const FCOS: Language = Language {
    fields: shape::FCOS,
    version_name: |level| format!("fcos 1.{level}.0"),
};

const FLATCAR: Language = Language {
    fields: shape::FLATCAR,
    version_name: |level| match level.saturating_sub(FLATCAR_LEVEL) {
        minor @ 0..=FLATCAR_NEWEST => format!("flatcar 1.{minor}.0"),
        _ => "a flatcar later than 1.1.0".to_owned(),
    },
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    fn of(source: &str) -> (Option<Dialect>, String) {
        let mut report = Report::default();
        let tree = text::parse_yaml(source, &mut report).unwrap();
        let dialect = Dialect::of(&tree, &mut report);
        (dialect, report.to_string())
    }

    #[rstest::rstest]
    #[case("{variant: fcos, version: 1.0.0}", Dialect::Fcos(0), 0)]
    #[case("{variant: fcos, version: 1.2.0}", Dialect::Fcos(2), 2)]
    #[case("{variant: fcos, version: 1.3.0}", Dialect::Fcos(3), 2)]
    #[case("{variant: fcos, version: \"1.7.0\"}", Dialect::Fcos(7), 6)]
    #[case("{variant: flatcar, version: 1.0.0}", Dialect::Flatcar(0), 3)]
    #[case("{variant: flatcar, version: 1.1.0}", Dialect::Flatcar(1), 4)]
    fn each_stands_for_one_version_of_ignition(#[case] text: &str, #[case] dialect: Dialect, #[case] minor: u8) {
        assert_eq!(of(text).0, Some(dialect));
        assert_eq!(dialect.ignition(), Version::v3(minor));
    }

    #[rstest::rstest]
    #[case(
        "{variant: openshift, version: 4.14.0}",
        "column 11: variant: \"openshift\" is not supported: fcos 1.0.0 to"
    )]
    #[case(
        "{variant: fcos, version: 1.8.0-experimental}",
        "version: \"1.8.0-experimental\" is not supported"
    )]
    #[case("{variant: flatcar, version: 1.2.0}", "version: \"1.2.0\" is not supported")]
    #[case("{variant: fcos, version: 1.5}", "version: \"1.5\" is not supported")]
    #[case("{variant: fcos}", "version: is missing")]
    #[case("{variant: [fcos], version: 1.0.0}", "variant: is missing")]
    fn all_else_is_refused_by_name(#[case] text: &str, #[case] expected: &str) {
        let (dialect, said) = of(text);
        assert_eq!(dialect, None);
        assert!(said.contains(expected), "{said}");
    }
}
