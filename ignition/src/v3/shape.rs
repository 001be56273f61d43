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
