//! The description of one virtual machine: plain, checked data. Everything that is decided about a machine before it runs
//! is decided here; what follows (Ignition, QEMU's arguments, the process) only reads it.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use coreos_kvm_proto::agent::ConfigureSandboxRequest;

use crate::{accel::AccelerationChoice, disk::Disk, forward::Forward, guest::Guest, size::Size, template::Key};

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
    /// That of a machine which is described, and not started.
    pub(crate) fn template() -> Self {
        Self("template".to_owned())
    }

    /// That of the machine which is saved as a template.
    pub(crate) fn of_template(key: &Key) -> Self {
        Self(format!("template-{key}"))
    }

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
    /// What it can be given while it runs; none for a machine whose size stays.
    pub growth: Option<Growth>,
    /// How QEMU is to run the guest's instructions.
    pub acceleration: AccelerationChoice,
    /// The user's configuration, in whatever language, not yet merged with what the agent needs.
    pub configuration: Option<Configuration>,
    /// The name by which others know the machine, where it has one: a configuration may refer to it.
    pub hostname: Option<String>,
    /// Further kernel arguments, after the guest's own.
    pub kernel_args: Vec<String>,
    /// How the guest is on the network.
    pub network: Network,
    /// What makes the guest a pod's, where it is one's: done before the machine counts as started.
    pub sandbox: Option<ConfigureSandboxRequest>,
    /// A disk that the guest may write to; without one, whatever it writes is in its memory.
    pub disk: Option<Disk>,
    /// Directory below the cgroup hierarchies' roots in which QEMU and its helpers live; made and removed with the machine.
    pub cgroup: Option<PathBuf>,
    /// Longest time from QEMU's start until the guest is what [`Vm::start`](crate::vm::Vm::start) waits for.
    pub boot_timeout: Duration,
    /// Whether it may be a clone of a template that it shares with all machines of the same guest, size and configuration.
    pub cloneable: bool,
}

/// The largest size that a running machine can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Growth {
    pub vcpus: u32,
    pub memory_mib: u64,
}

impl Growth {
    /// That of a machine of `vcpus` processors where no machine has more than these maxima.
    pub fn within(vcpus: u32, max_vcpus: u32, max_memory_mib: u64) -> Self {
        Self {
            vcpus: vcpus.max(GROWTH_VCPUS).min(max_vcpus),
            memory_mib: max_memory_mib,
        }
    }
}

/// A configuration as a user wrote it.
#[derive(Clone, PartialEq, Eq)]
pub struct Configuration {
    /// What is to be looked at when something is wrong with it: a file, an annotation.
    pub origin: String,
    /// Ignition, Butane, a Container Linux Config, a cloud-config or a script; its content tells.
    pub text: String,
}

/// Without the text, which may hold secrets.
impl fmt::Debug for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Configuration({}, {} bytes)", self.origin, self.text.len())
    }
}

/// A machine that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MachineError {
    #[error("a machine needs at least one processor")]
    NoProcessor,
    #[error("{vcpus} processors are too many: at most {VCPUS_MAX} are possible")]
    Processors { vcpus: u32 },
    #[error("{memory_mib} MiB of memory are too little: the guest {guest:?} needs at least {min_memory_mib} MiB")]
    Memory {
        memory_mib: u64,
        guest: String,
        min_memory_mib: u64,
    },
    #[error("{memory_mib} MiB of memory are too much: at most {MEMORY_MIB_MAX} MiB (16 TiB) are possible")]
    TooMuchMemory { memory_mib: u64 },
    #[error("a disk of {size} is too small: the guest {guest:?} needs at least {min}")]
    DiskTooSmall { size: Size, guest: String, min: Size },
    #[error("a disk of {size} is too large: at most {DISK_MAX} are possible")]
    DiskTooLarge { size: Size },
    #[error("{0:?} cannot be a kernel argument: it has white space, quotes or control characters, or is empty")]
    KernelArgument(String),
    #[error("the kernel arguments have {length} bytes; at most {KERNEL_ARGUMENTS_MAX} reach the kernel")]
    KernelArguments { length: usize },
}

/// To how many processors a smaller machine can grow: they are all there when it starts, and the guest prepares for each of them.
const GROWTH_VCPUS: u32 = 8;

/// Processors of a machine at most; QEMU's q35 takes 288.
pub const VCPUS_MAX: u32 = 256;
/// What a machine's memory can be, in MiB: 16 TiB.
pub const MEMORY_MIB_MAX: u64 = 16 << 20;

/// A disk smaller than this has no room for a file system that is worth having.
const DISK_MIN: Size = Size::from_mib(64);
/// What ext4 takes with blocks of 4 KiB.
const DISK_MAX: Size = Size::from_mib(16 << 20);

/// Room that is left to a machine's own kernel arguments in the 2,048 bytes that an x86 kernel reads, in bytes.
pub const KERNEL_ARGUMENTS_MAX: usize = 1024;

