use super::*;
use crate::accel::Processor;
use crate::qemu::devices::{Tap, Vsock};
use crate::{
    disk::Disk,
    guest::DiskFormat,
    mac::Mac,
    machine::{Configuration, Growth, tests::machine},
    size::Size,
};

fn descriptors() -> Descriptors {
    Descriptors {
        start: Start::Boot {
            kernel: 10,
            initramfs: 11,
            ready_port: 1026,
        },
        ignition: Ignition::FwCfg { descriptor: 12 },
        root: 13,
        agent_disk: 14,
        data_disk: None,
        qmp: 15,
        console: 16,
        connections: Connections {
            vsock: Some(Vsock::VhostUser { connection: 17 }),
            shared: Some(18),
            taps: Vec::new(),
        },
    }
}

fn host(acceleration: Acceleration, steady_counter: bool) -> Host {
    Host {
        acceleration,
        processor: Processor {
            identity: String::new(),
            counter_mhz: steady_counter.then_some(2100),
        },
    }
}

/// One option with its value a line.
fn lines(machine: &Machine, acceleration: Acceleration, descriptors: &Descriptors) -> String {
    text(machine, &host(acceleration, true), descriptors)
}

fn text(machine: &Machine, host: &Host, descriptors: &Descriptors) -> String {
    let mut text = String::new();
    for argument in arguments(machine, host, descriptors) {
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
    let tap = |descriptor, vhost, last| Tap {
        descriptor,
        vhost,
        mac: Mac([2, 0, 0, 0, 0, last]),
        mtu: 1450,
    };
    let descriptors = Descriptors {
        connections: Connections {
            vsock: Some(Vsock::Vhost {
                descriptor: 17,
                cid: 4711,
            }),
            taps: vec![tap(20, Some(21), 1), tap(22, None, 2)],
            ..descriptors().connections
        },
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
fn a_machine_that_can_grow_has_room_for_it() {
    let machine = Machine {
        growth: Some(Growth {
            vcpus: 8,
            memory_mib: 2000,
        }),
        ..machine()
    };
    let lines = lines(&machine, Acceleration::Tcg, &descriptors());
    assert!(lines.contains("-smp cpus=8\n"), "{lines}");
    assert!(lines.contains(" maxcpus=1 swiotlb=noforce"), "{lines}");
    assert!(lines.contains("tb-size=78\n"), "{lines}");
    assert!(lines.contains("-m size=512M,slots=5,maxmem=2048M"), "{lines}");
}

#[test]
fn a_counter_that_changes_its_pace_is_no_clock() {
    let has = |host| text(&machine(), &host, &descriptors()).contains(COUNTER_IS_CLOCK);
    assert!(has(host(Acceleration::Tcg, true)));
    assert!(!has(host(Acceleration::Tcg, false)));
    // Under KVM the guest has a better one.
    assert!(!has(host(Acceleration::Kvm, true)));
}

#[test]
fn features_that_a_machine_has_its_kernel_leave_are_the_only_ones() {
    let machine = Machine {
        kernel_args: vec!["clearcpuid=avx".to_owned()],
        ..machine()
    };
    let lines = lines(&machine, Acceleration::Tcg, &descriptors());
    assert_eq!(lines.matches("clearcpuid=").count(), 1, "{lines}");
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

const PORTS: Ports = Ports {
    agent: 32,
    share: 33,
    output: Some(Output { port: 34, memory: 35 }),
};

#[test]
fn a_template_boots_with_a_tap_that_leads_nowhere() {
    let descriptors = Descriptors {
        start: Start::Template {
            kernel: 10,
            initramfs: 11,
            memory: 12,
            ports: PORTS,
        },
        connections: Connections {
            taps: vec![Tap::of_template(19, None)],
            ..Connections::default()
        },
        ..descriptors()
    };
    insta::assert_snapshot!(lines(&machine(), Acceleration::Tcg, &descriptors));
}

#[test]
fn a_clone_has_the_devices_of_its_template_and_waits_for_its_state() {
    let descriptors = Descriptors {
        start: Start::Clone {
            memory: 12,
            mode: CloneMode::Copy,
            ports: PORTS,
        },
        connections: Connections {
            taps: vec![Tap::of_template(19, None)],
            ..descriptors().connections
        },
        ..descriptors()
    };
    insta::assert_snapshot!(lines(&machine(), Acceleration::Tcg, &descriptors));
}

#[test]
fn a_clone_that_shares_memory_maps_it_for_itself() {
    let clone = |mode| {
        let descriptors = Descriptors {
            start: Start::Clone {
                memory: 12,
                mode,
                ports: PORTS,
            },
            connections: Connections::default(),
            ..descriptors()
        };
        lines(&machine(), Acceleration::Tcg, &descriptors)
    };
    let copy = clone(CloneMode::Copy);
    assert_eq!(
        copy.replace("/fd/12,share=on", "/fd/12,share=off"),
        clone(CloneMode::CopyOnWrite)
    );
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
