use rstest::rstest;

use crate::Config;

/// What there is to say of a configuration of 3.`minor`, whose sections are these.
fn found(minor: u8, sections: &str) -> Vec<String> {
    let text = format!(r#"{{"ignition":{{"version":"3.{minor}.0"}},{sections}}}"#);
    said(&text)
}

fn said(text: &str) -> Vec<String> {
    let (Ok((_, report)) | Err(report)) = Config::parse(text);
    let entries = report.entries().iter();
    entries
        .map(|entry| format!("{} {}: {}", entry.severity, entry.path, entry.message))
        .collect()
}

/// Each of the expected, which are begins, and nothing else.
fn expect(minor: u8, sections: &str, expected: &[&str]) {
    let found = found(minor, sections);
    let matches = found.len() == expected.len()
        && expected
            .iter()
            .all(|begin| found.iter().any(|line| line.starts_with(begin)));
    assert!(
        matches,
        "3.{minor} {sections}\nfound {found:#?}\nexpected {expected:#?}"
    );
}

#[rstest]
#[case(0, r#"{"path":"/a"}"#, &[])]
#[case(0, r#"{"path":"a"}"#, &["error storage.files.0.path: has to be absolute"])]
#[case(0, r#"{}"#, &["error storage.files.0.path: a path is expected"])]
#[case(0, r#"{"path":"/a/../b"}"#, &["error storage.files.0.path: is not in its simplest form, which is /b"])]
#[case(0, r#"{"path":"/a","mode":4096}"#, &["error storage.files.0.mode: is no mode"])]
#[case(5, r#"{"path":"/a","mode":2541}"#, &["warning storage.files.0.mode: setuid"])]
#[case(6, r#"{"path":"/a","mode":2541}"#, &[])]
#[case(0, r#"{"path":"/a","overwrite":true}"#, &["error storage.files.0.overwrite: there is nothing"])]
#[case(0, r#"{"path":"/a","overwrite":true,"contents":{"source":""}}"#, &[])]
#[case(0, r#"{"path":"/a","user":{"id":1,"name":"b"}}"#, &["error storage.files.0.user: is said by id and by name"])]
#[case(0, r#"{"path":"/a","contents":{"compression":"xz"}}"#, &["error storage.files.0.contents.compression: is no"])]
#[case(1, r#"{"path":"/a","contents":{"source":"gs://a/b"}}"#, &["error storage.files.0.contents.source: gs is none"])]
#[case(2, r#"{"path":"/a","contents":{"source":"gs://a/b"}}"#, &[])]
#[case(3, r#"{"path":"/a","append":[{"source":"arn:aws:s3:::a/b"}]}"#, &["error storage.files.0.append.0.source: arn is none"])]
#[case(4, r#"{"path":"/a","append":[{"source":"arn:aws:s3:::a/b"}]}"#, &[])]
#[case(1, r#"{"path":"/a","contents":{"verification":{"hash":"sha256-0"}}}"#, &[
    "error storage.files.0.contents.verification: there is nothing to verify",
    "error storage.files.0.contents.verification.hash: is no hash",
])]
#[case(0, r#"{"path":"/a","contents":{"source":"data:,hello","verification":{"hash":"sha256-2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}}}"#,
    &["error storage.files.0.contents.verification.hash: sha256 is not in this version"])]
#[case(1, r#"{"path":"/a","contents":{"source":"data:,hello","verification":{"hash":"sha256-2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}}}"#, &[])]
#[case(1, r#"{"path":"/a","contents":{"source":"data:,hell","verification":{"hash":"sha256-2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}}}"#,
    &["error storage.files.0.contents.verification.hash: is not the hash"])]
