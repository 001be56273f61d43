//! What holds for any text at all, however broken: libFuzzer and `cargo test` (`tests/fuzz.rs`) drive the same functions.
//! A panic is a finding, and so is whatever takes too long or too much memory.

// Each of libFuzzer's programs drives one of them.
#![allow(dead_code)]

use coreos_kvm_ignition::{
    Config, Files, Kind, Options, Platform, Report, Transpiled, TreeEntry, TreeEntryKind, Version, transpile as library,
};

/// A target and its name.
pub(crate) type Target = (&'static str, fn(&[u8]));

/// All of them.
pub(crate) const TARGETS: [Target; 4] = [
    ("transpile", transpile),
    ("ignition", ignition),
    ("merge", merge),
    ("convert", convert),
];

/// Between the two texts of [`merge`].
pub(crate) const SEPARATOR: u8 = 0;

/// Any text, in the language that it seems to be in, and in one that it may not be in.
pub(crate) fn transpile(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let kinds = [
        Kind::Ignition,
        Kind::Butane,
        Kind::ContainerLinuxConfig,
        Kind::CloudConfig,
        Kind::Script,
    ];
    let forced = kinds[data.len() % kinds.len()];
    for kind in [None, Some(forced)] {
        let done = read(&text, kind, false);
        assert_eq!(done, read(&text, kind, false), "the same text gives the same answer");
        let strict = read(&text, kind, true);
        match done {
            Ok(done) => {
                assert!(!done.report.has_errors(), "what has errors is refused");
                assert_eq!(strict.is_ok(), !done.report.has_warnings(), "strict refuses warnings");
                round_trip(&done.config);
            }
            Err(report) => {
                assert!(report.has_errors(), "what is refused has errors");
                assert!(strict.is_err(), "strict takes no more than lenient");
            }
        }
    }
}

/// Any text as raw Ignition.
pub(crate) fn ignition(data: &[u8]) {
    if let Ok((config, _)) = Config::parse(&String::from_utf8_lossy(data)) {
        round_trip(&config);
    }
}

/// Any two texts, one merged into the other.
pub(crate) fn merge(data: &[u8]) {
    let middle = data.iter().position(|byte| *byte == SEPARATOR);
    let (one, other) = match middle {
        Some(middle) => (&data[..middle], &data[middle + 1..]),
        None => data.split_at(data.len() / 2),
    };
    let config = |data: &[u8]| read(&String::from_utf8_lossy(data), None, false).map(|done| done.config);
    let (Ok(one), Ok(other)) = (config(one), config(other)) else {
        return;
    };
    for (parent, child) in [(&one, &other), (&other, &one), (&one, &one)] {
        if let Ok(merged) = parent.merge(child) {
            assert_eq!(
                merged.version(),
                parent.version(),
                "the outcome is of the parent's version"
            );
            round_trip(&merged);
        }
    }
}

/// Any text, brought to every version that there is.
pub(crate) fn convert(data: &[u8]) {
    let Ok(done) = read(&String::from_utf8_lossy(data), None, false) else {
        return;
    };
    for version in versions() {
        if let Ok(config) = done.config.for_guest(&[version]) {
            assert_eq!(config.version(), version, "it is of the version that was asked for");
            round_trip(&config);
        }
    }
}

/// Every version that the library knows.
pub(crate) fn versions() -> impl Iterator<Item = Version> {
    [(2, 0..=4), (3, 0..=6)]
        .into_iter()
        .flat_map(|(major, minors)| minors.map(move |minor| format!("{major}.{minor}.0")))
        .filter_map(|version| version.parse().ok())
}

/// What is put out is read as what it was.
pub(crate) fn round_trip(config: &Config) {
    let json = config.to_json();
    for text in [&json, &config.to_json_pretty()] {
        let (again, _) = Config::parse(text).unwrap_or_else(|report| panic!("{report}\n{json:.2000}"));
        assert_eq!(&again, config, "what was put out says the same\n{json:.2000}");
        assert_eq!(again.to_json(), json, "what was put out is put out again");
    }
}

fn read(text: &str, kind: Option<Kind>, strict: bool) -> Result<Transpiled, Report> {
    let platforms = [
        None,
        Some(Platform::Custom),
        Some(Platform::Ec2),
        Some(Platform::VagrantVirtualBox),
    ];
    let options = Options {
        kind,
        strict,
        platform: platforms[text.len() % platforms.len()],
        files: &AnyFiles,
        ..Options::default()
    };
    library(text, &options)
}

/// Every file is there and has its own path for contents; every directory has one of each kind.
struct AnyFiles;

impl Files for AnyFiles {
    fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        Ok(path.as_bytes().to_vec())
    }

    fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        let entry = |name: &str, kind| TreeEntry {
            path: name.to_owned(),
            kind,
        };
        if path.len() % 4 == 3 {
            return Ok(vec![entry("socket", TreeEntryKind::Other)]);
        }
        Ok(vec![
            entry("folder", TreeEntryKind::Directory),
            entry("folder/program", TreeEntryKind::File { executable: true }),
            entry("folder/text", TreeEntryKind::File { executable: false }),
            entry(
                "link",
                TreeEntryKind::Link {
                    target: "folder/text".to_owned(),
                },
            ),
        ])
    }
}
