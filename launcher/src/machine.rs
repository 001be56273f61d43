//! The description of one virtual machine: plain, checked data. Everything that is decided about a machine before it runs
//! is decided here; what follows (Ignition, QEMU's arguments, the process) only reads it.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use crate::{accel::AccelerationChoice, guest::Guest};

/// Name of a machine: the pod's sandbox id, or whatever the caller of the command chose. Safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MachineId(String);

/// A name that cannot be a machine's.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} cannot name a machine: 1 to 128 letters, digits, '.', '_' or '-' are allowed, the first a letter or digit"
)]
pub struct InvalidMachineId(String);

impl MachineId {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MachineId {
    type Err = InvalidMachineId;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        let begins = name.starts_with(|c: char| c.is_ascii_alphanumeric());
        if begins && name.len() <= 128 && name.chars().all(allowed) {
            Ok(Self(name.to_owned()))
        } else {
            Err(InvalidMachineId(name.to_owned()))
        }
    }
}

impl fmt::Display for MachineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One virtual machine, wholly described.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name; also the name of its state directory.
    pub id: MachineId,
    /// The operating system it boots.
    pub guest: Guest,
    /// Number of virtual processors, at least 1.
    pub vcpus: u32,
    /// Guest memory in MiB, at least the guest's minimum.
    pub memory_mib: u64,
    /// How QEMU is to run the guest's instructions.
    pub acceleration: AccelerationChoice,
    /// The user's raw Ignition configuration, not yet merged with what the agent needs.
    pub ignition: Option<String>,
    /// Further kernel arguments, after the guest's own.
    pub kernel_args: Vec<String>,
    /// How the guest is on the network.
    pub network: Network,
    /// Directory below the cgroup hierarchies' roots in which QEMU and its helpers live; made and removed with the machine.
    pub cgroup: Option<PathBuf>,
    /// Longest time from QEMU's start to the agent's greeting.
    pub boot_timeout: Duration,
}

/// How the guest is on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// No interface but loopback.
    None,
    /// The interfaces of a network namespace are bridged to the guest, which takes over their addresses.
    Tap {
        /// The network namespace, as a path: `/var/run/netns/cni-...`. QEMU runs in it.
        netns: PathBuf,
        /// Ports that the guest serves under another number.
        redirects: Vec<PortRedirect>,
    },
}

/// A port of the pod that is another port in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRedirect {
    pub protocol: PortProtocol,
    /// Port of the pod's address.
    pub port: u16,
    /// Port on which the guest's process listens.
    pub guest_port: u16,
}

/// Transport protocol of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortProtocol {
    Tcp,
    Udp,
    Sctp,
}
