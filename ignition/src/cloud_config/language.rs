//! The keys of a cloud-config, with `_` for `-`.
//! (<https://github.com/coreos/coreos-cloudinit/blob/v1.14.0/Documentation/cloud-config.md>)

use super::service;
use crate::shape::{Field, Language, Shape, boolean, list, section, text, texts};

pub(super) const LANGUAGE: Language = Language {
    fields: &[
        text("hostname"),
        texts("ssh_authorized_keys"),
        list("users", &Shape::Struct(USER)),
        list(
            "write_files",
            &Shape::Struct(&[
                text("path"),
                text("content"),
                text("encoding"),
                text("owner"),
                text("permissions"),
            ]),
        ),
        text("manage_etc_hosts"),
        section("coreos", COREOS),
    ],
    version_name: |_| "a cloud-config".to_owned(),
};

const USER: &[Field] = &[
    text("name"),
    text("passwd"),
    texts("ssh_authorized_keys"),
    text("gecos"),
    text("homedir"),
    boolean("no_create_home"),
    text("primary_group"),
    texts("groups"),
    boolean("no_user_group"),
    boolean("system"),
    boolean("no_log_init"),
    text("shell"),
];

const COREOS: &[Field] = &[
    section("etcd", service::ETCD),
    section("etcd2", crate::etcd2::ETCD2),
    section("flannel", service::FLANNEL),
    section("fleet", service::FLEET),
    section("locksmith", service::LOCKSMITH),
    section(
        "oem",
        &[
            text("id"),
            text("name"),
            text("version_id"),
            text("home_url"),
            text("bug_report_url"),
        ],
    ),
    section("update", &[text("group"), text("reboot_strategy"), text("server")]),
    list(
        "units",
        &Shape::Struct(&[
            text("name"),
            boolean("mask"),
            boolean("enable"),
            boolean("runtime"),
            text("content"),
            text("command"),
            list("drop_ins", &Shape::Struct(&[text("name"), text("content")])),
        ]),
    ),
];
