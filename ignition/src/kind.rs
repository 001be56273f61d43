//! Which language a text is in, told from its content.

use std::{fmt, str::FromStr};

use crate::{node::Node, report::Report};

/// A language in which a Container Linux can be configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Raw Ignition, JSON. (<https://coreos.github.io/ignition/specs/>)
    Ignition,
    /// Container Linux Config, as `ct` 0.9 reads it.
    /// (<https://github.com/coreos/container-linux-config-transpiler/blob/v0.9.0/doc/configuration.md>)
    ContainerLinuxConfig,
    /// Butane, variants `fcos` and `flatcar`. (<https://coreos.github.io/butane/specs/>)
    Butane,
    /// cloud-config as coreos-cloudinit reads it.
    /// (<https://github.com/coreos/coreos-cloudinit/blob/v1.14.0/Documentation/cloud-config.md>)
    CloudConfig,
    /// A script, which begins with `#!`.
    Script,
}

impl Kind {
    const NAMES: [(Self, &'static str); 5] = [
        (Self::Ignition, "ignition"),
        (Self::ContainerLinuxConfig, "container-linux-config"),
        (Self::Butane, "butane"),
        (Self::CloudConfig, "cloud-config"),
        (Self::Script, "script"),
    ];

    /// What the text's first line says, which is enough for some.
    pub(crate) fn of_first_line(text: &str) -> Option<Self> {
        let line = text.lines().next().unwrap_or_default().trim_end();
        if line == "#cloud-config" {
            Some(Self::CloudConfig)
        } else if line.starts_with("#!") {
            Some(Self::Script)
        } else {
            None
        }
    }

    /// What the tree of a YAML or JSON text says.
    pub(crate) fn of_tree(node: &Node) -> Result<Self, Report> {
        let Some(map) = node.as_map() else {
            return Err(Report::of(
                node.position,
                "",
                "this is no configuration: Ignition (JSON), Butane (`variant: fcos`), a Container Linux Config, \
                 or a cloud-config (first line `#cloud-config`) is expected",
            ));
        };
        const CLOUD_CONFIG_ALONE: [&str; 6] = [
            "coreos",
            "write_files",
            "write-files",
            "ssh_authorized_keys",
            "ssh-authorized-keys",
            "manage_etc_hosts",
        ];
        if map.get("variant").is_some() {
            Ok(Self::Butane)
        } else if node.find(&["ignition", "version"]).is_some() || map.get("ignitionVersion").is_some() {
            Ok(Self::Ignition)
        } else if let Some(key) = CLOUD_CONFIG_ALONE.iter().find(|key| map.get(key).is_some()) {
            let message = format!("this is of a cloud-config, whose first line has to be `#cloud-config`: {key}");
            Err(Report::of(node.position, *key, message))
        } else {
            Ok(Self::ContainerLinuxConfig)
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Self::NAMES.iter().find(|(kind, _)| kind == self).map(|(_, name)| *name);
        f.write_str(name.unwrap_or_default())
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Self::NAMES
            .iter()
            .find(|(_, name)| *name == text)
            .map(|(kind, _)| *kind);
        known.ok_or_else(|| {
            let names: Vec<_> = Self::NAMES.iter().map(|(_, name)| *name).collect();
            format!("{text:?} is no kind of configuration: {}", names.join(", "))
        })
    }
}
