//! QEMU's command line: a pure function of the machine and of the descriptors that its process will hold.
//!
//! Nothing in it names a path that QEMU would have to be allowed to open, save its own firmware, and no secret: whatever
//! belongs to one machine is handed over as an open descriptor. The order of the devices is the order on the PCI bus, so
//! that the root disk is always `/dev/vda`.

use std::{ffi::OsString, os::fd::RawFd};

use coreos_kvm_proto::{AGENT_DISK_SERIAL, READY_PORT_ARGUMENT, SHARED_TAG};

use crate::{
    accel::Acceleration,
    disk::{DATA_DISK_SERIAL, Storage},
    forward,
    machine::{Machine, Network},
};

/// Processor that the guest sees under TCG: the plainest that x86-64-v2 programs run on (distributions of the RHEL 9
/// generation are built for that level). Each feature beyond is work for the guest's kernel that translation makes slow.
const TCG_CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt";

/// MiB of translated code that TCG keeps. The default of QEMU (a quarter of the guest's memory and more) costs some 280 MB.
const TCG_TRANSLATION_MIB: u32 = 64;

/// MAC of the guest's interface in QEMU's own network, where it is alone with QEMU.
pub const USER_MAC: &str = "02:00:00:00:00:01";
pub const USER_MTU: u32 = 1500;

/// What is one QEMU's own: its open descriptors, by the numbers that they have in its process, and its port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors {
    pub kernel: RawFd,
    pub initramfs: RawFd,
    pub ignition: Ignition,
    pub root: RawFd,
    pub agent_disk: RawFd,
    /// The machine's own disk, open for writing.
    pub data_disk: Option<RawFd>,
    /// QEMU's ends of the connections of its monitor and of the guest's serial console.
    pub qmp: RawFd,
    pub console: RawFd,
    pub vsock: Vsock,
    /// Connection to virtiofsd.
    pub shared: RawFd,
    pub taps: Vec<Tap>,
    /// Port of the host's vsock at which the agent's greeting is waited for.
    pub ready_port: u32,
}

/// The merged Ignition configuration, and the way on which it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ignition {
    FwCfg { descriptor: RawFd },
    Disk { descriptor: RawFd, serial: String },
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

/// The arguments, the program's name left out.
pub fn arguments(machine: &Machine, acceleration: Acceleration, descriptors: &Descriptors) -> Vec<OsString> {
    let mut line = Line::default();
    platform(&mut line, machine, acceleration);
    boot(&mut line, machine, descriptors);
    disks(&mut line, machine, descriptors);
    connections(&mut line, descriptors);
    network(&mut line, machine, &descriptors.taps);
    line.0.into_iter().map(OsString::from).collect()
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.flag(option);
        self.0.push(value.into());
    }

    fn flag(&mut self, option: &str) {
        self.0.push(format!("-{option}"));
    }
}

