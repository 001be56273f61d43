//! The keys of a Container Linux Config.
//! (<https://github.com/coreos/container-linux-config-transpiler/blob/v0.9.0/doc/configuration.md>)

use crate::shape::{Field, Language, Shape, boolean, field, int, list, section, text, texts};

/// All but `etcd` and `flannel`, whose keys depend on a version that they name themselves.
pub(super) const LANGUAGE: Language = Language {
    fields: &[
        section("ignition", IGNITION),
        section("storage", STORAGE),
        section(
            "systemd",
            &[list(
                "units",
                &Shape::Struct(&[
                    text("name"),
                    boolean("enable"),
                    boolean("enabled"),
                    boolean("mask"),
                    text("contents"),
                    DROPINS,
                ]),
            )],
        ),
        section(
            "networkd",
            &[list(
                "units",
                &Shape::Struct(&[text("name"), text("contents"), DROPINS]),
            )],
        ),
        section("passwd", PASSWD),
        section("update", &[text("group"), text("server")]),
        section("docker", &[texts("flags")]),
        section("locksmith", LOCKSMITH),
    ],
    version_name: |_| "a Container Linux Config".to_owned(),
};

const DROPINS: Field = list("dropins", &Shape::Struct(&[text("name"), text("contents")]));

const VERIFICATION: Field = section("verification", &[section("hash", &[text("function"), text("sum")])]);

const REFERENCE: &[Field] = &[text("source"), VERIFICATION];

const IGNITION: &[Field] = &[
    section(
        "config",
        &[list("append", &Shape::Struct(REFERENCE)), section("replace", REFERENCE)],
    ),
    section("timeouts", &[int("http_response_headers"), int("http_total")]),
    section(
        "security",
        &[section(
            "tls",
            &[list("certificate_authorities", &Shape::Struct(REFERENCE))],
        )],
    ),
];

const OWNER: &[Field] = &[int("id"), text("name")];

const STORAGE: &[Field] = &[
    list(
        "disks",
        &Shape::Struct(&[
            text("device"),
            boolean("wipe_table"),
            list(
                "partitions",
                &Shape::Struct(&[
                    text("label"),
                    int("number"),
                    text("size"),
                    text("start"),
                    text("guid"),
                    text("type_guid"),
                ]),
            ),
        ]),
    ),
    list(
        "raid",
        &Shape::Struct(&[
            text("name"),
            text("level"),
            texts("devices"),
            int("spares"),
            texts("options"),
        ]),
    ),
    list(
        "filesystems",
        &Shape::Struct(&[
            text("name"),
            section(
                "mount",
                &[
                    text("device"),
                    text("format"),
                    section("create", &[boolean("force"), texts("options")]),
                    boolean("wipe_filesystem"),
                    text("label"),
                    text("uuid"),
                    texts("options"),
                ],
            ),
            text("path"),
        ]),
    ),
    list(
        "files",
        &Shape::Struct(&[
            text("filesystem"),
            text("path"),
            section("user", OWNER),
            section("group", OWNER),
            int("mode"),
            section(
                "contents",
                &[
                    section("remote", &[text("url"), text("compression"), VERIFICATION]),
                    text("inline"),
                    text("local"),
                ],
            ),
            boolean("overwrite"),
            boolean("append"),
        ]),
    ),
    list(
        "directories",
        &Shape::Struct(&[
            text("filesystem"),
            text("path"),
            section("user", OWNER),
            section("group", OWNER),
            int("mode"),
            boolean("overwrite"),
        ]),
    ),
    list(
        "links",
        &Shape::Struct(&[
            text("filesystem"),
            text("path"),
            section("user", OWNER),
            section("group", OWNER),
            boolean("hard"),
            text("target"),
            boolean("overwrite"),
        ]),
    ),
];

/// How a user is created: on its own (`users`), or in the older way below `create`.
macro_rules! creation {
    ($($before:expr,)*) => {
        &[
            $($before,)*
            int("uid"),
            text("gecos"),
            text("home_dir"),
            boolean("no_create_home"),
            text("primary_group"),
            texts("groups"),
            boolean("no_user_group"),
            boolean("system"),
            boolean("no_log_init"),
            text("shell"),
        ]
    };
}

const PASSWD: &[Field] = &[
    list(
        "users",
        &Shape::Struct(creation![
            text("name"),
            text("password_hash"),
            texts("ssh_authorized_keys"),
            field("create", Shape::Struct(creation![])),
        ]),
    ),
    list(
        "groups",
        &Shape::Struct(&[text("name"), int("gid"), text("password_hash"), boolean("system")]),
    ),
];

/// The options of locksmithd.
const LOCKSMITH: &[Field] = &[
    text("reboot_strategy"),
    text("window_start"),
    text("window_length"),
    text("group"),
    text("etcd_endpoints"),
    text("etcd_cafile"),
    text("etcd_certfile"),
    text("etcd_keyfile"),
];
