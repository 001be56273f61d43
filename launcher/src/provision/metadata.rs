//! What is known of a machine's name and addresses before it boots, for configurations that refer to them: a cloud-config's
//! `$private_ipv4` is replaced in the text; a Container Linux Config's `{PRIVATE_IPV4}` becomes, on the platform `custom`, a
//! variable of the file `/run/metadata/coreos`, which the unit `coreos-metadata.service` has to bring.

use std::net::IpAddr;

use coreos_kvm_ignition::{Addresses, Config};
use serde_json::{Value, json};

use super::ProvisionError;
use crate::machine::Machine;

const UNIT: &str = "coreos-metadata.service";
/// Where Ignition writes what the unit then brings to its place, which is on a tmpfs.
const FILE: &str = "/etc/coreos-kvm/metadata";
const CONTENTS: &str = "[Unit]\n\
    Description=Name and addresses of this machine, for units that read /run/metadata/coreos\n\
    [Service]\n\
    Type=oneshot\n\
    RemainAfterExit=yes\n\
    ExecStart=/usr/bin/install -D -m 0644 /etc/coreos-kvm/metadata /run/metadata/coreos\n";

pub(super) struct Metadata {
    hostname: Option<String>,
    ipv4: Option<String>,
    ipv6: Option<String>,
}

impl Metadata {
    pub(super) fn of(machine: &Machine, addresses: &[IpAddr]) -> Self {
        let first = |family: fn(&IpAddr) -> bool| {
            let found = addresses.iter().find(|address| family(address));
            found.map(ToString::to_string)
        };
        // A name goes into a file that a shell may read.
        let plain = |name: &&String| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '.');
        Self {
            hostname: machine.hostname.as_ref().filter(plain).cloned(),
            ipv4: first(IpAddr::is_ipv4),
            ipv6: first(IpAddr::is_ipv6),
        }
    }

    /// A machine has one address of a family: it is private and public.
    pub(super) fn for_cloud_config(&self) -> Addresses {
        Addresses {
            hostname: self.hostname.clone(),
            private_ipv4: self.ipv4.clone(),
            public_ipv4: self.ipv4.clone(),
            private_ipv6: self.ipv6.clone(),
            public_ipv6: self.ipv6.clone(),
        }
    }

    /// The unit and its file as an Ignition configuration of the version of `config`, where that refers to them and has no such unit itself.
    pub(super) fn unit(&self, config: &Config, origin: &str) -> Result<Option<Value>, ProvisionError> {
        let json = config.to_json();
        let variables = [
            ("COREOS_CUSTOM_HOSTNAME", &self.hostname, "host name"),
            ("COREOS_CUSTOM_PRIVATE_IPV4", &self.ipv4, "IPv4 address"),
            ("COREOS_CUSTOM_PUBLIC_IPV4", &self.ipv4, "IPv4 address"),
            ("COREOS_CUSTOM_PRIVATE_IPV6", &self.ipv6, "IPv6 address"),
            ("COREOS_CUSTOM_PUBLIC_IPV6", &self.ipv6, "IPv6 address"),
        ];
        let mut known = String::new();
        let mut asked = false;
        for (variable, value, what) in variables {
            let used = json.contains(variable);
            asked |= used;
            match value {
                // `=` and the line's end, as a data: URL has them.
                Some(value) => known.push_str(&format!("{variable}%3D{}%0A", value.replace(':', "%3A"))),
                None if used && !brings_its_own(&json) => {
                    let origin = origin.to_owned();
                    return Err(ProvisionError::Unknown { origin, what });
                }
                None => {}
            }
        }
        if !asked || brings_its_own(&json) {
            return Ok(None);
        }
        let version = config.version();
        let mut file = json!({ "path": FILE, "mode": 0o644, "contents": { "source": format!("data:,{known}") } });
        if version.major() == 2 {
            file["filesystem"] = json!("root");
        }
        Ok(Some(json!({
            "ignition": { "version": format!("{}.0.0", version.major()) },
            "storage": { "files": [file] },
            "systemd": { "units": [{ "name": UNIT, "contents": CONTENTS }] },
        })))
    }
}

/// Whether the configuration has contents for the unit: then it knows better.
fn brings_its_own(json: &str) -> bool {
    let config: Value = serde_json::from_str(json).unwrap_or_default();
    let units = config.pointer("/systemd/units").and_then(Value::as_array);
    let own = |unit: &Value| unit["name"] == UNIT && unit.get("contents").is_some();
    units.is_some_and(|units| units.iter().any(own))
}
