//! The whole of Container Linux Config: every text of the corpus is read as its own comments say.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

use std::{
    fs,
    path::{Path, PathBuf},
};

use coreos_kvm_ignition::{Files, Kind, Options, Platform, Transpiled, TreeEntry, report::Severity, transpile};

/// The files that configurations of the corpus name.
struct CorpusFiles;

impl Files for CorpusFiles {
    fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        fs::read(corpus("files").join(path)).map_err(|error| error.to_string())
    }

    fn walk(&self, _: &str) -> Result<Vec<TreeEntry>, String> {
        Err("nothing of a Container Linux Config lists a directory".to_owned())
    }
}

fn corpus(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(folder)
}

/// Names and contents of a folder's configurations.
fn configurations(folder: &str) -> Vec<(String, String)> {
    let mut found: Vec<_> = fs::read_dir(corpus(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "yaml"))
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), text)
        })
        .collect();
    found.sort();
    found
}

/// What comments of the form `# key: ...` say, in order.
fn said<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines()
        .filter_map(move |line| line.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "))
}

fn read(text: &str) -> Result<Transpiled, coreos_kvm_ignition::Report> {
    let options = Options {
        kind: Some(Kind::ContainerLinuxConfig),
        platform: said(text, "platform").next().map(|name| name.parse().unwrap()),
        files: &CorpusFiles,
        ..Options::default()
    };
    transpile(text, &options)
}

#[test]
fn every_configuration_is_read() {
    let all = configurations("clc");
    assert!(all.len() >= 40, "the corpus is not there: {}", all.len());
    for (name, text) in all {
        let transpiled = read(&text).unwrap_or_else(|report| panic!("{name}:\n{report}"));
        assert_eq!(transpiled.config.version().to_string(), "2.2.0", "{name}");
        let report = transpiled.report.to_string();
        for expected in said(&text, "warning") {
            let (path, part) = expected.split_once(": ").unwrap();
            let entries = transpiled.report.entries();
            let found = entries
                .iter()
                .any(|entry| entry.path == path && entry.message.contains(part));
            assert!(found, "{name}: {expected} is not in\n{report}");
        }
    }
}

#[test]
fn everything_that_is_wrong_is_told_where_it_is() {
    for (name, text) in configurations("clc/wrong") {
        let report = match read(&text) {
            Ok(_) => panic!("{name} is taken for right"),
            Err(report) => report,
        };
        let errors: Vec<_> = report
            .entries()
            .iter()
            .filter(|entry| entry.severity == Severity::Error)
            .collect();
        assert!(errors.iter().all(|entry| entry.position.is_some()), "{name}:\n{report}");
        let expected: Vec<_> = said(&text, "error").collect();
        assert_eq!(errors.len(), expected.len(), "{name}:\n{report}");
        for (entry, expected) in errors.iter().zip(&expected) {
            let (path, part) = expected.split_once(": ").unwrap();
            assert!(
                entry.path == path && entry.message.contains(part),
                "{name}: {expected} is not\n{report}"
            );
        }
    }
}

#[test]
fn etcd_gets_a_drop_in_with_its_flags() {
    let text = "etcd:\n  version: 3.0.15\n  name: \"{HOSTNAME}\"\n  snapshot_count: 5000\n";
    let options = Options {
        kind: Some(Kind::ContainerLinuxConfig),
        platform: Some(Platform::Custom),
        ..Options::default()
    };
    let json: serde_json::Value = serde_json::from_str(&transpile(text, &options).unwrap().config.to_json()).unwrap();
    let unit = &json["systemd"]["units"][0];
    assert_eq!(unit["name"], "etcd-member.service");
    assert_eq!(unit["dropins"][0]["name"], "20-clct-etcd-member.conf");
    assert_eq!(
        unit["dropins"][0]["contents"],
        "[Unit]\n\
         Requires=coreos-metadata.service\n\
         After=coreos-metadata.service\n\
         \n\
         [Service]\n\
         EnvironmentFile=/run/metadata/coreos\n\
         Environment=\"ETCD_IMAGE_TAG=v3.0.15\"\n\
         ExecStart=\n\
         ExecStart=/usr/lib/coreos/etcd-wrapper $ETCD_OPTS \\\n  \
         --name=\"${COREOS_CUSTOM_HOSTNAME}\" \\\n  \
         --snapshot-count=5000"
    );
}

#[test]
fn a_warning_is_an_error_under_strict() {
    let options = Options {
        strict: true,
        ..Options::default()
    };
    let report = transpile("storage: {files: [{path: /a, filesystem: root}]}\n", &options).unwrap_err();
    assert!(report.to_string().contains("names no mode and gets 0644"), "{report}");
}
