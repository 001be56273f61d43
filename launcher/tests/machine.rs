//! A real machine on the reference guest. What these tests need is built by `devtool`; they fail where it is missing.
//!
//! Places, unless the environment names others: COREOS_KVM_GUESTS, the folder of guests (in the cache of devtool);
//! COREOS_KVM_AGENT_DISK, the disk with the agent (in cargo's target folder); COREOS_KVM_TOOLS, the folder with virtiofsd
//! and vhost-device-vsock (in the cache of devtool).

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use coreos_kvm_launcher::{
    accel::AccelerationChoice,
    agent::{AgentClient, ProcessName},
    config::Config,
    guest::Guest,
    machine::{Machine, Network},
    state::{ProcessId, StateDir},
    vm::{self, Vm, VmError},
};
use coreos_kvm_proto::{GUEST_CONTAINER_ID, agent::Streams};
use nix::sys::signal::Signal;
use tokio::sync::{Mutex, MutexGuard};

/// One machine at a time: each has a processor for itself while it boots.
static TURN: Mutex<()> = Mutex::const_new(());

struct Place {
    config: Config,
    root: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Place {
    async fn new() -> Self {
        let turn = TURN.lock().await;
        assert!(nix::unistd::geteuid().is_root(), "machines are started by root");
        let cache =
            std::env::var_os("KUBECEPTION_CACHE").map_or_else(|| "/var/cache/kubeception".into(), PathBuf::from);
        let place = |variable: &str, default: PathBuf, advice: &str| {
            let path = std::env::var_os(variable).map_or(default, PathBuf::from);
            assert!(
                path.exists(),
                "{} is missing: {advice} makes it, or {variable} names another",
                path.display()
            );
            path
        };
        let tools = place("COREOS_KVM_TOOLS", cache.join("tools/bin"), "`devtool setup`");
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/x86_64-unknown-linux-gnu/release");
        let root = tempfile::tempdir().unwrap();
        let config = Config {
            guests_dir: place("COREOS_KVM_GUESTS", cache.join("guests"), "`devtool image`"),
            agent_disk: place("COREOS_KVM_AGENT_DISK", target.join("agent.erofs"), "`devtool test`"),
            state_dir: root.path().join("state"),
            virtiofsd: tools.join("virtiofsd"),
            vhost_device_vsock: tools.join("vhost-device-vsock"),
            ..Config::default()
        };
        Self {
            config,
            root,
            _turn: turn,
        }
    }

    fn machine(&self, name: &str) -> Machine {
        Machine {
            id: name.parse().unwrap(),
            guest: Guest::load(&self.config.guests_dir, &self.config.guest).unwrap(),
            vcpus: 1,
            memory_mib: 512,
            acceleration: AccelerationChoice::Auto,
            ignition: None,
            kernel_args: Vec::new(),
            network: Network::None,
            cgroup: Some(format!("coreos-kvm-test-{}-{name}", std::process::id()).into()),
            boot_timeout: Duration::from_secs(120),
        }
    }

    fn assert_nothing_is_left(&self, machine: &Machine) {
        let state = StateDir::of(&self.config.state_dir, &machine.id);
        assert!(!state.path().exists(), "{} is left", state.path().display());
        let uids = self.config.state_dir.join(".uids");
        let taken: Vec<_> = std::fs::read_dir(uids).into_iter().flatten().flatten().collect();
        assert!(taken.is_empty(), "users are left: {taken:?}");
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.root.path().to_str().unwrap()), "{mounts}");
        let cgroup = machine.cgroup.as_ref().unwrap();
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let path = hierarchy.path().join(cgroup);
            assert!(!path.exists(), "{} is left", path.display());
        }
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            let command = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command);
            assert!(
                !command.contains(self.root.path().to_str().unwrap()),
                "{command} is left"
            );
        }
    }
}

/// What a command in the guest's own namespaces prints, and its exit code.
async fn run(agent: &AgentClient, command: &[&str]) -> (String, u32) {
    let name = ProcessName {
        container_id: GUEST_CONTAINER_ID,
        exec_id: "test",
    };
    let process = serde_json::json!({ "args": command, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/usr/bin:/usr/sbin"] });
    let streams = Streams {
        stdout: true,
        ..Default::default()
    };
    agent
        .create_guest_exec("test", process.to_string().into_bytes(), streams)
        .await
        .unwrap();
    let mut stdout = agent.output(name, false).await.unwrap();
    agent.start_process(name).await.unwrap();
    let mut text = Vec::new();
    while let Some(bytes) = stdout.next().await.unwrap() {
        text.extend_from_slice(bytes);
    }
    let exit = agent.wait_process(name).await.unwrap();
    agent.delete_process(name).await.unwrap();
    (String::from_utf8(text).unwrap(), exit.status)
}

#[tokio::test]
async fn a_machine_boots_by_the_users_ignition_and_leaves_nothing_behind() {
    let place = Place::new().await;
    let ignition = r#"{"ignition": {"version": "3.3.0"}, "storage": {"files": [
        {"path": "/etc/greeting", "contents": {"source": "data:,hello%20machine"}}]}}"#;
    let machine = Machine {
        ignition: Some(ignition.to_owned()),
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
