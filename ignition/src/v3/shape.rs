//! The keys of a configuration, by the minor version that brought them.
//! (<https://coreos.github.io/ignition/specs/>; order and spelling of Ignition's own output.)

use crate::shape::{Field, Language, Shape, boolean, int, list, section, text, texts};

pub(crate) const LANGUAGE: Language = Language {
    fields: &[
        section("ignition", IGNITION),
        section("kernelArguments", KERNEL_ARGUMENTS).since(3),
        section("passwd", PASSWD),
        section("storage", STORAGE),
        section("systemd", SYSTEMD),
    ],
    version_name: |minor| format!("3.{minor}.0"),
};

const IGNITION: &[Field] = &[
    section(
        "config",
        &[list("merge", &Shape::Struct(REFERENCE)), section("replace", REFERENCE)],
    ),
    section("proxy", &[text("httpProxy"), text("httpsProxy"), texts("noProxy")]).since(1),
    section(
        "security",
        &[section(
            "tls",
            &[list("certificateAuthorities", &Shape::Struct(REFERENCE))],
        )],
    ),
    section("timeouts", &[int("httpResponseHeaders"), int("httpTotal")]),
    text("version"),
];

/// What else is fetched: configurations and certificates, which could not be compressed at first.
const REFERENCE: &[Field] = &[
    text("compression").since(1),
    list("httpHeaders", &Shape::Struct(HTTP_HEADER)).since(1),
    text("source"),
    section("verification", VERIFICATION),
];

/// What a file has in it.
const CONTENTS: &[Field] = &[
    text("compression"),
    list("httpHeaders", &Shape::Struct(HTTP_HEADER)).since(1),
    text("source"),
    section("verification", VERIFICATION),
];

const HTTP_HEADER: &[Field] = &[text("name"), text("value")];

const VERIFICATION: &[Field] = &[text("hash")];

const KERNEL_ARGUMENTS: &[Field] = &[texts("shouldExist"), texts("shouldNotExist")];

const PASSWD: &[Field] = &[
    list("groups", &Shape::Struct(PASSWD_GROUP)),
    list("users", &Shape::Struct(PASSWD_USER)),
];

const PASSWD_GROUP: &[Field] = &[
    int("gid"),
    text("name"),
    text("passwordHash"),
    boolean("shouldExist").since(2),
    boolean("system"),
];

const PASSWD_USER: &[Field] = &[
    text("gecos"),
    texts("groups"),
    text("homeDir"),
    text("name"),
    boolean("noCreateHome"),
    boolean("noLogInit"),
    boolean("noUserGroup"),
    text("passwordHash"),
    text("primaryGroup"),
    texts("sshAuthorizedKeys"),
    text("shell"),
    boolean("shouldExist").since(2),
    boolean("system"),
    int("uid"),
];

const STORAGE: &[Field] = &[
    list("directories", &Shape::Struct(DIRECTORY)),
    list("disks", &Shape::Struct(DISK)),
    list("files", &Shape::Struct(FILE)),
    list("filesystems", &Shape::Struct(FILESYSTEM)),
    list("links", &Shape::Struct(LINK)),
    list("luks", &Shape::Struct(LUKS)).since(2),
    list("raid", &Shape::Struct(RAID)),
];

const OWNER: &[Field] = &[int("id"), text("name")];

const DIRECTORY: &[Field] = &[
    section("group", OWNER),
    boolean("overwrite"),
    text("path"),
    section("user", OWNER),
    int("mode"),
];

const FILE: &[Field] = &[
    section("group", OWNER),
    boolean("overwrite"),
    text("path"),
    section("user", OWNER),
    list("append", &Shape::Struct(CONTENTS)),
    section("contents", CONTENTS),
    int("mode"),
];

const LINK: &[Field] = &[
    section("group", OWNER),
    boolean("overwrite"),
    text("path"),
    section("user", OWNER),
    boolean("hard"),
    text("target"),
];