/// What the machine is made of, and what QEMU itself may do.
fn platform(line: &mut Line, machine: &Machine, acceleration: Acceleration) {
    line.add("name", format!("{},debug-threads=on", machine.id));
    line.flag("no-user-config");
    line.flag("nodefaults");
    line.add("display", "none");
    line.add("msg", "timestamp=on");
    line.add(
        "sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    // A guest that reboots ends, as one that powers off: nothing in a pod comes back by itself.
    line.flag("no-reboot");
    line.add("rtc", "base=utc");

    // Devices of a PC that nothing in the guest needs are left out: finding them costs time at each boot.
    line.add(
        "machine",
        "q35,memory-backend=memory,graphics=off,smm=off,vmport=off,hpet=off,i8042=off,sata=off,smbus=off,usb=off",
    );
    match acceleration {
        Acceleration::Kvm => {
            line.add("accel", "kvm");
            line.add("cpu", "host");
        }
        Acceleration::Tcg => {
            line.add("accel", format!("tcg,thread=multi,tb-size={TCG_TRANSLATION_MIB}"));
            line.add("cpu", TCG_CPU);
        }
    }
    line.add("smp", format!("cpus={}", machine.vcpus));
    line.add("m", format!("size={}M", machine.memory_mib));
    // Shared, for virtiofsd and vhost-device-vsock read and write the guest's memory.
    line.add(
        "object",
        format!("memory-backend-memfd,id=memory,size={}M,share=on", machine.memory_mib),
    );
}

/// Kernel and configuration. QEMU reads these once, by name, so that a descriptor is named as a file.
fn boot(line: &mut Line, machine: &Machine, descriptors: &Descriptors) {
    line.add("kernel", own_file(descriptors.kernel));
    line.add("initrd", own_file(descriptors.initramfs));
    line.add("append", kernel_arguments(machine, descriptors.ready_port));
    if let Ignition::FwCfg { descriptor } = descriptors.ignition {
        let file = own_file(descriptor);
        line.add("fw_cfg", format!("name={},file={file}", machine.guest.ignition_fw_cfg));
    }
}

/// The guest's own arguments, the launcher's, then the machine's, which thereby have the last word.
fn kernel_arguments(machine: &Machine, ready_port: u32) -> String {
    // With -no-reboot a panic thus ends QEMU at once, rather than leave a dead machine that looks alive.
    let mut ours = vec!["panic=-1".to_owned(), format!("{READY_PORT_ARGUMENT}={ready_port}")];
    if matches!(machine.network, Network::User { .. }) {
        // dracut.cmdline(7). The agent gives the interface its address, but names are resolved by a file.
        ours.push(format!("nameserver={}", forward::NAME_SERVER));
    }
    let guest = machine.guest.kernel_args.iter().map(String::as_str);
    guest
        .chain(ours.iter().map(String::as_str))
        .chain(machine.kernel_args.iter().map(String::as_str))
        .collect::<Vec<_>>()
        .join(" ")
}

fn disks(line: &mut Line, machine: &Machine, descriptors: &Descriptors) {
    disk(line, "root", machine.guest.root_format.driver(), descriptors.root, None);
    disk(line, "agent", "raw", descriptors.agent_disk, Some(AGENT_DISK_SERIAL));
    if let (Some(descriptor), Some(disk)) = (descriptors.data_disk, &machine.disk) {
        data_disk(line, descriptor, &disk.storage);
    }
    if let Ignition::Disk { descriptor, serial } = &descriptors.ignition {
        disk(line, "ignition", "raw", *descriptor, Some(serial));
    }
}

/// The disk that the guest may write to. What it gives up is given back to the host, and a host that has no room left is an
/// error in the guest, which would otherwise be halted without anybody knowing.
fn data_disk(line: &mut Line, descriptor: RawFd, storage: &Storage) {
    line.add("add-fd", format!("fd={descriptor},set={descriptor}"));
    // What does not outlive the machine need not outlive the host either.
    let no_flush = matches!(storage, Storage::Ephemeral);
    let node = format!(
        r#"{{"node-name":"data","driver":"raw","discard":"unmap","cache":{{"no-flush":{no_flush}}},"file":{{"driver":"file","filename":"/dev/fdset/{descriptor}","discard":"unmap","cache":{{"no-flush":{no_flush}}},"locking":"off"}}}}"#
    );
    line.add("blockdev", node);
    line.add(
        "device",
        format!("virtio-blk-pci,drive=data,serial={DATA_DISK_SERIAL},werror=report,rerror=report,disable-legacy=on"),
    );
}

/// A read-only disk. `name` also numbers its descriptor set, in which QEMU finds it by the name /dev/fdset/N.
fn disk(line: &mut Line, name: &str, driver: &str, descriptor: RawFd, serial: Option<&str>) {
    line.add("add-fd", format!("fd={descriptor},set={descriptor}"));
    // An image that names another file as its base would have QEMU open that.
    let no_base = if driver == "qcow2" { r#","backing":null"# } else { "" };
    // Without locks: many machines read one image, and nobody writes it.
    let node = format!(
        r#"{{"node-name":"{name}","driver":"{driver}","read-only":true{no_base},"file":{{"driver":"file","filename":"/dev/fdset/{descriptor}","read-only":true,"locking":"off"}}}}"#
    );
    line.add("blockdev", node);
    let serial = serial.map(|serial| format!(",serial={serial}")).unwrap_or_default();
    line.add(
        "device",
        format!("virtio-blk-pci,drive={name}{serial},disable-legacy=on"),
    );
}

/// Everything through which guest and host talk.
fn connections(line: &mut Line, descriptors: &Descriptors) {
    chardev(line, "qmp", descriptors.qmp);
    line.add("mon", "chardev=qmp,mode=control");
    chardev(line, "console", descriptors.console);
    line.add("serial", "chardev:console");
    line.add("device", "virtio-rng-pci,disable-legacy=on");
    match descriptors.vsock {
        Vsock::Vhost { descriptor, cid } => {
            line.add(
                "device",
                format!("vhost-vsock-pci,guest-cid={cid},vhostfd={descriptor}"),
            );
        }
        Vsock::VhostUser { connection } => {
            chardev(line, "vsock", connection);
            line.add("device", "vhost-user-vsock-pci,chardev=vsock");
        }
    }
    chardev(line, "shared", descriptors.shared);
    line.add("device", format!("vhost-user-fs-pci,chardev=shared,tag={SHARED_TAG}"));
}

/// A connected Unix socket.
fn chardev(line: &mut Line, name: &str, descriptor: RawFd) {
    line.add("chardev", format!("socket,id={name},fd={descriptor}"));
}

fn network(line: &mut Line, machine: &Machine, taps: &[Tap]) {
    if let Network::User { forwards } = &machine.network {
        let mut netdev = format!(
            "user,id=user,ipv6=off,net={}/{},dhcpstart={}",
            forward::NETWORK,
            forward::PREFIX_LENGTH,
            forward::GUEST
        );
        for forward in forwards {
            netdev += &format!(",hostfwd={forward}");
        }
        line.add("netdev", netdev);
        line.add("device", interface("user", USER_MAC, USER_MTU));
    }
    for (
        number,
        Tap {
            descriptor,
            vhost,
            mac,
            mtu,
        },
    ) in taps.iter().enumerate()
    {
        let vhost = vhost
            .map(|vhost| format!(",vhost=on,vhostfd={vhost}"))
            .unwrap_or_default();
        line.add("netdev", format!("tap,id=net{number},fd={descriptor}{vhost}"));
        line.add("device", interface(&format!("net{number}"), mac, *mtu));
    }
}

/// Without its boot ROM: nobody boots from the network.
fn interface(netdev: &str, mac: &str, mtu: u32) -> String {
    format!("virtio-net-pci,netdev={netdev},mac={mac},host_mtu={mtu},romfile=,disable-legacy=on")
}

fn own_file(descriptor: RawFd) -> String {
    format!("/proc/self/fd/{descriptor}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        disk::Disk,
        guest::DiskFormat,
        machine::{Configuration, tests::machine},
        size::Size,
    };

    fn descriptors() -> Descriptors {
        Descriptors {
            kernel: 10,
            initramfs: 11,
            ignition: Ignition::FwCfg { descriptor: 12 },
            root: 13,
            agent_disk: 14,
            data_disk: None,
            qmp: 15,
            console: 16,
            vsock: Vsock::VhostUser { connection: 17 },
            shared: 18,
            taps: Vec::new(),
            ready_port: 1026,
        }
    }

    /// One option with its value a line.
    fn lines(machine: &Machine, acceleration: Acceleration, descriptors: &Descriptors) -> String {
        let mut text = String::new();
        for argument in arguments(machine, acceleration, descriptors) {
            let argument = argument.into_string().unwrap();
            let separator = if argument.starts_with('-') { "\n" } else { " " };
            text += separator;
            text += &argument;
        }
        text
    }

    #[test]
    fn a_translated_machine_without_network() {
        insta::assert_snapshot!(lines(&machine(), Acceleration::Tcg, &descriptors()));
    }

    #[test]
    fn an_accelerated_machine_on_kernel_devices_with_two_interfaces() {
        let machine = Machine {
            vcpus: 4,
            memory_mib: 2048,
            kernel_args: ["systemd.log_level=debug", "panic=5"].map(str::to_owned).to_vec(),
            ..machine()
        };
        let tap = |descriptor, vhost, mac: &str| Tap {
            descriptor,
            vhost,
            mac: mac.to_owned(),
            mtu: 1450,
        };
        let descriptors = Descriptors {
            vsock: Vsock::Vhost {
                descriptor: 17,
                cid: 4711,
            },
            taps: vec![
                tap(20, Some(21), "02:00:00:00:00:01"),
                tap(22, None, "02:00:00:00:00:02"),
            ],
            ..descriptors()
        };
        insta::assert_snapshot!(lines(&machine, Acceleration::Kvm, &descriptors));
    }

    #[test]
    fn a_machine_on_qemus_network_with_a_disk_and_a_long_configuration() {
        let machine = Machine {
            network: Network::User {
                forwards: forward::parse_list("tcp::2222-:22,udp:127.0.0.1:5353-:53").unwrap(),
            },
            disk: Some(Disk {
                size: Size::from_mib(12 << 10),
                storage: Storage::Ephemeral,
            }),
            ..machine()
        };
        let descriptors = Descriptors {
            data_disk: Some(30),
            ignition: Ignition::Disk {
                descriptor: 31,
                serial: "coreos-kvm-config".to_owned(),
            },
            ..descriptors()
        };
        insta::assert_snapshot!(lines(&machine, Acceleration::Tcg, &descriptors));
    }

    #[test]
    fn what_is_written_to_a_disk_that_stays_is_flushed() {
        let machine = Machine {
            disk: Some(Disk {
                size: Size::from_mib(64),
                storage: Storage::File("/var/lib/disk.img".into()),
            }),
            ..machine()
        };
        let descriptors = Descriptors {
            data_disk: Some(30),
            ..descriptors()
        };
        let lines = lines(&machine, Acceleration::Tcg, &descriptors);
        let node = lines.lines().find(|line| line.contains("\"data\"")).unwrap();
        assert!(
            node.contains(r#""cache":{"no-flush":false}"#) && !node.contains("disk.img"),
            "{node}"
        );
    }

    #[test]
    fn a_guest_on_qcow2_is_kept_from_naming_other_files() {
        let mut machine = machine();
        machine.guest.root_format = DiskFormat::Qcow2;
        let lines = lines(&machine, Acceleration::Tcg, &descriptors());
        let node = lines.lines().find_map(|line| line.strip_prefix("-blockdev ")).unwrap();
        let node: serde_json::Value = serde_json::from_str(node).unwrap();
        assert_eq!(
            (&node["driver"], &node["backing"]),
            (&"qcow2".into(), &serde_json::Value::Null)
        );
        assert!(node.as_object().unwrap().contains_key("backing"));
    }

    #[test]
    fn the_configuration_is_not_in_the_arguments() {
        let machine = Machine {
            configuration: Some(Configuration {
                origin: "a test".to_owned(),
                text: "{\"secret\": true}".to_owned(),
            }),
            ..machine()
        };
        assert!(!lines(&machine, Acceleration::Tcg, &descriptors()).contains("secret"));
    }
}
