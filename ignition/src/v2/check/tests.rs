use rstest::rstest;

use crate::Config;

/// Whether of a configuration of 2.`minor`, whose sections are these, there is to say what begins so, and nothing else.
fn expect(minor: u8, sections: &str, expected: &[&str]) {
    let text = format!(r#"{{"ignition":{{"version":"2.{minor}.0"}},{sections}}}"#);
    let (Ok((_, report)) | Err(report)) = Config::parse(&text);
    let found: Vec<String> = report
        .entries()
        .iter()
        .map(|entry| format!("{} {}: {}", entry.severity, entry.path, entry.message))
        .collect();
    let matches = found.len() == expected.len()
        && expected
            .iter()
            .all(|begin| found.iter().any(|line| line.starts_with(begin)));
    assert!(
        matches,
        "2.{minor} {sections}\nfound {found:#?}\nexpected {expected:#?}"
    );
}

#[rstest]
#[case(1, r#"{"filesystem":"root","path":"/a"}"#, &[])]
#[case(2, r#"{"filesystem":"root","path":"/a"}"#, &["warning storage.files.0.mode: is missing, which means 0"])]
#[case(0, r#"{"path":"a","mode":4096}"#, &[
    "error storage.files.0.path: has to be absolute", "error storage.files.0.mode: is no mode",
    "error storage.files.0.filesystem: is missing",
])]
#[case(0, r#"{"filesystem":"data","path":"/a"}"#, &["warning storage.files.0.filesystem: there is no such filesystem"])]
#[case(1, r#"{"filesystem":"root","path":"/a","user":{"id":1,"name":"b"}}"#, &["error storage.files.0.user: is said by id"])]
#[case(2, r#"{"filesystem":"root","path":"/a","mode":1,"append":true,"overwrite":true}"#, &["error storage.files.0.append: what is"])]
#[case(0, r#"{"filesystem":"root","path":"/a","contents":{"source":"s3://a/b"}}"#, &["error storage.files.0.contents.source: s3 is none"])]
#[case(1, r#"{"filesystem":"root","path":"/a","contents":{"source":"s3://a/b"}}"#, &[])]
#[case(0, r#"{"filesystem":"root","path":"/a","contents":{"source":"oem:///a","compression":"xz"}}"#, &["error storage.files.0.contents.compression: is no"])]
#[case(0, r#"{"filesystem":"root","path":"/a","contents":{"verification":{"hash":"sha256-0"}}}"#, &["error storage.files.0.contents.verification.hash: sha256 is not"])]
#[case(4, r#"{"filesystem":"root","path":"/a","mode":1,"contents":{"source":"data:,","httpHeaders":[{"name":"","value":"a"},{"name":"b","value":""},{"name":"b"}]}}"#, &[
    "error storage.files.0.contents.httpHeaders: only what", "error storage.files.0.contents.httpHeaders.0.name: is missing",
    "error storage.files.0.contents.httpHeaders.2.name: is there twice",
])]
fn a_file(#[case] minor: u8, #[case] file: &str, #[case] expected: &[&str]) {
    expect(minor, &format!(r#""storage":{{"files":[{file}]}}"#), expected);
}

#[rstest]
#[case(0, r#""disks":[{"partitions":[{"number":1,"start":100}]}]"#, &[
    "error storage.disks.0.device: a path", "error storage.disks.0.partitions.0.start: is not at a MiB",
])]
#[case(0, r#""disks":[{"device":"/dev/a","partitions":[{"number":1,"start":2048,"size":4096},{"number":1,"start":4096}]}]"#, &[
    "error storage.disks.0.partitions.1.number: another", "error storage.disks.0.partitions.1: overlaps",
])]
#[case(0, r#""disks":[{"device":"/dev/a","partitions":[{"label":"a:b","size":-1,"typeGuid":"x"}]}]"#, &[
    "warning storage.disks.0.partitions.0.label: only what is before", "error storage.disks.0.partitions.0.size: cannot be less",
    "error storage.disks.0.partitions.0.typeGuid: is no GUID",
])]
#[case(3, r#""disks":[{"device":"/dev/a","partitions":[{"number":1,"size":2048},{"sizeMiB":1}]}]"#, &[
    "info storage.disks.0.partitions.0.size: is the way", "error storage.disks.0.partitions: a disk's partitions are measured",
])]
#[case(3, r#""disks":[{"device":"/dev/a","partitions":[{"number":1,"label":"a","shouldExist":false},{}]}]"#, &[
    "error storage.disks.0.partitions.0.shouldExist: a partition", "error storage.disks.0.partitions: where a partition",
])]
#[case(0, r#""raid":[{"level":"stripe","spares":1,"devices":["a"]}]"#, &["error storage.raid.0.level: arrays", "error storage.raid.0.devices.0: has to"])]
#[case(0, r#""filesystems":[{"name":"a"},{"name":"a","path":"b","mount":{"device":"c","format":"swap"}}]"#, &[
    "error storage.filesystems.0: one of", "error storage.filesystems.1: one of", "warning storage.filesystems.1.name: another",
    "error storage.filesystems.1.path: has to", "error storage.filesystems.1.mount.device: has to",
    "error storage.filesystems.1.mount.format: is no format",
])]
#[case(1, r#""filesystems":[{"name":"a","mount":{"device":"/c","format":"swap","label":"0123456789012345","wipeFilesystem":true,"options":["a"],"create":{}}}]"#, &[
    "error storage.filesystems.0.mount.label: is too long", "warning storage.filesystems.0.mount.create: `create` is the way",
    "error storage.filesystems.0.mount.create: cannot be with wipeFilesystem", "error storage.filesystems.0.mount.create: cannot be with options",
])]
fn disks(#[case] minor: u8, #[case] lists: &str, #[case] expected: &[&str]) {
    expect(minor, &format!(r#""storage":{{{lists}}}"#), expected);
}

#[rstest]
#[case(r#""systemd":{"units":[{"name":"a","contents":"[a"}]}"#, &["error systemd.units.0.name: is no unit's", "error systemd.units.0.contents: no `]`"])]
#[case(r#""systemd":{"units":[{"name":"a.service","enable":true,"contents":"[a]\nb=c"}]}"#, &["warning systemd.units.0.contents: is enabled"])]
#[case(r##""systemd":{"units":[{"name":"a.service","enabled":true,"contents":"# nothing"}]}"##, &[])]
#[case(r#""networkd":{"units":[{"name":"a.service","contents":"[a","dropins":[{"name":"b","contents":"[c"}]}]}"#, &[
    "error networkd.units.0.name: is no name of networkd's", "error networkd.units.0.contents: no `]`",
    "error networkd.units.0.dropins.0.name: is no drop-in's", "error networkd.units.0.dropins.0.contents: no `]`",
])]
#[case(r#""passwd":{"users":[{"name":"a","create":{},"uid":1,"system":false,"groups":["b"]}]}"#, &[
    "warning passwd.users.0.create: `create` is the way", "error passwd.users.0.uid: cannot be with", "error passwd.users.0.groups: cannot be with",
])]
fn units_and_users(#[case] sections: &str, #[case] expected: &[&str]) {
    expect(2, sections, expected);
}