#[case(1, r#"{"path":"/a","contents":{"source":"data:,x","httpHeaders":[{"name":"","value":""}]}}"#, &[
    "error storage.files.0.contents.httpHeaders: only what is fetched by http",
    "error storage.files.0.contents.httpHeaders.0.name: is missing",
    "error storage.files.0.contents.httpHeaders.0.value: is empty",
])]
#[case(1, r#"{"path":"/a","contents":{"source":"http://x/","httpHeaders":[{"name":"A"},{"name":"A"}]}}"#,
    &["error storage.files.0.contents.httpHeaders.1: is there twice: A"])]
fn a_file(#[case] minor: u8, #[case] file: &str, #[case] expected: &[&str]) {
    expect(minor, &format!(r#""storage":{{"files":[{file}]}}"#), expected);
}

#[rstest]
#[case(0, r#""links":[{"path":"/a"}]"#, &[])]
#[case(3, r#""links":[{"path":"/a"}]"#, &["error storage.links.0.target: is missing"])]
#[case(0, r#""links":[{"path":"/a","target":"/d","hard":true,"user":{"id":1}}],"directories":[{"path":"/d"}]"#, &[
    "error storage.links.0.target: a hard link cannot lead to a directory",
    "warning storage.links.0.user: a hard link has the owner",
])]
#[case(0, r#""links":[{"path":"/a","target":"/b"},{"path":"/a/c","target":"/b"}],"directories":[{"path":"/a/b/c"}]"#, &[
    "error storage.links.1.path: goes through /a",
    "error storage.directories.0.path: goes through /a",
])]
#[case(0, r#""links":[{"path":"/a","target":"/b"}],"files":[{"path":"/ab"}]"#, &[])]
#[case(0, r#""files":[{"path":"/a"},{"path":"/a"}],"links":[{"path":"/a","target":"/b"}]"#, &[
    "error storage.files.1: is there twice", "error storage.links.0: is there twice",
])]
fn nodes(#[case] minor: u8, #[case] lists: &str, #[case] expected: &[&str]) {
    expect(minor, &format!(r#""storage":{{{lists}}}"#), expected);
}

#[rstest]
#[case(0, r#"{"number":1,"label":"a"}"#, &[])]
#[case(0, r#"{}"#, &["error storage.disks.0.partitions.0: a partition needs a number"])]
#[case(0, r#"{"label":"a"},{"label":"a"}"#, &[
    "error storage.disks.0.partitions.1.label: another partition has the label",
])]
#[case(0, r#"{"number":1},{"number":1}"#, &[
    "error storage.disks.0.partitions.1.number: another partition has the number",
])]
#[case(0, r#"{"number":1,"startMiB":1,"sizeMiB":10},{"number":2,"startMiB":10,"sizeMiB":1}"#,
    &["error storage.disks.0.partitions.1: overlaps"])]
