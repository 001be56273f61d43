//! What holds for every right configuration: of the corpus, and put together by chance.

#![allow(clippy::unwrap_used)] // a trial that cannot go on has failed

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{
    fs,
    path::{Path, PathBuf},
};

use coreos_kvm_ignition::{Config, Files, Kind, Options, TreeEntry, TreeEntryKind, transpile};
use proptest::prelude::*;
use serde_json::{Value, json};
use targets::{round_trip, versions};

// --- the corpus ----------------------------------------------------------------------------------------------------------

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// The files that configurations of the corpus name.
struct CorpusFiles;

impl Files for CorpusFiles {
    fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        fs::read(corpus().join("files").join(path)).map_err(|error| error.to_string())
    }

    fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        let top = corpus().join("files").join(path);
        let mut entries = Vec::new();
        let mut folders = vec![top.clone()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).map_err(|error| error.to_string())? {
                let path = entry.unwrap().path();
                let kind = if path.is_symlink() {
                    let target = fs::read_link(&path).unwrap().display().to_string();
                    TreeEntryKind::Link { target }
                } else if path.is_dir() {
                    folders.push(path.clone());
                    TreeEntryKind::Directory
                } else {
                    TreeEntryKind::File { executable: false }
                };
                let path = path.strip_prefix(&top).unwrap().display().to_string();
                entries.push(TreeEntry { path, kind });
            }
        }
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(entries)
    }
}

/// Every right configuration of the corpus, by name, and what the library makes of it.
fn right() -> Vec<(String, Config)> {
    let mut found = Vec::new();
    for (language, kind) in [
        ("butane", Kind::Butane),
        ("clc", Kind::ContainerLinuxConfig),
        ("cloud-config", Kind::CloudConfig),
        ("ignition", Kind::Ignition),
    ] {
        for entry in fs::read_dir(corpus().join(language)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                continue;
            }
            let name = path.strip_prefix(corpus()).unwrap().display().to_string();
            let text = fs::read_to_string(&path).unwrap();
            let kind = if text.starts_with("#!") { Kind::Script } else { kind };
            let said = text.lines().find_map(|line| line.strip_prefix("# platform: "));
            let read = || {
                let options = Options {
                    kind: Some(kind),
                    platform: said.map(|name| name.trim().parse().unwrap()),
                    files: &CorpusFiles,
                    ..Options::default()
                };
                transpile(&text, &options).unwrap_or_else(|report| panic!("{name}: {report}"))
            };
            let done = read();
            assert_eq!(done, read(), "{name}: the same every time");
            assert_eq!(
                done.config.to_json(),
                read().config.to_json(),
                "{name}: the same bytes every time"
            );
            found.push((name, done.config));
        }
    }
    assert!(found.len() > 100, "the corpus is there");
    found
}

#[test]
fn the_corpus_is_put_out_as_what_ignition_reads() {
    for (name, config) in right() {
        println!("{name}");
        round_trip(&config);
        read_by_another(&config);
    }
}

#[test]
fn the_corpus_goes_to_other_versions_and_back() {
    for (name, config) in right() {
        println!("{name}");
        to_other_versions_and_back(&config);
    }
}

#[test]
fn the_corpus_merges() {
    let right = right();
    for (parent_name, parent) in &right {
        for (child_name, child) in &right {
            if parent.version().major() == child.version().major() {
                merges(parent, child).unwrap_or_else(|why| panic!("{child_name} over {parent_name}: {why}"));
            }
        }
    }
}

// --- what holds ----------------------------------------------------------------------------------------------------------

/// A library by others reads all of it.
fn read_by_another(config: &Config) {
    if config.version().major() == 3 {
        let json = config.to_json();
        let (_, unused) = ignition_config::Config::parse_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
        assert!(unused.is_empty(), "{unused:?}: {json}");
    }
}

