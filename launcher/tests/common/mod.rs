//! Real machines on the reference guest. What these tests need is built by `devtool`; they fail where it is missing.
//!
//! Places, unless the environment names others: COREOS_KVM_GUESTS, the folder of guests (in the cache of devtool);
//! COREOS_KVM_AGENT_DISK, the disk with the agent (in cargo's target folder); COREOS_KVM_TOOLS, the folder with virtiofsd
//! and vhost-device-vsock (in the cache of devtool).

// Each test program uses the part that it needs; a test that cannot go on fails.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::{
    path::{Path, PathBuf},
    sync::LazyLock,
    time::Duration,
};

use coreos_kvm_launcher::{
    accel::AccelerationChoice,
    agent::{AgentClient, ProcessName},
    config::{CloneModeChoice, Config},
    guest::Guest,
    machine::{Configuration, Machine, Network},
    state::{self, StateDir},
    vm,
};
use coreos_kvm_proto::{GUEST_CONTAINER_ID, agent::Streams};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Where `devtool` keeps what it has made.
pub fn cache() -> PathBuf {
    std::env::var_os("KUBECEPTION_CACHE").map_or_else(|| "/var/cache/kubeception".into(), PathBuf::from)
}

/// The path that `variable` names, else `default`; `advice` makes the latter.
pub fn present(variable: &str, default: PathBuf, advice: &str) -> PathBuf {
    let path = std::env::var_os(variable).map_or(default, PathBuf::from);
    assert!(
        path.exists(),
        "{} is missing: {advice} makes it, or {variable} names another",
        path.display()
    );
    path
}

/// A program that is a script. Another process writes it: one that this process starts meanwhile would have it open for writing, and what is
/// cannot be executed (execve(2), ETXTBSY).
pub fn script(path: &Path, text: &str) {
    let write = "printf %s \"$1\" >\"$0\" && chmod 755 \"$0\"";
    let status = std::process::Command::new("sh")
        .arg("-c")
        .arg(write)
        .arg(path)
        .arg(text)
        .status();
    assert!(status.unwrap().success());
}

pub mod clones;
pub mod container;
pub mod spec;

pub fn configuration(text: String) -> Configuration {
    Configuration {
        origin: "the test's configuration".to_owned(),
        text,
    }
}

/// As many at a time as there are processors: a machine that boots keeps one busy.
static TURNS: LazyLock<Turns> = LazyLock::new(|| {
    let processors = std::thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap());
    Turns {
        free: Semaphore::new(processors as usize),
        all: processors,
    }
});

struct Turns {
    free: Semaphore,
    all: u32,
}

pub struct Place {
    pub config: Config,
    root: tempfile::TempDir,
    _turn: SemaphorePermit<'static>,
}

impl Place {
    pub async fn new() -> Self {
        Self::of(CloneModeChoice::CopyOnWrite).await
    }

    /// One whose clones come to their memory in that way.
    pub async fn of(clone_mode: CloneModeChoice) -> Self {
        Self::with(clone_mode, TURNS.free.acquire().await.unwrap())
    }

    /// The same with all processors to itself: for many machines at once.
    pub async fn alone(clone_mode: CloneModeChoice) -> Self {
        Self::with(clone_mode, TURNS.free.acquire_many(TURNS.all).await.unwrap())
    }

    fn with(clone_mode: CloneModeChoice, turn: SemaphorePermit<'static>) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "machines are started by root");
        let tools = present("COREOS_KVM_TOOLS", cache().join("tools/bin"), "`devtool setup`");
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/x86_64-unknown-linux-gnu/release");
        let root = tempfile::tempdir().unwrap();
        let config = Config {
            guests_dir: present("COREOS_KVM_GUESTS", cache().join("guests"), "`devtool image`"),
            agent_disk: present("COREOS_KVM_AGENT_DISK", target.join("agent.erofs"), "`devtool test`"),
            state_dir: root.path().join("state"),
            template_dir: root.path().join("templates"),
            virtiofsd: tools.join("virtiofsd"),
            vhost_device_vsock: tools.join("vhost-device-vsock"),
            share_server: present("COREOS_KVM_SHARE", target.join("coreos-kvm-share"), "`devtool test`"),
            clone_mode,
            ..Config::default()
        };
        Self {
            config,
            root,
            _turn: turn,
        }
    }

    /// No other place has the same.
    pub fn name(&self) -> String {
        let name = self.root.path().file_name().unwrap().to_str().unwrap();
        name.trim_start_matches('.').to_owned()
    }

    pub fn machine(&self, name: &str) -> Machine {
        Machine {
            id: name.parse().unwrap(),
            guest: Guest::load(&self.config.guests_dir, &self.config.guest).unwrap(),
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
            // Two tests may give their machines the same name.
            cgroup: Some(format!("coreos-kvm-test-{}-{name}", self.name()).into()),
            boot_timeout: Duration::from_secs(120),
            cloneable: false,
        }
    }

    pub fn assert_nothing_is_left(&self, machine: &Machine) {
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

/// A test that fails leaves machines behind.
impl Drop for Place {
    fn drop(&mut self) {
        let state_dir = self.config.state_dir.clone();
        let destroy = move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            for id in state::machines(&state_dir).unwrap_or_default() {
                if let Err(error) = runtime.block_on(vm::destroy(&state_dir, &id)) {
                    eprintln!("{error}");
                }
            }
        };
        // A runtime cannot be waited for inside another.
        let _ = std::thread::spawn(destroy).join();
    }
}

/// What a command in the guest's own namespaces prints, and its exit code.
pub async fn run(agent: &AgentClient, command: &[&str]) -> (String, u32) {
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
