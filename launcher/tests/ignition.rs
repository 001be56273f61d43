//! Ignition in the reference guest: what a configuration asks for is there when the agent answers, and a configuration that
//! fails in the guest ends the machine with Ignition's own words. Four boots in all.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::time::{Duration, Instant};

use base64::Engine;
use common::{Place, run};
use coreos_kvm_launcher::{
    machine::Machine,
    vm::{Vm, VmError},
};
use serde_json::json;

/// What a guest may take to fail, on a busy machine without KVM.
const FAILS_WITHIN: Duration = Duration::from_secs(90);

#[tokio::test]
async fn files_users_and_units_of_the_configuration_are_there() {
    let place = Place::new().await;
    let ignition = json!({
        "ignition": { "version": "3.3.0" },
        "passwd": {
            "groups": [{ "name": "team", "gid": 1500 }],
            "users": [
                { "name": "core", "sshAuthorizedKeys": ["ssh-ed25519 AAAA a-key"] },
                { "name": "alice", "uid": 1501, "primaryGroup": "team", "groups": ["sudo", "docker"] },
            ],
        },
        "storage": {
            "directories": [{ "path": "/opt/work", "mode": 0o750, "user": { "name": "alice" }, "group": { "name": "team" } }],
            "files": [{ "path": "/opt/work/greeting", "mode": 0o640, "contents": { "source": "data:,hello" } }],
            "links": [{ "path": "/opt/link", "target": "/opt/work/greeting" }],
        },
        "systemd": { "units": [
            {
                "name": "greet.service",
                "enabled": true,
                "contents": "[Service]\nType=oneshot\nExecStart=cp /opt/link /run/greeted\n[Install]\nWantedBy=multi-user.target\n",
                "dropins": [{ "name": "10-more.conf", "contents": "[Service]\nExecStart=cp /opt/link /run/greeted-again\n" }],
            },
            { "name": "at@.service", "contents": "[Service]\nType=oneshot\nExecStart=touch /run/at-%i\n[Install]\nWantedBy=multi-user.target\n" },
            { "name": "at@once.service", "enabled": true },
            { "name": "systemd-logind.service", "mask": true },
            { "name": "of-another-system.service", "enabled": true, "dropins": [{ "name": "10-more.conf", "contents": "[Service]\nNice=5\n" }] },
        ] },
    });
    let machine = Machine {
        configuration: Some(common::configuration(ignition.to_string())),
        ..place.machine("ignition")
    };
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();

    // The agent answers before the last unit has started.
    let (state, _) = run(vm.agent(), &["systemctl", "is-system-running", "--wait"]).await;
    assert_eq!(state, "running\n", "no unit fails");
    for (command, expected) in [
        ("stat -c '%U %G %a' / /opt/work", "root root 755\nalice team 750\n"),
        ("stat -c %a /opt/work/greeting", "640\n"),
        ("readlink /opt/link", "/opt/work/greeting\n"),
        ("cat /run/greeted /run/greeted-again", "hellohello"),
        ("ls /run/at-once", "/run/at-once\n"),
        ("systemctl is-enabled systemd-logind.service", "masked\n"),
        ("id -Gn alice", "team sudo docker\n"),
        (
            "cat /home/core/.ssh/authorized_keys.d/ignition",
            "ssh-ed25519 AAAA a-key\n",
        ),
        ("su core -c 'sudo -n id -u'", "0\n"),
    ] {
        let (printed, status) = run(vm.agent(), &["sh", "-c", command]).await;
        assert_eq!(printed, expected, "{command} ends with {status}");
    }
    vm.shutdown(Duration::from_secs(30)).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_configuration_in_whose_place_comes_another_has_its_file_and_the_agent() {
    let place = Place::new().await;
    let file = json!({ "path": "/etc/replaced", "contents": { "source": "data:,yes" } });
    let other = json!({ "ignition": { "version": "3.2.0" }, "storage": { "files": [file] } }).to_string();
    let source = format!("data:;base64,{}", base64::prelude::BASE64_STANDARD.encode(other));
    let ignition = json!({ "ignition": { "version": "3.3.0", "config": { "replace": { "source": source } } } });
    let machine = Machine {
        configuration: Some(common::configuration(ignition.to_string())),
        ..place.machine("replace")
    };
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    assert_eq!(run(vm.agent(), &["cat", "/etc/replaced"]).await.0, "yes");
    vm.shutdown(Duration::from_secs(30)).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_file_of_nobody_ends_the_boot() {
    let file =
        json!({ "path": "/etc/secret", "user": { "name": "stranger" }, "contents": { "source": "data:,a-secret" } });
    let text = failure("owner", json!({ "files": [file] })).await;
    assert!(text.contains("Ignition failed: failed to create files"), "{text}");
    assert!(text.contains("/etc/secret: failed to determine correct uid"), "{text}");
    assert!(
        text.contains("guest does not start: Ignition's stage files failed"),
        "{text}"
    );
    assert!(
        !text.contains("a-secret"),
        "the console does not quote the configuration: {text}"
    );
}

#[tokio::test]
async fn a_disk_that_is_not_there_ends_the_boot() {
    let disk = json!({ "device": "/dev/disk/by-id/virtio-absent", "wipeTable": true });
    let text = failure("disk", json!({ "disks": [disk] })).await;
    assert!(text.contains("virtio-absent"), "{text}");
    assert!(
        text.contains("guest does not start: Ignition's stage disks failed"),
        "{text}"
    );
}

/// The error of a machine whose Ignition fails on `storage`.
async fn failure(name: &str, storage: serde_json::Value) -> String {
    let place = Place::new().await;
    let ignition = json!({ "ignition": { "version": "3.3.0" }, "storage": storage });
    let machine = Machine {
        configuration: Some(common::configuration(ignition.to_string())),
        ..place.machine(name)
    };
    let begin = Instant::now();
    let error = Vm::start(&place.config, machine.clone()).await.err().unwrap();
    assert!(begin.elapsed() < FAILS_WITHIN, "after {:?}: {error}", begin.elapsed());
    assert!(matches!(error, VmError::Ended { .. }), "{error}");
    place.assert_nothing_is_left(&machine);
    error.to_string()
}