/// Where another version of the same major can say it, it is the same when it comes back.
fn to_other_versions_and_back(config: &Config) {
    for version in versions() {
        let Ok(there) = config.for_guest(&[version]) else {
            continue;
        };
        assert_eq!(there.version(), version);
        round_trip(&there);
        read_by_another(&there);
        if version.major() != config.version().major() {
            continue;
        }
        // The bits of a mode that a version passes over are no longer there where they would count.
        match there.for_guest(&[config.version()]) {
            Ok(back) => {
                if plain_modes(config) {
                    assert_eq!(&back, config, "by way of {version}");
                }
            }
            Err(report) => panic!("{version} does not come back: {report}"),
        }
    }
}

/// Whether no file has the setuid, setgid or sticky bit.
fn plain_modes(config: &Config) -> bool {
    let json: Value = serde_json::from_str(&config.to_json()).unwrap();
    ["files", "directories"].iter().all(|list| {
        let nodes = json["storage"][list].as_array().cloned().unwrap_or_default();
        nodes
            .iter()
            .all(|node| node["mode"].as_u64().unwrap_or_default() & 0o7000 == 0)
    })
}

/// A child over its parent, and the same child once more over the outcome. Two that contradict each other do not merge, and
/// that is told.
fn merges(parent: &Config, child: &Config) -> Result<(), String> {
    let Ok(merged) = parent.merge(child) else { return Ok(()) };
    round_trip(&merged);
    read_by_another(&merged);
    if merged.version() != parent.version() {
        return Err(format!("the outcome is {}", merged.version()));
    }
    // Version 2 appends: twice is not once.
    if parent.version().major() == 2 || does_more_the_second_time(child) {
        return Ok(());
    }
    let twice = merged
        .merge(child)
        .map_err(|report| format!("not a second time: {report}"))?;
    if twice == merged {
        Ok(())
    } else {
        Err(format!(
            "a second time it is something else:\n{}\n{}",
            merged.to_json(),
            twice.to_json()
        ))
    }
}

/// Whether it has something of which Ignition puts one after the other rather than merging by key; or a header without a value,
/// which stays where there is none of its name, and the second time meets itself and goes.
fn does_more_the_second_time(config: &Config) -> bool {
    fn anywhere(value: &Value) -> bool {
        match value {
            Value::Object(object) => object.iter().any(|(key, value)| match key.as_str() {
                "append" | "options" | "mountOptions" => value != &json!([]),
                "httpHeaders" => value
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|header| header["value"].is_null()),
                _ => anywhere(value),
            }),
            Value::Array(items) => items.iter().any(anywhere),
            _ => false,
        }
    }
    anywhere(&serde_json::from_str(&config.to_json()).unwrap())
}

// --- put together by chance ------------------------------------------------------------------------------------------------