const DISK: &[Field] = &[
    text("device"),
    list("partitions", &Shape::Struct(PARTITION)),
    boolean("wipeTable"),
];

const PARTITION: &[Field] = &[
    text("guid"),
    text("label"),
    int("number"),
    boolean("resize").since(2),
    boolean("shouldExist"),
    int("sizeMiB"),
    int("startMiB"),
    text("typeGuid"),
    boolean("wipePartitionEntry"),
];

const FILESYSTEM: &[Field] = &[
    text("device"),
    text("format"),
    text("label"),
    texts("mountOptions").since(1),
    texts("options"),
    text("path"),
    text("uuid"),
    boolean("wipeFilesystem"),
];

const LUKS: &[Field] = &[
    section("cex", &[boolean("enabled")]).since(5),
    section("clevis", CLEVIS),
    text("device"),
    boolean("discard").since(4),
    section("keyFile", CONTENTS),
    text("label"),
    text("name"),
    texts("openOptions").since(4),
    texts("options"),
    text("uuid"),
    boolean("wipeVolume"),
];

const CLEVIS: &[Field] = &[
    section("custom", &[text("config"), boolean("needsNetwork"), text("pin")]),
    list("tang", &Shape::Struct(TANG)),
    int("threshold"),
    boolean("tpm2"),
];

const TANG: &[Field] = &[text("advertisement").since(4), text("thumbprint"), text("url")];

const RAID: &[Field] = &[
    texts("devices"),
    text("level"),
    text("name"),
    texts("options"),
    int("spares"),
];

const SYSTEMD: &[Field] = &[list("units", &Shape::Struct(UNIT))];

const UNIT: &[Field] = &[
    text("contents"),
    list("dropins", &Shape::Struct(&[text("contents"), text("name")])),
    boolean("enabled"),
    boolean("mask"),
    text("name"),
];

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs};

    use super::*;
    use crate::{
        node::{Node, Value},
        report::Report,
        text, v2,
    };

    #[test]
    fn every_key_of_every_version_is_in_the_corpus() {
        for (major, minors, fields) in [(2, 0..=4, v2::LANGUAGE.fields), (3, 0..=6, LANGUAGE.fields)] {
            for minor in minors {
                let mut known = Vec::new();
                collect(fields, minor, "", &mut known);
                let mut used = HashSet::new();
                let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/ignition");
                for entry in fs::read_dir(corpus).unwrap() {
                    let path = entry.unwrap().path();
                    let name = path.file_name().unwrap().to_string_lossy().into_owned();
                    if name.starts_with(&format!("{major}.{minor}-")) {
                        let source = fs::read_to_string(&path).unwrap();
                        let tree = text::parse_json(&source, &mut Report::default()).unwrap();
                        keys(&tree, "", &mut used);
                    }
                }
                known.retain(|path| !used.contains(path));
                assert_eq!(known, Vec::<String>::new(), "{major}.{minor}");
            }
        }
    }

    /// The paths of all keys of a version.
    fn collect(fields: &[Field], minor: u8, path: &str, out: &mut Vec<String>) {
        for field in fields.iter().filter(|field| field.is_in(minor)) {
            let path = format!("{path}.{}", field.name);
            match field.shape {
                Shape::Struct(fields) => collect(fields, minor, &path, out),
                Shape::List(Shape::Struct(fields)) => collect(fields, minor, &path, out),
                _ => {}
            }
            out.push(path);
        }
    }

    /// The paths of all keys that a configuration has.
    fn keys(node: &Node, path: &str, out: &mut HashSet<String>) {
        match &node.value {
            Value::Map(map) => {
                for (key, node) in map.iter() {
                    let path = format!("{path}.{key}");
                    keys(node, &path, out);
                    out.insert(path);
                }
            }
            Value::List(items) => items.iter().for_each(|item| keys(item, path, out)),
            _ => {}
        }
    }
}
