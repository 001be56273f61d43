//! The judges themselves, tried on configurations whose outcome is known.

use serde_json::json;

use crate::corpus::{Language, Verdict, cases, judge, real_outcomes};
use crate::oracle::{Oracle, Question, Tool};
use crate::tree::write_tree;
use crate::{debian, expectation, library, same};

/// What a machine of its time was configured with: all that the stage `files` writes.
fn whole() -> String {
    json!({
        "ignition": { "version": "3.3.0" },
        "passwd": {
            "groups": [{ "name": "web", "gid": 4000 }, { "name": "minor", "system": true }, { "name": "portage", "shouldExist": false }],
            "users": [
                { "name": "core", "sshAuthorizedKeys": ["ssh-ed25519 AAAA one", "ssh-rsa BBBB two"], "groups": ["sudo", "docker"] },
                { "name": "deploy", "uid": 1500, "gecos": "Deployer", "homeDir": "/srv/deploy", "shell": "/bin/sh",
                  "passwordHash": "$6$salt$hash", "primaryGroup": "web" },
                { "name": "daemon", "system": true, "noCreateHome": true },
                { "name": "etcd", "shouldExist": false },
            ],
        },
        "storage": {
            "directories": [{ "path": "/opt/data", "mode": 448, "user": { "name": "deploy" }, "group": { "name": "web" } }],
            "files": [
                { "path": "/etc/plain", "contents": { "source": "data:,one%20%25%0A" }, "mode": 384 },
                { "path": "/etc/encoded", "contents": { "source": "data:text/plain;base64,aGkK" }, "user": { "id": 500 },
                  "append": [{ "source": "data:,more%0A" }, { "source": "data:,again" }] },
                { "path": "/etc/packed", "contents": { "source": "data:;base64,H4sIAAAAAAAC/8tIzcnJBwCGphA2BQAAAA==", "compression": "gzip" } },
                { "path": "/etc/remote", "contents": { "source": "https://example.com/a b" } },
                { "path": "/opt/data/empty" },
            ],
            "links": [
                { "path": "/etc/soft", "target": "/etc/plain" },
                { "path": "/etc/hard", "target": "/etc/plain", "hard": true },
            ],
        },
        "systemd": { "units": [
            { "name": "web.service", "enabled": true, "contents": "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n",
              "dropins": [{ "name": "10-more.conf", "contents": "[Service]\nRestart=always\n" }, { "name": "none.conf" }] },
            { "name": "noise.service", "mask": true },
            { "name": "echo@one.service", "enabled": true },
            { "name": "echo@two.service", "enabled": true },
            { "name": "timer.timer", "enabled": false },
        ] },
    })
    .to_string()
}

/// What the comparison says about a tree of the one configuration when the other was meant.
fn told(written: &str, meant: &str) -> Vec<String> {
    let tree = write_tree(written).unwrap_or_else(|log| panic!("ignition failed:\n{log}"));
    expectation::differences(meant, &tree)
}

fn changed(pointer: &str, value: serde_json::Value) -> String {
    let mut config: serde_json::Value = serde_json::from_str(&whole()).expect("it is JSON");
    *config
        .pointer_mut(pointer)
        .unwrap_or_else(|| panic!("there is no {pointer}")) = value;
    config.to_string()
}

#[test]
fn a_tree_is_what_its_configuration_says() {
    assert_eq!(told(&whole(), &whole()), [""; 0]);
}

#[test]
fn an_empty_configuration_writes_nothing() {
    for version in debian::KNOWN {
        let config = json!({ "ignition": { "version": version } }).to_string();
        assert_eq!(told(&config, &config), [""; 0], "{version}");
    }
}

