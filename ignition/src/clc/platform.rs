//! The places where a Container Linux runs, and what `coreos-metadata` knows of a machine there.

use std::{fmt, str::FromStr};

/// Where a Container Linux runs: a machine learns its name and addresses from its surroundings, and `coreos-metadata` calls
/// them differently everywhere.
/// (<https://github.com/coreos/container-linux-config-transpiler/blob/v0.9.0/doc/dynamic-data.md>)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Platform {
    /// Microsoft Azure.
    Azure,
    /// DigitalOcean.
    DigitalOcean,
    /// Amazon EC2.
    Ec2,
    /// Google Compute Engine.
    Gce,
    /// Packet.
    Packet,
    /// OpenStack, its metadata service.
    OpenStackMetadata,
    /// Vagrant with VirtualBox.
    VagrantVirtualBox,
    /// CloudStack, its config drive.
    CloudStackConfigDrive,
    /// Any other place: a unit of the user's, or of the launcher's, writes `COREOS_CUSTOM_*` to `/run/metadata/coreos`.
    Custom,
}

/// What a platform is called, and which of its variables holds what.
struct Known {
    platform: Platform,
    name: &'static str,
    variables: &'static [(&'static str, &'static str)],
}

const KNOWN: &[Known] = &[
    Known {
        platform: Platform::Azure,
        name: "azure",
        variables: &[
            ("PRIVATE_IPV4", "COREOS_AZURE_IPV4_DYNAMIC"),
            ("PUBLIC_IPV4", "COREOS_AZURE_IPV4_VIRTUAL"),
        ],
    },
    Known {
        platform: Platform::DigitalOcean,
        name: "digitalocean",
        variables: &[
            ("HOSTNAME", "COREOS_DIGITALOCEAN_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_DIGITALOCEAN_IPV4_PRIVATE_0"),
            ("PUBLIC_IPV4", "COREOS_DIGITALOCEAN_IPV4_PUBLIC_0"),
            ("PRIVATE_IPV6", "COREOS_DIGITALOCEAN_IPV6_PRIVATE_0"),
            ("PUBLIC_IPV6", "COREOS_DIGITALOCEAN_IPV6_PUBLIC_0"),
        ],
    },
    Known {
        platform: Platform::Ec2,
        name: "ec2",
        variables: &[
            ("HOSTNAME", "COREOS_EC2_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_EC2_IPV4_LOCAL"),
            ("PUBLIC_IPV4", "COREOS_EC2_IPV4_PUBLIC"),
        ],
    },
    Known {
        platform: Platform::Gce,
        name: "gce",
        variables: &[
            ("HOSTNAME", "COREOS_GCE_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_GCE_IP_LOCAL_0"),
            ("PUBLIC_IPV4", "COREOS_GCE_IP_EXTERNAL_0"),
        ],
    },
    Known {
        platform: Platform::Packet,
        name: "packet",
        variables: &[
            ("HOSTNAME", "COREOS_PACKET_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_PACKET_IPV4_PRIVATE_0"),
            ("PUBLIC_IPV4", "COREOS_PACKET_IPV4_PUBLIC_0"),
            ("PUBLIC_IPV6", "COREOS_PACKET_IPV6_PUBLIC_0"),
        ],
    },
    Known {
        platform: Platform::OpenStackMetadata,
        name: "openstack-metadata",
        variables: &[
            ("HOSTNAME", "COREOS_OPENSTACK_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_OPENSTACK_IPV4_LOCAL"),
            ("PUBLIC_IPV4", "COREOS_OPENSTACK_IPV4_PUBLIC"),
        ],
    },
    Known {
        platform: Platform::VagrantVirtualBox,
        name: "vagrant-virtualbox",
        variables: &[
            ("HOSTNAME", "COREOS_VAGRANT_VIRTUALBOX_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_VAGRANT_VIRTUALBOX_PRIVATE_IPV4"),
        ],
    },
    Known {
        platform: Platform::CloudStackConfigDrive,
        name: "cloudstack-configdrive",
        variables: &[("HOSTNAME", "CLOUDSTACK_LOCAL_HOSTNAME")],
    },
    Known {
        platform: Platform::Custom,
        name: "custom",
        variables: &[
            ("HOSTNAME", "COREOS_CUSTOM_HOSTNAME"),
            ("PRIVATE_IPV4", "COREOS_CUSTOM_PRIVATE_IPV4"),
            ("PUBLIC_IPV4", "COREOS_CUSTOM_PUBLIC_IPV4"),
            ("PRIVATE_IPV6", "COREOS_CUSTOM_PRIVATE_IPV6"),
            ("PUBLIC_IPV6", "COREOS_CUSTOM_PUBLIC_IPV6"),
        ],
    },
];

impl Platform {
    /// The names of all platforms, for a sentence.
    pub(super) fn names() -> String {
        KNOWN.iter().map(|known| known.name).collect::<Vec<_>>().join(", ")
    }

    /// What can be asked of a machine there (`HOSTNAME`, ...), and the variables that hold it.
    pub(super) fn variables(self) -> &'static [(&'static str, &'static str)] {
        self.known().map(|known| known.variables).unwrap_or_default()
    }

    fn known(self) -> Option<&'static Known> {
        KNOWN.iter().find(|known| known.platform == self)
    }
}

/// As `ct --platform` calls it.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.known().map(|known| known.name).unwrap_or_default())
    }
}

impl FromStr for Platform {
    type Err = String;

    /// # Errors
    /// A sentence with the names of all platforms, when the text is none of them.
    fn from_str(text: &str) -> Result<Self, String> {
        let known = KNOWN.iter().find(|known| known.name == text);
        known
            .map(|known| known.platform)
            .ok_or_else(|| format!("{text:?} is no platform: {} are", Self::names()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_platform_is_read_as_it_is_written() {
        for known in KNOWN {
            assert_eq!(known.name.parse(), Ok(known.platform));
            assert_eq!(known.platform.to_string(), known.name);
        }
        let said = "aws".parse::<Platform>().unwrap_err();
        assert!(said.contains("azure, digitalocean, ec2"), "{said}");
    }
}
