//! QEMU's command line: a pure function of the machine and of the descriptors that its process will hold.
//!
//! Nothing in it names a path that QEMU would have to be allowed to open, save its own firmware, and no secret: whatever
//! belongs to one machine is handed over as an open descriptor. The order of the devices is the order on the PCI bus, so
//! that the root disk is always `/dev/vda`.

use std::{ffi::OsString, os::fd::RawFd};

use coreos_kvm_proto::{
    AGENT_DISK_SERIAL, AGENT_SERIAL_PORT, OUTPUT_SERIAL_PORT, READY_PORT_ARGUMENT, SHARE_SERIAL_PORT,
    TEMPLATE_ARGUMENT, output_window,
};

use super::devices::{self, Connections};
use crate::{
    accel::{Acceleration, Host},
    disk::{DATA_DISK_SERIAL, Storage},
    forward,
    machine::{Machine, Network},
    state::CloneMode,
};

/// Processor that the guest sees under TCG: the plainest that x86-64-v2 programs run on (distributions of the RHEL 9
/// generation are built for that level). Each feature beyond is work for the guest's kernel that translation makes slow.
const TCG_CPU: &str = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt";

/// MiB of translated code that TCG keeps. The default of QEMU (a quarter of the guest's memory and more) costs some 280 MB.
const TCG_TRANSLATION_MIB: u32 = 64;
/// Of these QEMU sets so much aside for each processor, whether it runs or not; "region" in tcg/region.c.
const TCG_TRANSLATION_OF_ONE_MIB: u32 = 2;

/// Kernel argument: no drivers for root ports themselves. That for hotplug would wait 5 s when a clone's devices are there, and
/// then take them for new.
const ALONE_WITH_PORTS: &str = "pcie_ports=compat";

/// Kernel argument: no memory for devices that reach 4 GiB at most. Of a machine whose memory could grow beyond that it would be 64 MiB,
/// and virtio's devices reach everything.
const NO_BOUNCE_BUFFERS: &str = "swiotlb=noforce";

/// Kernel argument: the processor's counter (TSC) is the clock. Under TCG it is the host's, the same for all processors, but the processor
/// that the guest sees does not say so, and the kernel would read a port of the chipset (ACPI's timer) at each change of process.
const COUNTER_IS_CLOCK: &str = "tsc=reliable";

/// Kernel argument: features of the processor that the kernel does not use. It says that it is tainted then (value 4,
/// Documentation/admin-guide/tainted-kernels.rst).
const CLEARED_FEATURES: &str = "clearcpuid=";
/// One of them: without it the kernel copies by plain moves and not by string instructions, which is faster in translated code. It zeroes
/// pages slower.
const COPIES_BY_STRINGS: &str = "rep_good";

/// Name of the memory in which much output comes.
pub const WINDOW: &str = "window";

/// How often a machine's memory can grow: virtiofsd and vhost-device-vsock take eight pieces of memory, and at the beginning there
/// are up to three: below and above 4 GiB, and the one in which much output comes.
pub const MEMORY_SLOTS: usize = 5;

/// Size of the blocks in which the guest's kernel takes memory, in MiB: `probe_memory_block_size` in arch/x86/mm/init_64.c goes by
/// where memory ends. Of a large machine 2 GiB are below 4 GiB, and the rest is above.
pub fn block_mib(machine: &Machine) -> u64 {
    if machine.memory_mib < 62 << 10 { 128 } else { 2 << 10 }
}

/// What is one QEMU's own: its open descriptors, by the numbers that they have in its process, and its port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptors {
    pub start: Start,
    pub ignition: Ignition,
    pub root: RawFd,
    pub agent_disk: RawFd,
    /// The machine's own disk, open for writing.
    pub data_disk: Option<RawFd>,
    /// QEMU's ends of the connections of its monitor and of the guest's serial console.
    pub qmp: RawFd,
    pub console: RawFd,
    /// A template has but a tap that leads nowhere.
    pub connections: Connections,
}

/// How the guest comes to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// It boots.
    Boot {
        kernel: RawFd,
        initramfs: RawFd,
        /// Port of the host's vsock at which the agent's greeting is waited for.
        ready_port: u32,
    },
    /// It boots and is saved.
    Template {
        kernel: RawFd,
        initramfs: RawFd,
        /// A file in memory that becomes the guest's.
        memory: RawFd,
        ports: Ports,
    },
    /// It goes on where a template was saved.
    Clone {
        memory: RawFd,
        mode: CloneMode,
        ports: Ports,
    },
}