#[test]
fn a_configuration_that_is_merged_is_what_ignition_merged() {
    let child = "data:,%7B%22ignition%22:%7B%22version%22:%223.1.0%22%7D,%22storage%22:%7B%22files%22:%5B%7B%22path%22:%22/etc/child%22%7D%5D%7D%7D";
    let parent = json!({
        "ignition": { "version": "3.1.0", "config": { "merge": [{ "source": child }] } },
        "storage": { "files": [{ "path": "/etc/parent" }] },
    });
    let tree = write_tree(&parent.to_string()).unwrap();
    let both = json!({ "storage": { "files": [{ "path": "/etc/parent" }, { "path": "/etc/child" }] } });
    assert_eq!(expectation::differences(&both.to_string(), &tree), [""; 0]);
    assert_eq!(
        expectation::differences(&parent.to_string(), &tree).len(),
        1,
        "it refers to another one"
    );
}

#[test]
fn every_kind_of_difference_is_told() {
    let tree = write_tree(&whole()).unwrap();
    for (pointer, value) in [
        ("/storage/files/0/mode", json!(420)),
        ("/storage/files/0/contents/source", json!("data:,two")),
        ("/storage/files/1/append/1/source", json!("data:,never")),
        ("/storage/files/1/user/id", json!(0)),
        (
            "/storage/files/2/contents/source",
            json!("data:;base64,H4sIAAAAAAAC/ysuKcrMSwcAtBzGtgYAAAA="),
        ),
        ("/storage/directories/0/mode", json!(493)),
        ("/storage/directories/0/group/name", json!("adm")),
        ("/storage/links/0/target", json!("/etc/encoded")),
        ("/storage/links/1/target", json!("/etc/encoded")),
        ("/systemd/units/0/contents", json!("[Service]\n")),
        ("/systemd/units/0/enabled", json!(false)),
        ("/systemd/units/0/dropins/0/contents", json!("")),
        ("/systemd/units/1/mask", json!(false)),
        ("/systemd/units/3/name", json!("echo@three.service")),
        ("/passwd/users/0/sshAuthorizedKeys/0", json!("ssh-ed25519 CCCC")),
        ("/passwd/users/0/groups/0", json!("wheel")),
        ("/passwd/users/1/uid", json!(1501)),
        ("/passwd/users/1/gecos", json!("Someone")),
        ("/passwd/users/1/shell", json!("/bin/bash")),
        ("/passwd/users/1/passwordHash", json!("$6$other")),
        ("/passwd/users/1/primaryGroup", json!("adm")),
        ("/passwd/users/2/noCreateHome", json!(false)),
        ("/passwd/users/3/shouldExist", json!(true)),
        ("/passwd/groups/0/gid", json!(4001)),
        // Left out, it is in the tree without having been asked for.
        ("/storage/files", json!([])),
    ] {
        assert_ne!(
            expectation::differences(&changed(pointer, value), &tree),
            [""; 0],
            "{pointer}"
        );
    }
}

#[test]
fn ignition_fails_where_a_configuration_cannot_be_written() {
    let config = changed("/storage/files/0/path", json!("/etc/passwd"));
    let log = write_tree(&config)
        .err()
        .expect("a file of the system is not overwritten unasked");
    assert!(log.contains("CRITICAL"), "{log}");
}

#[test]
fn debians_validator_takes_what_it_knows_and_refuses_the_rest() {
    assert_eq!(debian::validate(&whole()), Ok(String::new()));
    let newer = changed("/ignition/version", json!("3.4.0"));
    assert!(debian::validate(&newer).is_err());
    let relative = debian::validate(&changed("/storage/files/0/path", json!("plain"))).unwrap_err();
    assert!(relative.contains("path not absolute"), "{relative}");
}

