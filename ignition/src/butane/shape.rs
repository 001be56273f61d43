//! Keys of the variants, numbered by the minor version of `fcos` that brought them.
//! (<https://coreos.github.io/butane/config-fcos-v1_7/>, <https://coreos.github.io/butane/config-flatcar-v1_1/>)

use crate::shape::{Field, Shape, boolean, int, list, section, text, texts};

pub(super) const FCOS: &[Field] = &[
    text("variant"),
    text("version"),
    IGNITION,
    KERNEL_ARGUMENTS,
    PASSWD,
    STORAGE,
    SYSTEMD,
    section("boot_device", BOOT_DEVICE).since(3),
    section("grub", &[list("users", &Shape::Struct(GRUB_USER))]).since(5),
];

pub(super) const FLATCAR: &[Field] = &[
    text("variant"),
    text("version"),
    IGNITION,
    KERNEL_ARGUMENTS,
    PASSWD,
    STORAGE,
    SYSTEMD,
];

const IGNITION: Field = section(
    "ignition",
    &[
        section(
            "config",
            &[list("merge", &Shape::Struct(REFERENCE)), section("replace", REFERENCE)],
        ),
        section("proxy", &[text("http_proxy"), text("https_proxy"), texts("no_proxy")]).since(1),
        section(
            "security",
            &[section(
                "tls",
                &[list("certificate_authorities", &Shape::Struct(REFERENCE))],
            )],
        ),
        section("timeouts", &[int("http_response_headers"), int("http_total")]),
    ],
);

const KERNEL_ARGUMENTS: Field =
    section("kernel_arguments", &[texts("should_exist"), texts("should_not_exist")]).since(4);

const PASSWD: Field = section(
    "passwd",
    &[
        list("groups", &Shape::Struct(PASSWD_GROUP)),
        list("users", &Shape::Struct(PASSWD_USER)),
    ],
);

const STORAGE: Field = section(
    "storage",
    &[
        list("directories", &Shape::Struct(DIRECTORY)),
        list("disks", &Shape::Struct(DISK)),
        list("files", &Shape::Struct(FILE)),
        list("filesystems", &Shape::Struct(FILESYSTEM)),
        list("links", &Shape::Struct(LINK)),
        list("luks", &Shape::Struct(LUKS)).since(2),
        list("raid", &Shape::Struct(RAID)),
        list("trees", &Shape::Struct(TREE)).since(1),
    ],
);

const SYSTEMD: Field = section("systemd", &[list("units", &Shape::Struct(UNIT))]);

const HTTP_HEADERS: Field = list("http_headers", &Shape::Struct(&[text("name"), text("value")])).since(1);

const VERIFICATION: Field = section("verification", &[text("hash")]);

/// Contents of files and keys.
const CONTENTS: &[Field] = &[
    text("compression"),
    HTTP_HEADERS,
    text("source"),
    text("inline"),
    text("local").since(1),
    VERIFICATION,
];