/// Some keys of a map, each with its values.
fn some(keys: Vec<(&'static str, BoxedStrategy<Value>)>) -> impl Strategy<Value = Value> {
    keys.into_iter()
        .map(|(key, value)| prop::option::weighted(0.4, value.prop_map(move |value| (key.to_owned(), value))))
        .collect::<Vec<_>>()
        .prop_map(|entries| Value::Object(entries.into_iter().flatten().collect()))
}

/// Elements that differ in what makes them themselves.
fn list(key: &'static str, names: &'static [&'static str], rest: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    prop::sample::subsequence(names, 0..=names.len())
        .prop_flat_map(move |names| {
            let elements: Vec<_> = names
                .into_iter()
                .map(|name| {
                    rest.clone().prop_map(move |mut value| {
                        value[key] = json!(name);
                        value
                    })
                })
                .collect();
            elements.prop_map(Value::Array)
        })
        .boxed()
}

fn of(values: &[Value]) -> BoxedStrategy<Value> {
    prop::sample::select(values.to_vec()).boxed()
}

fn contents() -> BoxedStrategy<Value> {
    some(vec![(
        "source",
        of(&[
            json!("data:,a%20b"),
            json!("data:;base64,YQ=="),
            json!("https://example.com/a"),
            json!(""),
        ]),
    )])
    .boxed()
}

fn owner() -> BoxedStrategy<Value> {
    of(&[json!({"id": 0}), json!({"name": "core"}), json!({})])
}

fn document(major: u8) -> BoxedStrategy<Value> {
    let flag = || of(&[json!(true), json!(false)]);
    let mode = || of(&[json!(0), json!(420), json!(511), json!(0o4755)]);
    let mut file = vec![("mode", mode()), ("user", owner()), ("contents", contents())];
    let mut link = vec![("hard", flag())];
    let mut directory = vec![("mode", mode()), ("group", owner())];
    let mut unit = vec![
        ("enabled", flag()),
        ("mask", flag()),
        (
            "contents",
            of(&[
                json!("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=a.target\n"),
                json!(""),
            ]),
        ),
        (
            "dropins",
            list(
                "name",
                &["1.conf", "2.conf"],
                some(vec![("contents", of(&[json!("[Unit]\n")]))]).boxed(),
            ),
        ),
    ];
    if major == 2 {
        for node in [&mut file, &mut link, &mut directory] {
            node.push(("filesystem", of(&[json!("root")])));
        }
        unit.push(("enable", flag()));
    } else {
        file.push((
            "append",
            prop::collection::vec(contents(), 0..2).prop_map(Value::Array).boxed(),
        ));
        for node in [&mut file, &mut directory] {
            node.push(("overwrite", flag()));
        }
    }
    let with = |strategy: Vec<(&'static str, BoxedStrategy<Value>)>, fixed: Value| {
        some(strategy)
            .prop_map(move |mut value| {
                for (key, fixed) in fixed.as_object().unwrap() {
                    value[key] = fixed.clone();
                }
                value
            })
            .boxed()
    };
    let fixed = |value: Value| if major == 2 { value } else { json!({}) };
    let storage = some(vec![
        (
            "files",
            list(
                "path",
                &["/a", "/b", "/c/d"],
                with(file, fixed(json!({"filesystem": "root"}))),
            ),
        ),
        (
            "directories",
            list(
                "path",
                &["/c", "/e"],
                with(directory, fixed(json!({"filesystem": "root"}))),
            ),
        ),
        (
            "links",
            list(
                "path",
                &["/b", "/f", "/c/d"],
                with(
                    link,
                    if major == 2 {
                        json!({"filesystem": "root", "target": "/a"})
                    } else {
                        json!({"target": "/a"})
                    },
                ),
            ),
        ),
    ]);
    let user = some(vec![
        ("uid", of(&[json!(0), json!(1000)])),
        (
            "sshAuthorizedKeys",
            of(&[json!(["a", "b"]), json!(["b", "c"]), json!([])]),
        ),
        ("groups", of(&[json!(["sudo"]), json!(["docker", "sudo"])])),
        ("shell", of(&[json!("/bin/sh")])),
    ]);
    let newest = if major == 2 { 4 } else { 6 };
    let sections = some(vec![
        ("storage", storage.boxed()),
        (
            "systemd",
            some(vec![(
                "units",
                list("name", &["a.service", "b.timer", "c@d.service"], some(unit).boxed()),
            )])
            .boxed(),
        ),
        (
            "passwd",
            some(vec![("users", list("name", &["core", "web"], user.boxed()))]).boxed(),
        ),
    ]);
    (0..=newest, sections)
        .prop_map(move |(minor, mut document)| {
            document["ignition"] = json!({"version": format!("{major}.{minor}.0")});
            document
        })
        .boxed()
}

/// A configuration that is right; what contradicts itself is passed over.
fn config(major: u8) -> impl Strategy<Value = Config> {
    document(major).prop_filter_map("it contradicts itself", |document| {
        Config::parse(&document.to_string()).ok().map(|(config, _)| config)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_global_rejects: 20_000, max_local_rejects: 200_000, ..ProptestConfig::default() })]

    #[test]
    fn version_2_holds(one in config(2), other in config(2)) {
        round_trip(&one);
        to_other_versions_and_back(&one);
        prop_assert_eq!(merges(&one, &other), Ok(()));
    }

    #[test]
    fn version_3_holds(one in config(3), other in config(3)) {
        round_trip(&one);
        read_by_another(&one);
        to_other_versions_and_back(&one);
        prop_assert_eq!(merges(&one, &one), Ok(()));
        prop_assert_eq!(merges(&one, &other), Ok(()));
    }
}
