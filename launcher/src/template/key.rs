//! What a template is known by: a hash of everything that shapes its guest.

use std::{fmt, io, os::unix::fs::MetadataExt, path::Path, str::FromStr};

use coreos_kvm_proto::PROTOCOL;
use sha2::{Digest, Sha256};

use super::TemplateError;
use crate::{
    accel::{Acceleration, Host},
    carriage::Carriage,
    machine::Machine,
    netdev,
    qemu::{
        arguments::{self, Descriptors, Ignition, Output, Ports, Start},
        devices::{self, Connections},
        program::Qemu,
    },
};

/// Grows with each change of what is kept, or how.
const FORMAT: u32 = 1;

/// 32 hexadecimal digits: the first half of a SHA-256. Also the name of the template's folder.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// The key of the template that `machine` could be a clone of, whose guest gets `ignition`.
    ///
    /// # Errors
    /// When one of the files that shape the guest cannot be looked at.
    pub(crate) fn of(
        machine: &Machine,
        ignition: &Carriage,
        host: &Host,
        qemu: &Qemu,
        agent_disk: &Path,
    ) -> Result<Self, TemplateError> {
        let mut hash = Sha256::new();
        let mut add = |name: &str, value: &[u8]| {
            hash.update(name);
            hash.update((value.len() as u64).to_le_bytes());
            hash.update(value);
        };
        let version = format!("{FORMAT} {} {PROTOCOL} {}", env!("CARGO_PKG_VERSION"), qemu.version);
        add("versions", version.as_bytes());
        let (placeholder, text) = match ignition {
            Carriage::FwCfg(text) | Carriage::FwCfgCompressed(text) => (Ignition::FwCfg { descriptor: 0 }, text),
            Carriage::Disk { serial, content } => {
                let serial = serial.clone();
                (Ignition::Disk { descriptor: 0, serial }, content)
            }
        };
        add("ignition", text.as_bytes());
        let descriptors = Descriptors {
            start: Start::Template {
                kernel: 0,
                initramfs: 0,
                memory: 0,
                ports: Ports {
                    agent: 0,
                    share: 0,
                    output: qemu.ivshmem.then_some(Output { port: 0, memory: 0 }),
                },
            },
            ignition: placeholder,
            root: 0,
            agent_disk: 0,
            data_disk: None,
            qmp: 0,
            console: 0,
            connections: Connections {
                // The driver has agreed with the card on what the host's kernel can, if that serves it.
                taps: vec![devices::Tap::of_template(0, netdev::vhost().map(|_| 0))],
                ..Connections::default()
            },
        };
        for argument in arguments::arguments(machine, host, &descriptors) {
            add("argument", argument.as_encoded_bytes());
        }
        // It is plugged in later.
        let card = devices::card(&descriptors.connections);
        add("card", card.map(|card| card.to_string()).unwrap_or_default().as_bytes());
        let guest = &machine.guest;
        for file in [
            qemu.path.as_path(),
            &guest.kernel,
            &guest.initramfs,
            &guest.root,
            agent_disk,
        ] {
            add("file", identity(file)?.as_bytes());
        }
        match host.acceleration {
            Acceleration::Kvm => add("processor", host.processor.identity.as_bytes()),
            // The guest has measured it.
            Acceleration::Tcg => add("counter", &host.processor.counter_mhz.unwrap_or_default().to_le_bytes()),
        }
        let digest = hash.finalize();
        Ok(Self(digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text that is no template's key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no template's key: 32 hexadecimal digits are expected, as `coreos-kvm template ls` shows them")]
pub struct InvalidKey(String);

impl FromStr for Key {
    type Err = InvalidKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if text.len() == 32 && text.bytes().all(digit) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidKey(text.to_owned()))
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What changes when a file is replaced or written to. Its content is not hashed: that would take longer than a clone.
fn identity(path: &Path) -> Result<String, TemplateError> {
    let look = TemplateError::io::<io::Error>("looking at", path);
    let file = std::fs::metadata(path).map_err(look)?;
    Ok(format!(
        "{} {} {} {}.{} {}.{}",
        file.dev(),
        file.ino(),
        file.size(),
        file.mtime(),
        file.mtime_nsec(),
        file.ctime(),
        file.ctime_nsec()
    ))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{accel::Processor, machine::tests::machine, qemu::program::OLDEST};

    /// A machine of files that are there, and the agent's disk.
    fn files(root: &Path) -> (Machine, PathBuf) {
        let mut machine = machine();
        let file = |name: &str| {
            let path = root.join(name);
            std::fs::write(&path, name).unwrap();
            path
        };
        machine.guest.kernel = file("kernel");
        machine.guest.initramfs = file("initramfs");
        machine.guest.root = file("root");
        (machine, file("agent"))
    }

    fn host(acceleration: Acceleration, processor: &str, counter_mhz: u32) -> Host {
        Host {
            acceleration,
            processor: Processor {
                identity: processor.to_owned(),
                counter_mhz: Some(counter_mhz),
            },
        }
    }

    fn key(machine: &Machine, ignition: &str, agent: &Path) -> Key {
        key_on(&host(Acceleration::Tcg, "one", 2100), machine, ignition, agent)
    }

    fn key_on(host: &Host, machine: &Machine, ignition: &str, agent: &Path) -> Key {
        let ignition = Carriage::FwCfg(ignition.to_owned());
        let qemu = Qemu {
            path: "/proc/self/exe".into(),
            version: OLDEST,
            ivshmem: true,
        };
        Key::of(machine, &ignition, host, &qemu, agent).unwrap()
    }

    #[test]
    fn whatever_shapes_the_guest_is_in_the_key() {
        let root = tempfile::tempdir().unwrap();
        let (machine, agent) = files(root.path());
        let plain = key(&machine, "{}", &agent);
        assert_eq!(plain, key(&machine, "{}", &agent));
        assert_eq!(plain.as_str().len(), 32);
        let larger = Machine {
            memory_mib: machine.memory_mib + 1,
            ..machine.clone()
        };
        let wider = Machine {
            vcpus: 2,
            ..machine.clone()
        };
        let talkative = Machine {
            kernel_args: vec!["debug".to_owned()],
            ..machine.clone()
        };
        let mut keys = vec![
            plain,
            key(&larger, "{}", &agent),
            key(&wider, "{}", &agent),
            key(&talkative, "{}", &agent),
            key(&machine, "{ }", &agent),
        ];
        let on =
            |acceleration, processor, counter| key_on(&host(acceleration, processor, counter), &machine, "{}", &agent);
        keys.push(on(Acceleration::Tcg, "one", 2400));
        keys.push(on(Acceleration::Kvm, "one", 2100));
        keys.push(on(Acceleration::Kvm, "other", 2100));
        // Of another processor that counts alike the translated guest knows nothing.
        assert_eq!(on(Acceleration::Tcg, "other", 2100), keys[0]);
        std::fs::write(&machine.guest.root, "other").unwrap();
        keys.push(key(&machine, "{}", &agent));
        let count = keys.len();
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), count, "{keys:?}");
    }
}
