use rstest::rstest;
use serde_json::{Value, json};

use crate::Config;

/// What a guest that takes 3.`minor` alone is told.
fn translated(minor: u8, mut config: Value) -> Result<Value, String> {
    config["ignition"]["version"] = json!("2.4.0");
    let config = Config::parse(&config.to_string()).unwrap().0;
    let guest = [format!("3.{minor}.0").parse().unwrap()];
    let mut found: Value = match config.for_guest(&guest) {
        Ok(config) => serde_json::from_str(&config.to_json()).unwrap(),
        Err(report) => return Err(report.to_string()),
    };
    assert_eq!(found["ignition"]["version"].take(), json!(format!("3.{minor}.0")));
    Ok(found)
}

fn file(path: &str, more: Value) -> Value {
    let mut file = json!({"filesystem": "root", "path": path});
    file.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    file
}

fn files(files: &[Value]) -> Result<Value, String> {
    translated(0, json!({"storage": {"files": files}})).map(|mut found| found["storage"]["files"].take())
}

#[rstest]
// What version 2 means without saying it.
#[case(json!({}), json!({"path": "/a", "overwrite": true, "mode": 0, "contents": {"source": ""}}))]
#[case(json!({"mode": 420, "overwrite": false, "user": {"name": ""}, "group": {"id": 0}}),
    json!({"path": "/a", "overwrite": false, "mode": 420, "contents": {"source": ""}, "group": {"id": 0}}))]
#[case(json!({"append": true, "contents": {"source": "data:,b"}}), json!({"path": "/a", "append": [{"source": "data:,b"}]}))]
fn a_file(#[case] more: Value, #[case] expected: Value) {
    assert_eq!(files(&[file("//a/.", more)]).unwrap(), json!([expected]));
}

#[test]
fn of_several_entries_of_a_file_the_last_wins_and_appends_follow() {
    let entry = |text: &str, append: bool| {
        file(
            "/a",
            json!({"mode": 420, "append": append, "contents": {"source": format!("data:,{text}")}}),
        )
    };
    assert_eq!(
        files(&[entry("1", true), entry("2", false), entry("3", true), entry("4", true)]).unwrap(),
        json!([{"path": "/a", "overwrite": true, "mode": 420, "contents": {"source": "data:,2"},
                "append": [{"source": "data:,3"}, {"source": "data:,4"}]}])
    );
    let refused = files(&[entry("1", false), file("/a", json!({"overwrite": false}))]).unwrap_err();
    assert!(
        refused.contains("storage.files.1.overwrite: another entry writes this file"),
        "{refused}"
    );
}

#[test]
fn networkd_units_are_files() {
    let found = translated(
        0,
        json!({"networkd": {"units": [
            {"name": "a.network", "contents": "[Match]\n", "dropins": [{"name": "b.conf", "contents": "[Network]\n"}]},
            {"name": "c.link"}
        ]}}),
    );
    let file = |path: &str, source: &str| json!({"path": path, "overwrite": true, "mode": 420, "contents": {"source": source}});
    assert_eq!(
        found.unwrap()["storage"]["files"],
        json!([
            file("/etc/systemd/network/a.network", "data:,%5BMatch%5D%0A"),
            file("/etc/systemd/network/a.network.d/b.conf", "data:,%5BNetwork%5D%0A"),
        ])
    );
}

#[rstest]
#[case::path_in_the_root(json!({"path": "/sysroot/srv"}), "", Ok("/srv/a"))]
#[case::path_elsewhere(json!({"path": "/mnt"}), "", Err("no .mount unit of this configuration says it"))]
#[case::mounted(json!({"mount": {"device": "/dev/b", "format": "ext4"}}), "[Mount]\nWhat=/dev/b\nWhere=/srv/", Ok("/srv/a"))]
#[case::by_label(json!({"mount": {"device": "/dev/b", "format": "ext4", "label": "L"}}), "[Mount]\nWhat=LABEL=L\nWhere=/srv", Ok("/srv/a"))]
#[case::mounted_nowhere(json!({"mount": {"device": "/dev/b", "format": "ext4"}}), "", Err("no .mount unit of this configuration says it"))]
fn a_file_of_another_filesystem(
    #[case] mut filesystem: Value,
    #[case] unit: &str,
    #[case] expected: Result<&str, &str>,
) {
    filesystem["name"] = json!("data");
    let found = translated(
        0,
        json!({"storage": {"filesystems": [filesystem], "files": [{"filesystem": "data", "path": "/a", "mode": 1}]},
               "systemd": {"units": [{"name": "srv.mount", "contents": unit}]}}),
    );
    match (found, expected) {
        (Ok(found), Ok(path)) => assert_eq!(found["storage"]["files"][0]["path"], json!(path)),
        (Err(report), Err(part)) => assert!(
            report.contains(part) && report.contains("storage.files.0.filesystem"),
            "{report}"
        ),
        (found, _) => panic!("{found:?}"),
    }
}

