//! The whole of cloud-config: every text of the corpus is read as its own comments say, and what comes out is what
//! coreos-cloudinit would have done.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

use std::{fs, path::Path};

use coreos_kvm_ignition::{Addresses, Kind, Options, Report, Transpiled, report::Severity, transpile};
use serde_json::{Value, json};

/// Names and contents of a folder's configurations.
fn configurations(folder: &str) -> Vec<(String, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(folder);
    let mut found: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| {
            let text = fs::read_to_string(&path).unwrap();
            (path.file_name().unwrap().to_str().unwrap().to_owned(), text)
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

fn read(text: &str) -> Result<Transpiled, Report> {
    let address = |key| said(text, key).next().map(str::to_owned);
    let options = Options {
        kind: Some(if text.starts_with("#!") {
            Kind::Script
        } else {
            Kind::CloudConfig
        }),
        addresses: Addresses {
            hostname: address("hostname"),
            private_ipv4: address("private_ipv4"),
            public_ipv4: address("public_ipv4"),
            private_ipv6: address("private_ipv6"),
            public_ipv6: address("public_ipv6"),
        },
        ..Options::default()
    };
    transpile(text, &options)
}

#[test]
fn every_configuration_is_read() {
    let all: Vec<_> = ["cloud-config", "cloud-config/addresses"]
        .into_iter()
        .flat_map(configurations)
        .collect();
    assert!(all.len() >= 25, "the corpus is not there: {}", all.len());
    for (name, text) in all {
        let transpiled = read(&text).unwrap_or_else(|report| panic!("{name}:\n{report}"));
        let report = transpiled.report.to_string();
        let entries = transpiled.report.entries();
        for expected in said(&text, "warning") {
            let (path, part) = expected.split_once(": ").unwrap();
            let found = entries
                .iter()
                .any(|entry| entry.path == path && entry.message.contains(part));
            assert!(found, "{name}: {expected} is not in\n{report}");
        }
        assert!(
            said(&text, "warning").next().is_some() || !transpiled.report.has_warnings(),
            "{name}:\n{report}"
        );
        for guest in ["2.2.0", "3.0.0", "3.3.0"] {
            let converted = transpiled.config.for_guest(&[guest.parse().unwrap()]);
            let converted = converted.unwrap_or_else(|report| panic!("{name} for {guest}:\n{report}"));
            assert_eq!(converted.version().to_string(), guest, "{name}");
        }
    }
}

#[test]
fn everything_that_is_wrong_is_told_where_it_is() {
    for (name, text) in configurations("cloud-config/wrong") {
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
        for expected in &expected {
            let (path, part) = expected.split_once(": ").unwrap();
            let found = errors
                .iter()
                .any(|entry| entry.path == path && entry.message.contains(part));
            assert!(found, "{name}: {expected} is not in\n{report}");
        }
    }
}

/// What the text becomes, as JSON.
fn ignition(text: &str) -> Value {
    let transpiled = read(text).unwrap_or_else(|report| panic!("{report}"));
    serde_json::from_str(&transpiled.config.to_json()).unwrap()
}

#[test]
fn a_unit_to_be_started_is_wanted_by_the_system() {
    let found = ignition(
        "#cloud-config\ncoreos: {units: [{name: a.service, command: start, content: \"[Service]\\nExecStart=/bin/a\"}, \
         {name: docker.service, command: start}]}\n",
    );
    let link = |name: &str, target: &str| {
        json!({
            "filesystem": "root",
            "path": format!("/etc/systemd/system/multi-user.target.wants/{name}"),
            "target": target,
            "overwrite": true,
        })
    };
    assert_eq!(
        found["storage"]["links"],
        json!([
            link("a.service", "/etc/systemd/system/a.service"),
            link("docker.service", "/usr/lib/systemd/system/docker.service"),
        ])
    );
    assert_eq!(
        found["systemd"]["units"],
        json!([{"name": "a.service", "contents": "[Service]\nExecStart=/bin/a"}])
    );
}

#[test]
fn options_of_a_service_are_in_a_drop_in() {
    let found = ignition(
        "#cloud-config\n# private_ipv4: 10.0.0.2\ncoreos:\n  etcd2:\n    listen-peer-urls: http://$private_ipv4:2380\n    \
         name: one\n    snapshot_count: 0\n    debug: false\n",
    );
    assert_eq!(
        found["systemd"]["units"],
        json!([{
            "name": "etcd2.service",
            "dropins": [{
                "name": "20-cloudinit.conf",
                "contents": "[Service]\n\
                    Environment=\"ETCD_LISTEN_PEER_URLS=http://10.0.0.2:2380\"\n\
                    Environment=\"ETCD_NAME=one\"\n",
            }],
        }])
    );
    let environment = &found["storage"]["files"][0];
    assert_eq!(environment["path"], "/etc/environment");
    assert_eq!(
        environment["contents"]["source"],
        "data:,COREOS_PRIVATE_IPV4%3D10.0.0.2%0A"
    );
}

#[test]
fn permissions_are_octal_with_quotes_and_without() {
    let found =
        ignition("#cloud-config\nwrite_files: [{path: /a, permissions: 0755}, {path: /b, permissions: '755'}]\n");
    assert_eq!(found["storage"]["files"][0]["mode"], 0o755);
    assert_eq!(found["storage"]["files"][1]["mode"], 0o755);
}

#[test]
fn a_script_becomes_a_service() {
    let found = ignition("#!/bin/sh\necho hello\n");
    assert_eq!(found["storage"]["files"][0]["mode"], 0o744);
    let unit = &found["systemd"]["units"][0];
    assert_eq!(unit["enabled"], true);
    let path = found["storage"]["files"][0]["path"].as_str().unwrap();
    let contents = unit["contents"].as_str().unwrap();
    assert!(contents.contains(&format!("\nExecStart={path}\n")), "{contents}");
}