/// QEMU's ends of the connections of the virtio-serial ports that templates and their clones have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Of [`AGENT_SERIAL_PORT`].
    pub agent: RawFd,
    /// Of [`SHARE_SERIAL_PORT`].
    pub share: RawFd,
    /// None if QEMU has no device for its memory.
    pub output: Option<Output>,
}

/// QEMU's ends of what much output comes by ([`output_window`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output {
    /// Of [`OUTPUT_SERIAL_PORT`].
    pub port: RawFd,
    pub memory: RawFd,
}

/// The merged Ignition configuration, and the way on which it travels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ignition {
    FwCfg { descriptor: RawFd },
    Disk { descriptor: RawFd, serial: String },
}

/// The arguments, the program's name left out.
pub fn arguments(machine: &Machine, host: &Host, descriptors: &Descriptors) -> Vec<OsString> {
    let mut line = Line::default();
    platform(&mut line, machine, host.acceleration);
    memory(&mut line, machine, &descriptors.start);
    boot(&mut line, machine, host, descriptors);
    disks(&mut line, machine, descriptors);
    console(&mut line, descriptors);
    let connections = &descriptors.connections;
    devices::backends(&mut line, machine, connections);
    match descriptors.start {
        Start::Boot { .. } => {
            for device in devices::connected(machine, connections) {
                line.add("device", device.to_string());
            }
        }
        Start::Template { ports, .. } => late(&mut line, ports),
        Start::Clone { ports, .. } => {
            late(&mut line, ports);
            if let Some(card) = devices::card(connections) {
                line.add("device", card.to_string());
            }
        }
    }
    line.0.into_iter().map(OsString::from).collect()
}

/// Options of the command line.
#[derive(Default)]
pub(super) struct Line(Vec<String>);

impl Line {
    pub(super) fn add(&mut self, option: &str, value: impl Into<String>) {
        self.flag(option);
        self.0.push(value.into());
    }

    fn flag(&mut self, option: &str) {
        self.0.push(format!("-{option}"));
    }

    /// A connected Unix socket.
    pub(super) fn chardev(&mut self, name: &str, descriptor: RawFd) {
        self.add("chardev", format!("socket,id={name},fd={descriptor}"));
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
        "q35,memory-backend=memory,mem-merge=off,graphics=off,smm=off,vmport=off,hpet=off,i8042=off,sata=off,smbus=off,usb=off",
    );
    // The agent looks for a clone's devices itself. The firmware's notice of them would have the kernel look as well, by a program
    // in byte code that takes longer than all else that a clone does to come up.
    line.add("global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off");
    match acceleration {
        Acceleration::Kvm => {
            line.add("accel", "kvm");
            line.add("cpu", "host");
        }
        Acceleration::Tcg => {
            let spare = TCG_TRANSLATION_OF_ONE_MIB * (processors(machine) - machine.vcpus);
            line.add(
                "accel",
                format!("tcg,thread=multi,tb-size={}", TCG_TRANSLATION_MIB + spare),
            );
            line.add("cpu", TCG_CPU);
        }
    }
    line.add("smp", format!("cpus={}", processors(machine)));
}

/// All processors of a machine, those included that its guest does not use as long as it is not told to. They are there from the
/// beginning: QEMU's translation does not bear that others come (no room for their code is left) or go (memory is freed twice).
fn processors(machine: &Machine) -> u32 {
    let most = machine.growth.map_or(0, |growth| growth.vcpus);
    most.max(machine.vcpus)
}

/// Memory that the machine can have. Modules have the size of the guest's blocks of memory, or some of them.
fn most_memory_mib(machine: &Machine) -> u64 {
    let more = machine
        .growth
        .map_or(0, |growth| growth.memory_mib.saturating_sub(machine.memory_mib));
    machine.memory_mib + more.next_multiple_of(block_mib(machine))
}

/// The guest's memory. Shared, for virtiofsd and vhost-device-vsock read and write it, unless it is a clone that has neither.
fn memory(line: &mut Line, machine: &Machine, start: &Start) {
    let size = machine.memory_mib;
    let most = most_memory_mib(machine);
    let growth = if most > size {
        format!(",slots={MEMORY_SLOTS},maxmem={most}M")
    } else {
        String::new()
    };
    line.add("m", format!("size={size}M{growth}"));
    let backend = match start {
        Start::Boot { .. } => format!("memory-backend-memfd,id=memory,size={size}M,share=on"),
        Start::Template { memory, .. } | Start::Clone { memory, .. } => {
            let file = own_file(*memory);
            let share = match start {
                Start::Clone {
                    mode: CloneMode::CopyOnWrite,
                    ..
                } => "off",
                _ => "on",
            };
            format!("memory-backend-file,id=memory,size={size}M,mem-path={file},share={share}")
        }
    };
    line.add("object", backend);
}

