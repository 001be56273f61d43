//! The keys of a configuration, by the minor version that brought them; none was ever taken away.
//! (<https://coreos.github.io/ignition/specs/>, 2.x; order and spelling of Ignition's own output.)

use crate::shape::{Field, Language, Shape, boolean, int, list, section, text, texts};

pub(crate) const LANGUAGE: Language = Language {
    fields: &[
        section("ignition", IGNITION),
        section("networkd", &[list("units", &Shape::Struct(NETWORKD_UNIT))]),
        section("passwd", PASSWD),
        section("storage", STORAGE),
        section("systemd", &[list("units", &Shape::Struct(SYSTEMD_UNIT))]),
    ],
    version_name: |minor| format!("2.{minor}.0"),
};

const IGNITION: &[Field] = &[
    section(
        "config",
        &[list("append", &Shape::Struct(REFERENCE)), section("replace", REFERENCE)],
    ),
    section("proxy", &[text("httpProxy"), text("httpsProxy"), texts("noProxy")]).since(4),
    section(
        "security",
        &[section(
            "tls",
            &[list("certificateAuthorities", &Shape::Struct(REFERENCE))],
        )],
    )
    .since(2),
    section("timeouts", &[int("httpResponseHeaders"), int("httpTotal")]).since(1),
    text("version"),
];

/// A configuration or certificate that is fetched.
const REFERENCE: &[Field] = &[
    list("httpHeaders", &Shape::Struct(HTTP_HEADER)).since(4),
    text("source"),
    section("verification", VERIFICATION),
];

const HTTP_HEADER: &[Field] = &[text("name"), text("value")];

const VERIFICATION: &[Field] = &[text("hash")];

const NETWORKD_UNIT: &[Field] = &[
    text("contents"),
    list("dropins", &Shape::Struct(DROPIN)).since(2),
    text("name"),
];

const DROPIN: &[Field] = &[text("contents"), text("name")];

const SYSTEMD_UNIT: &[Field] = &[
    text("contents"),
    list("dropins", &Shape::Struct(DROPIN)),
    boolean("enable"),
    boolean("enabled").since(1),
    boolean("mask"),
    text("name"),
];

const PASSWD: &[Field] = &[
    list("groups", &Shape::Struct(PASSWD_GROUP)),
    list("users", &Shape::Struct(PASSWD_USER)),
];

const PASSWD_GROUP: &[Field] = &[int("gid"), text("name"), text("passwordHash"), boolean("system")];

const PASSWD_USER: &[Field] = &[
    section("create", USER_CREATE),
    text("gecos").since(1),
    texts("groups").since(1),
    text("homeDir").since(1),
    text("name"),
    boolean("noCreateHome").since(1),
    boolean("noLogInit").since(1),
    boolean("noUserGroup").since(1),
    text("passwordHash"),
    text("primaryGroup").since(1),
    texts("sshAuthorizedKeys"),
    text("shell").since(1),
    boolean("system").since(1),
    int("uid").since(1),
];

const USER_CREATE: &[Field] = &[
    text("gecos"),
    texts("groups"),
    text("homeDir"),
    boolean("noCreateHome"),
    boolean("noLogInit"),
    boolean("noUserGroup"),
    text("primaryGroup"),
    text("shell"),
    boolean("system"),
    int("uid"),
];

const STORAGE: &[Field] = &[
    list("directories", &Shape::Struct(DIRECTORY)).since(1),
    list("disks", &Shape::Struct(DISK)),
    list("files", &Shape::Struct(FILE)),
    list("filesystems", &Shape::Struct(FILESYSTEM)),
    list("links", &Shape::Struct(LINK)).since(1),
    list("raid", &Shape::Struct(RAID)),
];

const OWNER: &[Field] = &[int("id"), text("name").since(1)];

const DIRECTORY: &[Field] = &[
    text("filesystem"),
    section("group", OWNER),
    boolean("overwrite").since(2),
    text("path"),
    section("user", OWNER),
    int("mode"),
];

const FILE: &[Field] = &[
    text("filesystem"),
    section("group", OWNER),
    boolean("overwrite").since(2),
    text("path"),
    section("user", OWNER),
    boolean("append").since(2),
    section("contents", CONTENTS),
    int("mode"),
];

const LINK: &[Field] = &[
    text("filesystem"),
    section("group", OWNER),
    boolean("overwrite").since(2),
    text("path"),
    section("user", OWNER),
    boolean("hard"),
    text("target"),
];

const CONTENTS: &[Field] = &[
    text("compression"),
    list("httpHeaders", &Shape::Struct(HTTP_HEADER)).since(4),
    text("source"),
    section("verification", VERIFICATION),
];

const DISK: &[Field] = &[
    text("device"),
    list("partitions", &Shape::Struct(PARTITION)),
    boolean("wipeTable"),
];

const PARTITION: &[Field] = &[
    text("guid").since(1),
    text("label"),
    int("number"),
    boolean("shouldExist").since(3),
    int("size"),
    int("sizeMiB").since(3),
    int("start"),
    int("startMiB").since(3),
    text("typeGuid"),
    boolean("wipePartitionEntry").since(3),
];

const FILESYSTEM: &[Field] = &[section("mount", MOUNT), text("name"), text("path")];

const MOUNT: &[Field] = &[
    section("create", &[boolean("force"), texts("options")]),
    text("device"),
    text("format"),
    text("label").since(1),
    texts("options").since(1),
    text("uuid").since(1),
    boolean("wipeFilesystem").since(1),
];

const RAID: &[Field] = &[
    texts("devices"),
    text("level"),
    text("name"),
    texts("options").since(2),
    int("spares"),
];