#[case(0, r#"{"number":1,"shouldExist":false,"sizeMiB":1}"#, &["error storage.disks.0.partitions.0.shouldExist: a partition"])]
#[case(0, r#"{"number":1,"shouldExist":false},{"label":"b"}"#, &["error storage.disks.0.partitions: where a partition"])]
#[case(0, r#"{"label":"a:b"}"#, &["error storage.disks.0.partitions.0.label: cannot have a colon"])]
#[case(0, r#"{"label":"0123456789012345678901234567890123456"}"#, &["error storage.disks.0.partitions.0.label: is too long"])]
#[case(0, r#"{"number":1,"guid":"x","typeGuid":"y"}"#, &[
    "error storage.disks.0.partitions.0.guid: is no GUID", "error storage.disks.0.partitions.0.typeGuid: is no GUID",
])]
#[case(1, r#"{"number":1,"resize":true}"#, &["warning storage.disks.0.partitions.0.resize: is not in 3.1.0"])]
fn partitions_of_a_disk(#[case] minor: u8, #[case] partitions: &str, #[case] expected: &[&str]) {
    let disk = format!(r#""storage":{{"disks":[{{"device":"/dev/vda","partitions":[{partitions}]}}]}}"#);
    expect(minor, &disk, expected);
}

#[rstest]
#[case(0, r#""disks":[{"device":"vda"},{}]"#, &["error storage.disks.0.device: has to", "error storage.disks.1.device: a path"])]
#[case(0, r#""disks":[{"device":"/dev/a"},{"device":"/dev/a"}]"#, &["error storage.disks.1: is there twice"])]
#[case(0, r#""raid":[{"name":"a","level":"raid0","devices":["/dev/a","/dev/a","b"],"spares":1}]"#, &[
    "error storage.raid.0.level: arrays of level raid0", "error storage.raid.0.devices.1: is there twice",
    "error storage.raid.0.devices.2: has to be absolute",
])]
#[case(0, r#""raid":[{"name":"a","level":"raid2"}]"#, &["error storage.raid.0.level: is no level", "error storage.raid.0.devices: are missing"])]
#[case(0, r#""filesystems":[{"device":"/dev/a","format":"zfs"}]"#, &["error storage.filesystems.0.format: is no format"])]
#[case(2, r#""filesystems":[{"device":"/dev/a","format":"none"}]"#, &["error storage.filesystems.0.format: is no format"])]
#[case(3, r#""filesystems":[{"device":"/dev/a","format":"none"}]"#, &[])]
#[case(0, r#""filesystems":[{"device":"/dev/a","path":"/b"}]"#, &["error storage.filesystems.0.format: is missing"])]
#[case(0, r#""filesystems":[{"device":"/dev/a","format":"xfs","label":"0123456789012"}]"#, &["error storage.filesystems.0.label: is too long"])]
#[case(0, r#""filesystems":[{"device":"/dev/a","format":"vfat","path":"b"}]"#, &["error storage.filesystems.0.path: has to be"])]
#[case(0, r#""filesystems":[{"device":"/dev/a","format":"xfs"}],"disks":[{"device":"/dev/a","wipeTable":true}]"#,
    &["warning storage.filesystems.0.device: this disk's table is wiped"])]
#[case(0, r#""filesystems":[{"device":"/dev/a","format":"xfs"}],"disks":[{"device":"/dev/a","partitions":[{"number":1}]}]"#,
    &["warning storage.filesystems.0.device: this is a disk with partitions"])]
