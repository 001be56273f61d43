//! A real machine on the reference guest: how it comes up, and all the ways in which it ends.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::time::Duration;

use common::{Place, run};
use coreos_kvm_launcher::{
    machine::Machine,
    state::{ProcessId, StateDir},
    vm::{self, Vm, VmError},
};
use nix::sys::signal::Signal;

#[tokio::test]
async fn a_machine_boots_by_the_users_ignition_and_leaves_nothing_behind() {
    let place = Place::new().await;
    let ignition = r#"{"ignition": {"version": "3.3.0"}, "storage": {"files": [
        {"path": "/etc/greeting", "contents": {"source": "data:,hello%20machine"}}]}}"#;
    let machine = Machine {
        configuration: Some(common::configuration(ignition.to_owned())),
        ..place.machine("boots")
    };
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();

    assert_eq!(
        run(vm.agent(), &["cat", "/etc/greeting"]).await,
        ("hello machine".to_owned(), 0)
    );
    assert_eq!(run(vm.agent(), &["sh", "-c", "exit 7"]).await, (String::new(), 7));
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(
        run(vm.agent(), &["uname", "-r"]).await.0,
        host,
        "the guest has a kernel of its own"
    );

    // What makes the wall: QEMU has no rights, and its configuration is nowhere to be read.
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.pid())).unwrap();
    let uid = vm.info().record.uid.unwrap();
    assert!(
        status.contains(&format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}")) && status.contains("NoNewPrivs:\t1"),
        "{status}"
    );
    assert!(
        status.contains("CapEff:\t0000000000000000") && status.contains("Seccomp:\t2"),
        "{status}"
    );
    let command = std::fs::read(format!("/proc/{}/cmdline", vm.pid())).unwrap();
    assert!(!String::from_utf8_lossy(&command).contains("hello"));

    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    vm.shutdown(Duration::from_secs(30)).await.unwrap();
    let exit = vm.exited().await;
    assert_eq!(
        (exit.reason.as_str(), exit.orderly),
        ("the guest powered off", true),
        "{exit:?}"
    );
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_guest_that_never_comes_up_fails_at_its_time_out_and_leaves_nothing_behind() {
    let place = Place::new().await;
    let machine = Machine {
        boot_timeout: Duration::from_secs(3),
        ..place.machine("silent")
    };
    let error = Vm::start(&place.config, machine.clone()).await.err().unwrap();
    assert!(matches!(error, VmError::Timeout { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.starts_with("the guest did not come up within 3 s; its console's last lines: SeaBIOS"),
        "{text}"
    );
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_guest_that_panics_at_boot_is_told_at_once() {
    let place = Place::new().await;
    let kernel_args = ["rdinit=/nonexistent", "root=/dev/nonexistent", "loglevel=4"]
        .map(str::to_owned)
        .to_vec();
    let machine = Machine {
        kernel_args,
        ..place.machine("panics")
    };
    let error = Vm::start(&place.config, machine.clone()).await.err().unwrap();
    assert!(matches!(error, VmError::Ended { .. }), "{error}");
    assert!(error.to_string().contains("panic"), "{error}");
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_start_that_nobody_waits_for_any_more_is_undone() {
    let place = Place::new().await;
    let machine = place.machine("dropped");
    let given_up = tokio::time::timeout(Duration::from_millis(1500), Vm::start(&place.config, machine.clone())).await;
    assert!(given_up.is_err(), "no guest is up by then");
    let state = StateDir::of(&place.config.state_dir, &machine.id);
    let gone = async {
        while state.path().exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_machine_does_not_outlive_its_helpers() {
    let place = Place::new().await;
    let machine = place.machine("helpless");
    let state = StateDir::of(&place.config.state_dir, &machine.id);
    let kill = async {
        // Once the guest prints, QEMU and virtiofsd have found each other.
        while !std::fs::metadata(state.console()).is_ok_and(|log| log.len() > 0) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let helpers = state.read().unwrap().unwrap().helpers;
        helpers
            .iter()
            .find(|helper| helper.name == "virtiofsd")
            .unwrap()
            .process
            .signal(Signal::SIGKILL)
            .unwrap()
    };
    let (start, _) = tokio::join!(Vm::start(&place.config, machine.clone()), kill);
    let error = start.err().unwrap();
    assert!(matches!(error, VmError::Ended { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("virtiofsd, which serves the guest, ended unexpectedly"),
        "{error}"
    );
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn what_a_dead_launcher_left_is_removed_from_its_record_alone() {
    let place = Place::new().await;
    let machine = place.machine("orphan");
    let state = StateDir::of(&place.config.state_dir, &machine.id);
    let start = Vm::start(&place.config, machine.clone());
    let qemu = async {
        loop {
            if let Some(qemu) = state.read().unwrap().and_then(|record| record.qemu) {
                return qemu;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    // Killed from outside while it boots: the start fails by itself, and there is nothing that destroying could miss.
    let qemu: ProcessId = tokio::select! {
        _ = start => panic!("it cannot be up before QEMU is"),
        qemu = qemu => qemu,
    };
    vm::destroy(&place.config.state_dir, &machine.id).await.unwrap();
    vm::destroy(&place.config.state_dir, &machine.id).await.unwrap();
    assert!(!qemu.is_alive());
    place.assert_nothing_is_left(&machine);
}
