//! The devices through which guest and host talk, each described once: a machine that boots has them from the beginning, on its
//! command line. A clone is given them when it has been restored, for its template had none, and QEMU would not restore some; but its
//! first network card is one that its template has, too, without a connection.

use std::{fmt, os::fd::RawFd};

use coreos_kvm_proto::SHARED_TAG;
use serde_json::{Map, Value};

use super::arguments::Line;
use crate::{
    mac::Mac,
    machine::{Machine, Network},
    template::card::TEMPLATE_MAC,
};

/// MAC of the guest's interface in QEMU's own network, where it is alone with QEMU.
pub const USER_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
pub const USER_MTU: u32 = 1500;

/// Where devices of templates and clones can be plugged in: names of their root ports.
const SLOTS: [&str; 2] = [CARD_SLOT, LATE_SLOT];
/// For the network card of templates and clones.
const CARD_SLOT: &str = "card";
/// For the devices that a clone is given when it has been restored, as its functions.
const LATE_SLOT: &str = "late";
/// Functions of one PCI device: PCI Local Bus Specification 3.0, section 3.2.2.3.4.
const FUNCTIONS: usize = 8;
/// Network interfaces that a clone can have at most: its template's, and those beside its vsock and its share.
pub const CLONE_TAPS_MAX: usize = 1 + FUNCTIONS - 2;

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
    pub mac: Mac,
    pub mtu: u32,
}

impl Tap {
    /// One of which the guest's side is a template's.
    pub fn of_template(descriptor: RawFd, vhost: Option<RawFd>) -> Self {
        Self {
            descriptor,
            vhost,
            mac: TEMPLATE_MAC,
            mtu: USER_MTU,
        }
    }
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
pub(super) fn connected(machine: &Machine, connections: &Connections) -> Vec<Device> {
    let mut devices = helped(connections);
    if let Network::User { .. } = &machine.network {
        devices.push(network_card(USER_MAC).with("host_mtu", USER_MTU).with("netdev", "user"));
    }
    devices.extend(interfaces(connections));
    devices
}

/// The root ports of templates and clones.
pub(super) fn slots(line: &mut Line) {
    for (number, slot) in (1..).zip(SLOTS) {
        // Without a power switch, which would be off as long as nobody turns it on.
        let port = Device::new("pcie-root-port")
            .with("id", slot)
            .with("chassis", number)
            .with("power_controller_present", false);
        line.add("device", port.to_string());
    }
}

/// The network card of templates and clones, their first tap's. A template's is plugged in when its guest has booted.
pub fn card(connections: &Connections) -> Option<Device> {
    let tap = connections.taps.first()?;
    // Without an MTU, which would be the most that the guest's kernel takes in any clone.
    Some(network_card(tap.mac).with("netdev", "net0").with("bus", CARD_SLOT))
}

/// What a clone is given beside it, as functions of the device in its slot. Function 0 comes last: with it the guest's kernel sees
/// them all.
pub fn plugged(connections: &Connections) -> Vec<Device> {
    let devices = helped(connections).into_iter().chain(interfaces(connections).skip(1));
    let mut devices: Vec<_> = devices
        .enumerate()
        .map(|(function, device)| {
            device
                .with("bus", LATE_SLOT)
                .with("addr", format!("0.{function}"))
                .with("multifunction", true)
        })
        .collect();
    devices.reverse();
    devices
}

/// Those behind which are helpers, or the host's kernel.
fn helped(connections: &Connections) -> Vec<Device> {
    let vsock = connections.vsock.as_ref().map(|vsock| match vsock {
        Vsock::Vhost { descriptor, cid } => Device::new("vhost-vsock-pci")
            .with("guest-cid", *cid)
            .with("vhostfd", descriptor.to_string()),
        Vsock::VhostUser { .. } => Device::new("vhost-user-vsock-pci").with("chardev", "vsock"),
    });
    let shared = connections.shared.map(|_| {
        Device::new("vhost-user-fs-pci")
            .with("chardev", "shared")
            .with("tag", SHARED_TAG)
    });
    vsock.into_iter().chain(shared).collect()
}

fn interfaces(connections: &Connections) -> impl Iterator<Item = Device> {
    let taps = connections.taps.iter().enumerate();
    taps.map(|(number, tap)| {
        network_card(tap.mac)
            .with("host_mtu", tap.mtu)
            .with("netdev", format!("net{number}"))
    })
}

/// Without its boot ROM: nobody boots from the network. And without a guest that says where it is when it was restored, which is
/// nowhere new: QEMU 7.2 also ends by a segmentation fault when the driver of such a card is taken away.
fn network_card(mac: Mac) -> Device {
    Device::new("virtio-net-pci")
        .with("mac", mac.to_string())
        .with("romfile", "")
        .with("guest_announce", false)
        .with("disable-legacy", "on")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(devices: &[Device]) -> Vec<String> {
        devices.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_clones_devices_are_its_card_and_functions_of_one_the_first_one_last() {
        let tap = |descriptor, last| Tap {
            descriptor,
            vhost: None,
            mac: Mac([2, 0x11, 0x22, 0x33, 0x44, last]),
            mtu: 1450,
        };
        let connections = Connections {
            vsock: Some(Vsock::VhostUser { connection: 17 }),
            shared: Some(18),
            taps: vec![tap(19, 0x55), tap(20, 0x66)],
        };
        assert_eq!(
            card(&connections).unwrap().to_string(),
            "virtio-net-pci,mac=02:11:22:33:44:55,romfile=,guest_announce=off,disable-legacy=on,netdev=net0,bus=card"
        );
        assert_eq!(
            text(&plugged(&connections)),
            [
                "virtio-net-pci,mac=02:11:22:33:44:66,romfile=,guest_announce=off,disable-legacy=on,host_mtu=1450,netdev=net1,bus=late,addr=0.2,multifunction=on",
                "vhost-user-fs-pci,chardev=shared,tag=coreos-kvm,bus=late,addr=0.1,multifunction=on",
                "vhost-user-vsock-pci,chardev=vsock,bus=late,addr=0.0,multifunction=on",
            ]
        );
    }
}