/// Configurations and certificates, which were no contents like others at first.
const REFERENCE: &[Field] = &[
    text("compression").since(1),
    HTTP_HEADERS,
    text("source"),
    text("inline").since(1),
    text("local").since(1),
    VERIFICATION,
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

const TREE: &[Field] = &[
    section("group", OWNER).since(7),
    text("local"),
    text("path"),
    section("user", OWNER).since(7),
    int("file_mode").since(7),
    int("dir_mode").since(7),
];

const DISK: &[Field] = &[
    text("device"),
    list(
        "partitions",
        &Shape::Struct(&[
            text("guid"),
            text("label"),
            int("number"),
            boolean("resize").since(2),
            boolean("should_exist"),
            int("size_mib"),
            int("start_mib"),
            text("type_guid"),
            boolean("wipe_partition_entry"),
        ]),
    ),
    boolean("wipe_table"),
];

const FILESYSTEM: &[Field] = &[
    text("device"),
    text("format"),
    text("label"),
    texts("mount_options").since(1),
    texts("options"),
    text("path"),
    text("uuid"),
    boolean("wipe_filesystem"),
    boolean("with_mount_unit").since(1),
];

const CEX: Field = section("cex", &[boolean("enabled")]).since(6);

const TANG: Field = list(
    "tang",
    &Shape::Struct(&[text("thumbprint"), text("url"), text("advertisement").since(5)]),
);

const LUKS: &[Field] = &[
    CEX,
    section(
        "clevis",
        &[
            section("custom", &[text("config"), boolean("needs_network"), text("pin")]),
            TANG,
            int("threshold"),
            boolean("tpm2"),
        ],
    ),
    text("device"),
    boolean("discard").since(5),
    section("key_file", CONTENTS),
    text("label"),
    text("name"),
    texts("open_options").since(5),
    texts("options"),
    text("uuid"),
    boolean("wipe_volume"),
];

const RAID: &[Field] = &[
    texts("devices"),
    text("level"),
    text("name"),
    texts("options"),
    int("spares"),
];

const PASSWD_GROUP: &[Field] = &[
    int("gid"),
    text("name"),
    text("password_hash"),
    boolean("should_exist").since(2),
    boolean("system"),
];

const PASSWD_USER: &[Field] = &[
    text("gecos"),
    texts("groups"),
    text("home_dir"),
    text("name"),
    boolean("no_create_home"),
    boolean("no_log_init"),
    boolean("no_user_group"),
    text("password_hash"),
    text("primary_group"),
    boolean("should_exist").since(2),
    texts("ssh_authorized_keys"),
    texts("ssh_authorized_keys_local").since(5),
    text("shell"),
    boolean("system"),
    int("uid"),
];

const UNIT: &[Field] = &[
    text("contents"),
    text("contents_local").since(5),
    list(
        "dropins",
        &Shape::Struct(&[text("contents"), text("contents_local").since(5), text("name")]),
    ),
    boolean("enabled"),
    boolean("mask"),
    text("name"),
];

const BOOT_DEVICE: &[Field] = &[
    text("layout"),
    section(
        "luks",
        &[
            CEX,
            boolean("discard").since(5),
            text("device").since(6),
            TANG,
            int("threshold"),
            boolean("tpm2"),
        ],
    ),
    section("mirror", &[texts("devices")]),
];

const GRUB_USER: &[Field] = &[text("name"), text("password_hash")];

#[cfg(test)]
mod tests {
    use std::{collections::HashSet, fs};

    use super::*;
    use crate::{
        node::{Node, Value},
        report::Report,
        text,
    };

    fn collect(node: &Node, path: &str, paths: &mut HashSet<String>) {
        match &node.value {
            Value::List(items) => items.iter().for_each(|item| collect(item, path, paths)),
            Value::Map(map) => {
                for (key, value) in map.iter() {
                    let path = format!("{path}.{key}");
                    collect(value, &path, paths);
                    paths.insert(path);
                }
            }
            _ => {}
        }
    }

    fn missing(fields: &[Field], path: &str, paths: &HashSet<String>, out: &mut Vec<String>) {
        for field in fields {
            let path = format!("{path}.{}", field.name);
            if !paths.contains(&path) {
                out.push(path.clone());
            }
            let mut shape = &field.shape;
            while let Shape::List(element) = shape {
                shape = element;
            }
            if let Shape::Struct(fields) = shape {
                missing(fields, &path, paths, out);
            }
        }
    }

    #[test]
    fn every_key_is_in_the_corpus() {
        let mut paths = HashSet::new();
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/butane");
        for entry in fs::read_dir(corpus).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let source = fs::read_to_string(&path).unwrap();
                collect(
                    &text::parse_yaml(&source, &mut Report::default()).unwrap(),
                    "",
                    &mut paths,
                );
            }
        }
        let mut out = Vec::new();
        missing(FCOS, "", &paths, &mut out);
        assert_eq!(out, Vec::<String>::new());
    }
}