#[test]
fn filesystems_disks_and_arrays() {
    let found = translated(
        0,
        json!({"storage": {
            "filesystems": [{"name": "root", "mount": {"device": "/dev/disk/by-label/ROOT", "format": "btrfs",
                             "create": {"force": true, "options": ["--label=ROOT"]}}}],
            "disks": [{"device": "/dev/a", "partitions": [{"number": 1, "start": 2048, "size": 4096, "typeGuid": ""}]}],
            "raid": [{"name": "r", "level": "0", "devices": ["/dev/b"], "spares": 0}],
        }}),
    );
    assert_eq!(
        found.unwrap()["storage"],
        json!({
            "filesystems": [{"device": "/dev/disk/by-label/ROOT", "format": "btrfs", "wipeFilesystem": true, "options": ["--label=ROOT"]}],
            "disks": [{"device": "/dev/a", "partitions": [{"number": 1, "startMiB": 1, "sizeMiB": 2}]}],
            "raid": [{"name": "r", "level": "0", "devices": ["/dev/b"]}],
        })
    );
    let refused = translated(
        0,
        json!({"storage": {"disks": [{"device": "/dev/a", "partitions": [{"number": 1, "size": 100}]}]}}),
    );
    assert!(
        refused
            .unwrap_err()
            .contains("storage.disks.0.partitions.0.size: Ignition 3 measures in MiB")
    );
}

#[test]
fn users_and_units() {
    let found = translated(
        0,
        json!({
            "passwd": {"users": [{"name": "a", "passwordHash": "", "sshAuthorizedKeys": ["k", "k"], "create": {"uid": 7, "groups": ["g"]}}]},
            "systemd": {"units": [
                {"name": "a.service", "enable": true, "contents": "[A]\n"},
                {"name": "a.service", "contents": "[B]\n", "mask": true, "dropins": [{"name": "b.conf", "contents": "[C]\n"}]},
                {"name": "b.service", "enable": true, "enabled": false},
            ]},
        }),
    )
    .unwrap();
    assert_eq!(
        found["passwd"]["users"],
        json!([{"name": "a", "passwordHash": "", "sshAuthorizedKeys": ["k"], "uid": 7, "groups": ["g"]}])
    );
    assert_eq!(
        found["systemd"]["units"],
        json!([
            {"name": "a.service", "enabled": true, "contents": "[B]\n", "mask": true, "dropins": [{"name": "b.conf", "contents": "[C]\n"}]},
            {"name": "b.service", "enabled": false},
        ])
    );
}

#[test]
fn proxies_and_headers_need_3_1() {
    let config = json!({"ignition": {
        "proxy": {"httpProxy": "http://p"},
        "config": {"append": [{"source": "http://a", "httpHeaders": [{"name": "b", "value": "c"}]}, {"source": ""}]},
        "timeouts": {"httpTotal": 1},
    }});
    assert_eq!(
        translated(1, config.clone()).unwrap()["ignition"],
        json!({
            "version": null, "proxy": {"httpProxy": "http://p"}, "timeouts": {"httpTotal": 1},
            "config": {"merge": [{"source": "http://a", "httpHeaders": [{"name": "b", "value": "c"}]}]},
        })
    );
    let refused = translated(0, config).unwrap_err();
    assert!(refused.contains("ignition.proxy: is not in 3.0.0"), "{refused}");
}