#[test]
fn the_oracle_speaks_for_every_tool() {
    let old = r#"{"ignition":{"version":"2.2.0"},"storage":{"files":[{"filesystem":"data","path":"/a","mode":420}]}}"#;
    let new = r#"{"ignition":{"version":"3.1.0"},"storage":{"files":[{"path":"/a"}]}}"#;
    let butane = "variant: flatcar\nversion: 1.0.0\nstorage: {files: [{path: /a}]}\n";
    let clc = "storage:\n  files:\n  - {path: /a, filesystem: root, mode: 0644, contents: {inline: '{HOSTNAME}'}}\n";
    let mut oracle = Oracle::start();
    for (question, part) in [
        (Question::new(Tool::Butane, butane).strict(), r#""version":"3.3.0""#),
        (
            Question::new(Tool::Ct, clc).strict().platform("custom"),
            r#""version":"2.2.0""#,
        ),
        (
            Question::new(Tool::Ignition2, old).version("2.2.0").exact(),
            r#""filesystem":"data""#,
        ),
        (
            Question::new(Tool::Ignition2Append, old).with(r#"{"ignition":{"version":"2.1.0"}}"#),
            r#""version":"2.4.0""#,
        ),
        (
            Question::new(Tool::Ignition3, new).version("3.5.0"),
            r#""version":"3.5.0""#,
        ),
        (
            Question::new(Tool::Ignition3Merge, new).with(new.replace("/a", "/b")),
            r#""path":"/b""#,
        ),
        (
            Question::new(Tool::Convert2To3, old)
                .filesystem("data", "/mnt")
                .version("3.0.0"),
            r#""path":"/mnt/a""#,
        ),
        (Question::new(Tool::Convert3To2, new), r#""version":"2.4.0""#),
        (
            Question::new(Tool::Convert3To3, r#"{"ignition":{"version":"3.4.0"}}"#).version("3.2.0"),
            r#""version":"3.2.0""#,
        ),
        (
            Question::new(Tool::CloudConfig, "#cloud-config\nhostname: a\n").strict(),
            r#""Hostname":"a""#,
        ),
    ] {
        let output = oracle.ask(question).into_result().unwrap();
        assert!(output.contains(part), "{part} is not in {output}");
    }
    let answer = oracle.ask(Question::new(Tool::Ignition3, new.replace("/a", "a")));
    let finding = &answer.report[0];
    assert_eq!(
        (finding.line, finding.column, finding.path.as_str()),
        (1, 61, "$.storage.files.0.path")
    );
    assert!(answer.into_result().unwrap_err().contains("path not absolute"));
}

#[test]
fn escapes_and_compression_make_no_difference() {
    let one = r#"{"files":[{"contents":{"source":"data:,a%20b","compression":""},"append":[],"mode":420}]}"#;
    let other = r#"{"files":[{"mode":420,"contents":{"source":"data:;base64,YSBi"}}],"links":null}"#;
    assert_eq!(same::differences(one, other), [""; 0]);
    let third = other.replace("420", "384").replace("YSBi", "YSBj");
    assert_eq!(same::differences(one, &third).len(), 2);
}

#[test]
fn the_corpus_is_what_the_real_things_say_it_is() {
    let mut oracle = Oracle::start();
    let mut found = Vec::new();
    for language in Language::ALL {
        let cases = cases(language);
        for (case, real) in cases.iter().zip(real_outcomes(&mut oracle, &cases)) {
            match real {
                Ok(_) if case.wrong && !case.is_wrong_here_alone() => {
                    found.push(format!("{}: the real thing takes it", case.name));
                }
                Err(error) if !case.wrong => found.push(format!("{}: {error}", case.name)),
                _ => {}
            }
        }
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn the_library_and_the_real_things_agree_on_the_corpus() {
    let mut oracle = Oracle::start();
    let mut verdict = Verdict::default();
    for language in Language::ALL {
        judge(&mut oracle, &cases(language), &library::outcome, &mut verdict);
    }
    let Verdict {
        disagreements,
        cases,
        trees,
    } = verdict;
    println!("{cases} configurations judged, trees written of {trees}");
    assert!(
        cases >= 150 && trees >= 40,
        "the corpus is not there: {cases} configurations, {trees} trees"
    );
    assert!(disagreements.is_empty(), "{}", disagreements.join("\n"));
}
