//! Raw Ignition as a whole: the corpus is read as its own words say, and whatever is read can be written, merged and brought
//! to other versions.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on fails

use std::{
    fs,
    path::{Path, PathBuf},
};

use coreos_kvm_ignition::{Config, Kind, Options, Report, Version, report::Severity, transpile};
use proptest::prelude::*;
use rstest::rstest;
use serde_json::{Value, json};

fn corpus(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus/ignition")
        .join(folder);
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "ign"))
        .collect();
    found.sort();
    assert!(!found.is_empty());
    found
}

fn parse(text: &str) -> Config {
    Config::parse(text)
        .unwrap_or_else(|report| panic!("{report}\n{text}"))
        .0
}

fn versions(names: &[&str]) -> Vec<Version> {
    names.iter().map(|name| name.parse().unwrap()).collect()
}

fn errors(report: &Report) -> Vec<String> {
    let errors = report
        .entries()
        .iter()
        .filter(|entry| entry.severity == Severity::Error);
    errors
        .map(|entry| format!("{}: {}", entry.path, entry.message))
        .collect()
}

/// What another reader of Ignition, from whom this library has nothing, makes of an output.
fn is_read_elsewhere(config: &Config) {
    if config.version().major() == 3 {
        let json = config.to_json();
        let (_, warnings) = ignition_config::Config::parse_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
        assert!(warnings.is_empty(), "{warnings:?}: {json}");
    }
}

#[test]
fn what_is_right_is_read_and_written_as_it_is() {
    for path in corpus("") {
        let text = fs::read_to_string(&path).unwrap();
        let config = parse(&text);
        assert_eq!(
            serde_json::from_str::<Value>(&config.to_json()).unwrap(),
            serde_json::from_str::<Value>(&text).unwrap(),
            "{path:?}"
        );
        assert_eq!(parse(&config.to_json()), config, "{path:?}");
        assert_eq!(parse(&config.to_json_pretty()).to_json(), config.to_json(), "{path:?}");
        is_read_elsewhere(&config);
        let transpiled = transpile(&text, &Options::default()).unwrap();
        assert_eq!((transpiled.kind, transpiled.config), (Kind::Ignition, config));
    }
}

#[test]
fn what_is_wrong_is_told_where_it_stands() {
    for path in corpus("wrong") {
        let report = Config::parse(&fs::read_to_string(&path).unwrap()).expect_err(&path.to_string_lossy());
        let expected = fs::read_to_string(path.with_extension("expect")).unwrap();
        let found = errors(&report);
        assert_eq!(found.len(), expected.lines().count(), "{path:?}\n{report}");
        for line in expected.lines() {
            let line = line.strip_prefix("# error: ").unwrap();
            let (place, part) = line.split_once(": ").unwrap();
            let matches = |error: &&String| {
                let message = error.strip_prefix(place).and_then(|error| error.strip_prefix(": "));
                message.is_some_and(|message| message.contains(part))
            };
            assert!(found.iter().any(|error| matches(&error)), "{path:?}: {line}\n{report}");
        }
        assert!(
            report.entries().iter().all(|entry| entry.position.is_some()),
            "{path:?}"
        );
    }
}

#[test]
fn what_is_right_fits_the_newest_of_its_major_and_comes_back() {
    for path in corpus("") {
        let config = parse(&fs::read_to_string(&path).unwrap());
        let newest = if config.version().major() == 2 {
            "2.4.0"
        } else {
            "3.6.0"
        };
        let up = config.for_guest(&versions(&[newest])).unwrap();
        is_read_elsewhere(&up);
        assert_eq!(up.for_guest(&[config.version()]).unwrap(), config, "{path:?}");
    }
}

#[test]
fn version_2_is_understood_by_a_guest_of_version_3() {
    let refused: Vec<(String, Vec<String>)> = corpus("")
        .into_iter()
        .map(|path| (path.clone(), parse(&fs::read_to_string(&path).unwrap())))
        .filter(|(_, config)| config.version().major() == 2)
        .filter_map(|(path, config)| match config.for_guest(&versions(&["3.3.0"])) {
            Ok(translated) => {
                assert_eq!(translated.version().to_string(), "3.3.0");
                is_read_elsewhere(&translated);
                None
            }
            Err(report) => Some((path.file_stem()?.to_string_lossy().into_owned(), errors(&report))),
        })
        .collect();
    let names: Vec<&str> = refused.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["2.4-oem-file"], "{refused:?}");
}

