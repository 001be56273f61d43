//! The devices through which guest and host talk, each described once: a machine that boots has them from the beginning, on its
//! command line; a clone is given them when it has been restored, for its template had none, and QEMU would not restore some.

use std::{fmt, os::fd::RawFd};

use coreos_kvm_proto::SHARED_TAG;
use serde_json::{Map, Value};

use super::arguments::Line;
use crate::machine::{Machine, Network};

/// MAC of the guest's interface in QEMU's own network, where it is alone with QEMU.
pub const USER_MAC: &str = "02:00:00:00:00:01";
pub const USER_MTU: u32 = 1500;

/// The root port of a template, and of its clones, that has a clone's devices as its functions.
pub(super) const SLOT: &str = "late";
/// Functions of one PCI device: PCI Local Bus Specification 3.0, section 3.2.2.3.4.
const FUNCTIONS: usize = 8;
/// Network interfaces that a clone can have at most, beside its vsock and its share.
pub const CLONE_TAPS_MAX: usize = FUNCTIONS - 2;

/// The host's side of a guest's connections: descriptors, by the numbers that they have in QEMU's process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Connections {
    pub vsock: Option<Vsock>,
    /// Connection to virtiofsd.
    pub shared: Option<RawFd>,
    pub taps: Vec<Tap>,
}

/// What stands behind the guest's vsock device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vsock {
    /// An open /dev/vhost-vsock.
    Vhost { descriptor: RawFd, cid: u32 },
    /// Connection to vhost-device-vsock.
    VhostUser { connection: RawFd },
}

/// One network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    pub descriptor: RawFd,
    /// An open /dev/vhost-net, where there is one.
    pub vhost: Option<RawFd>,
    /// aa:bb:cc:dd:ee:ff
    pub mac: String,
    pub mtu: u32,
}

/// One device: its driver in QEMU and its properties. Displayed as the command line has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    pub driver: &'static str,
    properties: Vec<(&'static str, Value)>,
}

impl Device {
    pub(super) fn new(driver: &'static str) -> Self {
        Self {
            driver,
            properties: Vec::new(),
        }
    }

    pub(super) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.properties.push((name, value.into()));
        self
    }

    /// The properties as QMP's `device_add` has them.
    pub fn properties(&self) -> Map<String, Value> {
        let properties = self.properties.iter();
        properties
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.driver)?;
        for (name, value) in &self.properties {
            match value {
                Value::String(text) => write!(f, ",{name}={text}")?,
                Value::Bool(on) => write!(f, ",{name}={}", if *on { "on" } else { "off" })?,
                value => write!(f, ",{name}={value}")?,
            }
        }
        Ok(())
    }
}

/// The host's sides, which are on the command line in any case.
pub(super) fn backends(line: &mut Line, machine: &Machine, connections: &Connections) {
    if let Some(Vsock::VhostUser { connection }) = connections.vsock {
        line.chardev("vsock", connection);
    }
    if let Some(shared) = connections.shared {
        line.chardev("shared", shared);
    }
    if let Network::User { forwards } = &machine.network {
        line.add("netdev", crate::forward::netdev("user", forwards));
    }
    for (number, tap) in connections.taps.iter().enumerate() {
        let vhost = tap
            .vhost
            .map(|vhost| format!(",vhost=on,vhostfd={vhost}"))
            .unwrap_or_default();
        line.add("netdev", format!("tap,id=net{number},fd={}{vhost}", tap.descriptor));
    }
}

/// The guest's sides, in the order that they have on the bus.
pub fn connected(machine: &Machine, connections: &Connections) -> Vec<Device> {
    let mut devices = Vec::new();
    devices.extend(connections.vsock.as_ref().map(|vsock| {
        match vsock {
            Vsock::Vhost { descriptor, cid } => Device::new("vhost-vsock-pci")
                .with("guest-cid", *cid)
                .with("vhostfd", descriptor.to_string()),
            Vsock::VhostUser { .. } => Device::new("vhost-user-vsock-pci").with("chardev", "vsock"),
        }
    }));
    devices.extend(connections.shared.map(|_| {
        Device::new("vhost-user-fs-pci")
            .with("chardev", "shared")
            .with("tag", SHARED_TAG)
    }));
    if let Network::User { .. } = &machine.network {
        devices.push(interface("user".to_owned(), USER_MAC, USER_MTU));
    }
    for (number, tap) in connections.taps.iter().enumerate() {
        devices.push(interface(format!("net{number}"), &tap.mac, tap.mtu));
    }
    devices
}

/// The same as functions of the device in a clone's slot. Function 0 comes last: with it the guest's kernel sees them all.
pub fn plugged(machine: &Machine, connections: &Connections) -> Vec<Device> {
    let devices = connected(machine, connections).into_iter().enumerate();
    devices
        .map(|(function, device)| {
            device
                .with("bus", SLOT)
                .with("addr", format!("0.{function}"))
                .with("multifunction", true)
        })
        .rev()
        .collect()
}

/// Without its boot ROM: nobody boots from the network.
fn interface(netdev: String, mac: &str, mtu: u32) -> Device {
    Device::new("virtio-net-pci")
        .with("netdev", netdev)
        .with("mac", mac)
        .with("host_mtu", mtu)
        .with("romfile", "")
        .with("disable-legacy", "on")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::machine;

    #[test]
    fn a_clones_devices_are_functions_of_one_the_first_one_last() {
        let connections = Connections {
            vsock: Some(Vsock::VhostUser { connection: 17 }),
            shared: Some(18),
            taps: vec![Tap {
                descriptor: 19,
                vhost: None,
                mac: "02:11:22:33:44:55".to_owned(),
                mtu: 1450,
            }],
        };
        let plugged: Vec<_> = plugged(&machine(), &connections)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            plugged,
            [
                "virtio-net-pci,netdev=net0,mac=02:11:22:33:44:55,host_mtu=1450,romfile=,disable-legacy=on,bus=late,addr=0.2,multifunction=on",
                "vhost-user-fs-pci,chardev=shared,tag=coreos-kvm,bus=late,addr=0.1,multifunction=on",
                "vhost-user-vsock-pci,chardev=vsock,bus=late,addr=0.0,multifunction=on",
            ]
        );
    }
}