impl Machine {
    /// Whether such a machine can be started.
    ///
    /// # Errors
    /// When it has no processor, less memory than its guest needs or more than there can be, a disk without room, or arguments that the kernel would read otherwise.
    pub fn check(&self) -> Result<(), MachineError> {
        if self.vcpus == 0 {
            return Err(MachineError::NoProcessor);
        }
        if self.vcpus > VCPUS_MAX {
            return Err(MachineError::Processors { vcpus: self.vcpus });
        }
        if self.memory_mib < self.guest.min_memory_mib {
            return Err(MachineError::Memory {
                memory_mib: self.memory_mib,
                guest: self.guest.name.clone(),
                min_memory_mib: self.guest.min_memory_mib,
            });
        }
        if self.memory_mib > MEMORY_MIB_MAX {
            return Err(MachineError::TooMuchMemory {
                memory_mib: self.memory_mib,
            });
        }
        self.check_disk()?;
        let odd = |c: char| c.is_whitespace() || c.is_control() || c == '"';
        if let Some(argument) = self
            .kernel_args
            .iter()
            .find(|argument| argument.is_empty() || argument.contains(odd))
        {
            return Err(MachineError::KernelArgument(argument.clone()));
        }
        let length = self.kernel_args.iter().map(|argument| argument.len() + 1).sum();
        if length > KERNEL_ARGUMENTS_MAX {
            return Err(MachineError::KernelArguments { length });
        }
        Ok(())
    }
}

impl Machine {
    /// What its disk has to have: the room of the image that it is to hold changes of.
    pub fn disk_min(&self) -> Size {
        let image = std::fs::metadata(&self.guest.root).map_or(0, |image| image.len());
        DISK_MIN.max(Size::from_mib(image.div_ceil(1 << 20)))
    }

    fn check_disk(&self) -> Result<(), MachineError> {
        let Some(Disk { size, .. }) = self.disk else {
            return Ok(());
        };
        let min = self.disk_min();
        if size < min {
            return Err(MachineError::DiskTooSmall {
                size,
                guest: self.guest.name.clone(),
                min,
            });
        }
        if size > DISK_MAX {
            return Err(MachineError::DiskTooLarge { size });
        }
        Ok(())
    }
}

/// How the guest is on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// No interface but loopback.
    None,
    /// QEMU's own network: the guest is at 10.0.2.15 and reaches what the launcher's network namespace reaches, that
    /// namespace's loopback included (at 10.0.2.2); it is reached by the forwards alone.
    User { forwards: Vec<Forward> },
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::{disk::Storage, guest::DiskFormat};

    /// A machine that can be, for the tests of whatever reads machines.
    pub(crate) fn machine() -> Machine {
        Machine {
            id: "pod".parse().unwrap(),
            guest: Guest {
                name: "reference".to_owned(),
                kernel: "/guests/reference/vmlinuz".into(),
                initramfs: "/guests/reference/initrd.img".into(),
                root: "/guests/reference/root.erofs".into(),
                root_format: DiskFormat::Raw,
                kernel_args: ["root=/dev/vda", "ro"].map(str::to_owned).to_vec(),
                ignition_fw_cfg: "opt/com.coreos/config".to_owned(),
                ignition_disk: Some("coreos-kvm-config".to_owned()),
                ignition_versions: ["3.0.0", "3.1.0", "3.2.0", "3.3.0"].map(str::to_owned).to_vec(),
                min_memory_mib: 192,
            },
            vcpus: 1,
            memory_mib: 512,
            growth: None,
            acceleration: AccelerationChoice::Auto,
            configuration: None,
            hostname: None,
            kernel_args: Vec::new(),
            network: Network::None,
            sandbox: None,
            disk: None,
            cgroup: None,
            boot_timeout: Duration::from_secs(60),
            cloneable: false,
        }
    }

    #[test]
    fn too_little_memory_is_told_with_what_the_guest_needs() {
        let machine = Machine {
            memory_mib: 64,
            ..machine()
        };
        let error = machine.check().unwrap_err().to_string();
        assert_eq!(
            error,
            "64 MiB of memory are too little: the guest \"reference\" needs at least 192 MiB"
        );
    }

    #[test]
    fn no_machine_has_more_than_can_be_said() {
        let large = Machine {
            memory_mib: MEMORY_MIB_MAX + 1,
            ..machine()
        };
        let error = large.check().unwrap_err().to_string();
        assert!(error.contains("too much: at most 16777216 MiB (16 TiB)"), "{error}");
        let wide = Machine {
            vcpus: VCPUS_MAX + 1,
            ..machine()
        };
        assert_eq!(wide.check(), Err(MachineError::Processors { vcpus: 257 }));
    }

    #[rstest::rstest]
    #[case(63, "a disk of 63M is too small: the guest \"reference\" needs at least 64M")]
    #[case((16 << 20) + 1, "a disk of 16777217M is too large: at most 16T are possible")]
    fn a_disk_has_room_for_the_guest(#[case] mib: u64, #[case] expected: &str) {
        let disk = |mib| {
            Some(Disk {
                size: Size::from_mib(mib),
                storage: Storage::Ephemeral,
            })
        };
        let wrong = Machine {
            disk: disk(mib),
            ..machine()
        };
        assert_eq!(wrong.check().unwrap_err().to_string(), expected);
        let right = Machine {
            disk: disk(64),
            ..machine()
        };
        assert_eq!(right.check(), Ok(()));
    }

    #[rstest::rstest]
    #[case("a b")]
    #[case("a=\"b\"")]
    #[case("a\nb")]
    #[case("")]
    fn a_kernel_argument_is_one_word(#[case] argument: &str) {
        let machine = Machine {
            kernel_args: vec![argument.to_owned()],
            ..machine()
        };
        assert_eq!(machine.check(), Err(MachineError::KernelArgument(argument.to_owned())));
    }

    #[test]
    fn kernel_arguments_are_not_cut_off() {
        let machine = Machine {
            kernel_args: vec!["x".repeat(KERNEL_ARGUMENTS_MAX)],
            ..machine()
        };
        assert_eq!(machine.check(), Err(MachineError::KernelArguments { length: 1025 }));
    }
}