/// Kernel and configuration. QEMU reads these once, by name, so that a descriptor is named as a file.
fn boot(line: &mut Line, machine: &Machine, host: &Host, descriptors: &Descriptors) {
    let (kernel, initramfs, ours) = match descriptors.start {
        Start::Boot {
            kernel,
            initramfs,
            ready_port,
        } => (kernel, initramfs, format!("{READY_PORT_ARGUMENT}={ready_port}")),
        Start::Template { kernel, initramfs, .. } => {
            let kind = if machine.configuration.is_some() {
                "own"
            } else {
                "plain"
            };
            let ours = format!("{ALONE_WITH_PORTS} {TEMPLATE_ARGUMENT}={kind}");
            (kernel, initramfs, ours)
        }
        // Its state comes when QEMU is told to load it, and it goes on when it is told to.
        Start::Clone { .. } => {
            line.add("incoming", "defer");
            line.flag("S");
            return ignition(line, machine, descriptors);
        }
    };
    line.add("kernel", own_file(kernel));
    line.add("initrd", own_file(initramfs));
    line.add("append", kernel_arguments(machine, host, ours));
    ignition(line, machine, descriptors);
}

fn ignition(line: &mut Line, machine: &Machine, descriptors: &Descriptors) {
    if let Ignition::FwCfg { descriptor } = descriptors.ignition {
        let file = own_file(descriptor);
        line.add("fw_cfg", format!("name={},file={file}", machine.guest.ignition_fw_cfg));
    }
}

/// The guest's own arguments, the launcher's, then the machine's, which thereby have the last word.
fn kernel_arguments(machine: &Machine, host: &Host, of_the_start: String) -> String {
    // With -no-reboot a panic thus ends QEMU at once, rather than leave a dead machine that looks alive.
    let mut ours = vec!["panic=-1".to_owned(), of_the_start];
    if host.acceleration == Acceleration::Tcg {
        // The kernel goes by the last of such arguments alone.
        let mut named = machine.guest.kernel_args.iter().chain(&machine.kernel_args);
        if !named.any(|argument| argument.starts_with(CLEARED_FEATURES)) {
            ours.push(format!("{CLEARED_FEATURES}{COPIES_BY_STRINGS}"));
        }
        if host.processor.counter_mhz.is_some() {
            ours.push(COUNTER_IS_CLOCK.to_owned());
        }
    }
    if matches!(machine.network, Network::User { .. }) {
        // dracut.cmdline(7). The agent gives the interface its address, but names are resolved by a file.
        ours.push(format!("nameserver={}", forward::NAME_SERVER));
    }
    if processors(machine) > machine.vcpus {
        ours.push(format!("maxcpus={}", machine.vcpus));
    }
    if most_memory_mib(machine) > machine.memory_mib {
        ours.push(NO_BOUNCE_BUFFERS.to_owned());
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

/// The monitor, the console, and what the guest needs of the host from the beginning.
fn console(line: &mut Line, descriptors: &Descriptors) {
    line.chardev("qmp", descriptors.qmp);
    line.add("mon", "chardev=qmp,mode=control");
    line.chardev("console", descriptors.console);
    line.add("serial", "chardev:console");
    line.add("device", "virtio-rng-pci,disable-legacy=on");
}

/// Where a clone is woken, what it has instead of devices that share memory, and where its devices come to be.
fn late(line: &mut Line, ports: Ports) {
    line.add("device", "virtio-serial-pci,id=ports,max_ports=4,disable-legacy=on");
    // The first port would be a console.
    let mut serial = |number: u32, port: &str, name: &str, connection: RawFd| {
        line.chardev(port, connection);
        line.add(
            "device",
            format!("virtserialport,bus=ports.0,nr={number},chardev={port},name={name}"),
        );
    };
    serial(1, "agent", AGENT_SERIAL_PORT, ports.agent);
    serial(2, "share", SHARE_SERIAL_PORT, ports.share);
    if let Some(Output { port, memory }) = ports.output {
        serial(3, "output", OUTPUT_SERIAL_PORT, port);
        let (size, file) = (output_window::SIZE, own_file(memory));
        line.add(
            "object",
            format!("memory-backend-file,id={WINDOW},size={size},mem-path={file},share=on"),
        );
        // Of the two that could have such memory it is the one that can be saved.
        line.add("device", format!("ivshmem-plain,memdev={WINDOW},master=on"));
    }
    devices::slots(line);
}

fn own_file(descriptor: RawFd) -> String {
    format!("/proc/self/fd/{descriptor}")
}

#[cfg(test)]
mod tests;