fn disks(#[case] minor: u8, #[case] lists: &str, #[case] expected: &[&str]) {
    expect(minor, &format!(r#""storage":{{{lists}}}"#), expected);
}

#[rstest]
#[case(2, r#""device":"/dev/a""#, &[])]
#[case(2, r#""device":"""#, &["error storage.luks.0.device: a path"])]
#[case(2, r#""device":"/dev/a","label":"012345678901234567890123456789012345678901234567""#, &["error storage.luks.0.label: is too long"])]
#[case(2, r#""device":"/dev/a","clevis":{"custom":{"pin":"tpm2","config":"{}"},"tpm2":true}"#, &["error storage.luks.0.clevis.custom: custom cannot"])]
#[case(5, r#""device":"/dev/a","clevis":{"custom":{"pin":"other"}}"#, &[
    "error storage.luks.0.clevis.custom.pin: is no pin", "error storage.luks.0.clevis.custom.config: is missing",
])]
#[case(6, r#""device":"/dev/a","clevis":{"custom":{"pin":"other","config":"{}"}}"#, &[])]
#[case(3, r#""device":"/dev/a","clevis":{"custom":{"needsNetwork":true}}"#, &[
    "error storage.luks.0.clevis.custom.pin: is missing", "error storage.luks.0.clevis.custom.config: is missing",
])]
#[case(4, r#""device":"/dev/a","clevis":{"tang":[{"url":"tang","advertisement":"{"}]}"#, &[
    "error storage.luks.0.clevis.tang.0.url: is no server's", "error storage.luks.0.clevis.tang.0.thumbprint: is missing",
    "error storage.luks.0.clevis.tang.0.advertisement: is no JSON",
])]
#[case(4, r#""device":"/dev/a","openOptions":["a","a"],"options":["a","a"]"#, &["error storage.luks.0.openOptions.1: is there twice"])]
#[case(5, r#""device":"/dev/a","cex":{"enabled":true},"keyFile":{"source":"data:,a"}"#, &["error storage.luks.0.cex: cannot be with a key file"])]
fn encrypted(#[case] minor: u8, #[case] keys: &str, #[case] expected: &[&str]) {
    expect(
        minor,
        &format!(r#""storage":{{"luks":[{{"name":"a",{keys}}}]}}"#),
        expected,
    );
    expect(
        minor,
        r#""storage":{"luks":[{"name":"a/b","device":"/dev/a"}]}"#,
        &["error storage.luks.0.name: cannot have a slash"],
    );
}

#[rstest]
#[case(r#"{"name":"a.service"}"#, &[])]
#[case(r#"{"name":"a.conf"}"#, &["error systemd.units.0.name: is no unit's name"])]
#[case(r#"{"name":"a.service","contents":"[Unit"}"#, &["error systemd.units.0.contents: no `]` follows"])]
#[case(r#"{"name":"a.service","enabled":true,"contents":"[Unit]\nA=b"}"#, &["warning systemd.units.0.contents: is enabled"])]
#[case(r#"{"name":"a.service","enabled":true,"contents":""}"#, &[])]
#[case(r#"{"name":"a@.service","contents":"[Unit]\nA=b"},{"name":"a@b.service","enabled":true}"#, &["warning systemd.units.1: is enabled, but its template a@.service"])]
#[case(r#"{"name":"a.service"},{"name":"a.service"}"#, &["error systemd.units.1: is there twice: a.service"])]
#[case(r#"{"name":"a.service","dropins":[{"name":"b"},{"name":"c.conf","contents":"x=y"},{"name":"c.conf"}]}"#, &[
    "error systemd.units.0.dropins.0.name: is no drop-in's name", "error systemd.units.0.dropins.2: is there twice: c.conf",
])]
fn units_and_dropins(#[case] units: &str, #[case] expected: &[&str]) {
    expect(0, &format!(r#""systemd":{{"units":[{units}]}}"#), expected);
}

#[rstest]
#[case(0, r#""config":{"merge":[{}]}"#, &[])]
#[case(1, r#""config":{"merge":[{}]}"#, &["error ignition.config.merge.0.source: is missing"])]
#[case(0, r#""security":{"tls":{"certificateAuthorities":[{}]}}"#, &["error ignition.security.tls.certificateAuthorities.0.source: is missing"])]
#[case(0, r#""config":{"replace":{"source":"oem:///a"}}"#, &["error ignition.config.replace.source: oem is none"])]
#[case(1, r#""proxy":{"httpProxy":"ftp://a","httpsProxy":"http://a","noProxy":["a","a"]}"#, &[
    "error ignition.proxy.httpProxy: is no proxy", "warning ignition.proxy.httpsProxy: what is asked",
    "error ignition.proxy.noProxy.1: is there twice",
])]
fn ignition(#[case] minor: u8, #[case] keys: &str, #[case] expected: &[&str]) {
    let text = format!(r#"{{"ignition":{{"version":"3.{minor}.0",{keys}}}}}"#);
    let found = said(&text);
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    assert!(
        expected
            .iter()
            .all(|begin| found.iter().any(|line| line.starts_with(begin))),
        "{found:#?}"
    );
}

#[test]
fn users_and_arguments() {
    expect(
        3,
        r#""passwd":{"users":[{"name":"a","groups":["g","g"],"sshAuthorizedKeys":["k","k"]},{"name":"a"}],"groups":[{}]},
           "kernelArguments":{"shouldExist":["a"],"shouldNotExist":["a"]}"#,
        &[
            "error passwd.users.0.groups.1: is there twice",
            "error passwd.users.0.sshAuthorizedKeys.1: is there twice",
            "error passwd.users.1: is there twice: a",
            "warning passwd.groups.0.name: is missing",
            "error kernelArguments.shouldNotExist.0: is there twice",
        ],
    );
}