#[rstest]
// Its own, wherever it stands.
#[case("3.2.0", &["3.6.0", "3.2.0", "2.4.0"], "3.2.0")]
// The next higher one rather than the highest.
#[case("3.2.0", &["3.6.0", "3.4.0", "3.0.0"], "3.4.0")]
// The highest lower one.
#[case("3.4.0", &["3.0.0", "3.3.0", "3.1.0"], "3.3.0")]
#[case("2.2.0", &["2.3.0", "3.3.0"], "2.3.0")]
#[case("2.2.0", &["2.0.0", "3.3.0"], "2.0.0")]
#[case("2.2.0", &["3.1.0", "3.3.0"], "3.1.0")]
fn a_guest_gets_a_version_that_it_accepts(#[case] own: &str, #[case] accepted: &[&str], #[case] expected: &str) {
    let config = parse(&json!({"ignition": {"version": own}}).to_string());
    let found = config.for_guest(&versions(accepted)).unwrap();
    assert_eq!(found.version().to_string(), expected);
}

#[test]
fn what_a_guest_cannot_have_is_named_where_it_stands() {
    let text = "{\"ignition\": {\"version\": \"3.5.0\"},\n \"kernelArguments\": {\"shouldExist\": [\"quiet\"]},\n \
                \"storage\": {\"luks\": [],\n  \"files\": [{\"path\": \"/a\",\n    \"contents\": {\"source\": \"gs://a/b\"}}]}}";
    let report = parse(text).for_guest(&versions(&["3.1.0", "3.0.0"])).unwrap_err();
    assert_eq!(
        report.to_string(),
        "error: line 2, column 2: kernelArguments: is not in 3.1.0: it came with 3.3.0\n\
         error: line 3, column 14: storage.luks: is not in 3.1.0: it came with 3.2.0\n\
         error: line 5, column 28: storage.files.0.contents.source: gs is none of its schemes: data, http, https, tftp, s3 \
         are what this version fetches from"
    );
}

#[test]
fn a_guest_of_another_major_says_what_it_accepts() {
    let config = parse(r#"{"ignition": {"version": "3.0.0"}}"#);
    let report = config.for_guest(&versions(&["2.2.0", "2.4.0"])).unwrap_err();
    assert_eq!(
        errors(&report),
        ["ignition.version: 3.0.0 is none that this guest accepts: 2.2.0, 2.4.0"]
    );
}

#[rstest]
#[case::up_they_stay_without_effect("3.5.0", "3.6.0", 0o4755, Some(0o755))]
#[case::down_they_would_be_lost("3.6.0", "3.5.0", 0o4755, None)]
#[case::down_nothing_is_lost("3.6.0", "3.5.0", 0o755, Some(0o755))]
fn special_bits_of_a_mode_mean_what_they_meant(
    #[case] from: &str,
    #[case] to: &str,
    #[case] mode: u32,
    #[case] expected: Option<u32>,
) {
    let config = parse(
        &json!({"ignition": {"version": from}, "storage": {"files": [{"path": "/a", "mode": mode}]}}).to_string(),
    );
    let found = config.for_guest(&versions(&[to])).map(|config| config.to_json());
    match expected {
        Some(mode) => assert!(found.unwrap().contains(&format!("\"mode\":{mode}}}"))),
        None => assert_eq!(
            errors(&found.unwrap_err()),
            ["storage.files.0.mode: setuid, setgid and sticky bits need Ignition 3.6.0"]
        ),
    }
}

#[test]
fn a_child_is_brought_to_its_parents_version() {
    let parent = parse(r#"{"ignition": {"version": "3.4.0"}, "systemd": {"units": [{"name": "a.service"}]}}"#);
    let child =
        parse(r#"{"ignition": {"version": "2.2.0"}, "systemd": {"units": [{"name": "a.service", "mask": true}]}}"#);
    assert_eq!(
        parent.merge(&child).unwrap().to_json(),
        r#"{"ignition":{"version":"3.4.0"},"systemd":{"units":[{"mask":true,"name":"a.service"}]}}"#
    );
}

/// Some of these, each at most once.
fn some(names: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    proptest::sample::subsequence(names.to_vec(), 0..=names.len()).prop_shuffle()
}

fn storage() -> impl Strategy<Value = Value> {
    let nodes = some(&["/a", "/b", "/c", "/srv/d", "/srv/e", "/f"]);
    let kinds = proptest::collection::vec((0..3u8, 0..0o1000u32, any::<bool>(), "[a-z]{0,3}"), 6);
    let filesystems = some(&["/dev/vdb", "/dev/vdc"]);
    let labels = proptest::collection::vec("[A-Z]{1,8}", 2);
    (nodes, kinds, filesystems, labels).prop_map(|(paths, kinds, devices, labels)| {
        let (mut directories, mut files, mut links) = (vec![], vec![], vec![]);
        for (path, (kind, mode, flag, text)) in paths.into_iter().zip(kinds) {
            match kind {
                0 => directories.push(json!({"path": path, "mode": mode, "overwrite": flag})),
                1 => links.push(json!({"path": path, "target": format!("/{text}x"), "hard": false, "overwrite": flag})),
                _ => {
                    let contents = json!({"source": format!("data:,{text}")});
                    files.push(json!({"path": path, "mode": mode, "contents": contents, "user": {"id": mode}}));
                }
            }
        }
        let filesystems: Vec<Value> = devices
            .into_iter()
            .zip(labels)
            .map(|(device, label)| json!({"device": device, "format": "ext4", "label": label}))
            .collect();
        json!({"directories": directories, "files": files, "links": links, "filesystems": filesystems})
    })
}

/// Configurations that say things of most kinds. They have no `append` and no options: of these a merge has both.
fn configuration(minor: u8) -> impl Strategy<Value = String> {
    let users = (
        some(&["core", "ada", "bob"]),
        some(&["sudo", "docker"]),
        proptest::option::of(any::<bool>()),
    );
    let units = (
        some(&["a.service", "b.timer", "c.mount"]),
        some(&["10-a.conf", "20-b.conf"]),
        proptest::option::of(any::<bool>()),
    );
    let arguments = (some(&["a", "b", "c"]), some(&["d", "e"]), any::<bool>());
    (storage(), users, units, arguments).prop_map(move |(storage, users, units, arguments)| {
        let (names, groups, system) = users;
        let users: Vec<Value> = names
            .iter()
            .map(|name| json!({"name": name, "groups": groups, "system": system}))
            .collect();
        let (names, dropins, enabled) = units;
        let dropins: Vec<Value> = dropins
            .iter()
            .map(|name| json!({"name": name, "contents": "[Unit]\nA=b\n"}))
            .collect();
        let units: Vec<Value> = names
            .iter()
            .map(|name| json!({"name": name, "enabled": enabled, "dropins": dropins}))
            .collect();
        let mut config = json!({
            "ignition": {"version": format!("3.{minor}.0")},
            "passwd": {"users": users},
            "storage": storage,
            "systemd": {"units": units},
        });
        if minor >= 3 {
            let (some, others, turned) = arguments;
            let (should, should_not) = if turned { (others, some) } else { (some, others) };
            config["kernelArguments"] = json!({"shouldExist": should, "shouldNotExist": should_not});
        }
        config.to_string()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn what_is_written_is_read_again(text in (0..=6u8).prop_flat_map(configuration)) {
        let config = parse(&text);
        prop_assert_eq!(&parse(&config.to_json()), &config);
        prop_assert_eq!(parse(&config.to_json_pretty()).to_json(), config.to_json());
        is_read_elsewhere(&config);
    }

    #[test]
    fn merging_again_changes_nothing(parent in configuration(6), child in configuration(4)) {
        let (parent, child) = (parse(&parent), parse(&child));
        let once = parent.merge(&child).unwrap();
        prop_assert_eq!(&once.merge(&child).unwrap(), &once);
        prop_assert_eq!(once.version(), parent.version());
        is_read_elsewhere(&once);
        // A configuration over itself, or over nothing, is itself.
        prop_assert_eq!(&parent.merge(&parent).unwrap(), &parent);
        let nothing = parse(r#"{"ignition": {"version": "3.6.0"}}"#);
        prop_assert_eq!(&nothing.merge(&parent).unwrap(), &parent);
        prop_assert_eq!(&parent.merge(&nothing).unwrap(), &parent);
    }

    #[test]
    fn up_and_down_again_is_where_it_was(text in (0..=5u8).prop_flat_map(configuration), up in 1..=6u8) {
        let config = parse(&text);
        let target = versions(&[&format!("3.{}.0", config.version().minor().max(up))]);
        let higher = config.for_guest(&target).unwrap();
        prop_assert_eq!(higher.version(), target[0]);
        prop_assert_eq!(higher.for_guest(&[config.version()]).unwrap(), config);
    }

    #[test]
    fn nothing_makes_it_panic(text in "\\PC{0,64}", keys in some(&["ignition", "storage", "files", "systemd", "units"])) {
        let _ = Config::parse(&text);
        let mut value = json!([text, null, 1, true, {}, []]);
        for key in keys {
            value = json!({key: value, "ignition": {"version": "3.4.0", "config": value}});
        }
        let _ = Config::parse(&value.to_string());
        let _ = Config::parse(&value.to_string().replace("3.4.0", "2.4.0"));
    }
}
