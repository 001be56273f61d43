//! The shim's own logic: states, the order of events, clean-up. Tried with a machine and a guest that are made up; everything
//! between, the agent's protocol included, is what runs on a node.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    api::{CreateTaskRequest, ShutdownRequest, Status},
    events::task::{TaskExit, TaskStart},
    shim::event::Envelope,
    shim_async::Task,
};
use coreos_kvm_launcher::{machine::Machine, mountinfo};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use oci_spec::runtime::Spec;
use protobuf::Message;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use ttrpc::r#async::TtrpcContext;

use crate::{error::ShimError, events::Events, pod::Pod, podspec, service::Service, streams::Stdio};
use fake::{FakeHypervisor, FakeMachine, Guest, QEMU, Start};

mod calls;
mod failures;
mod fake;
mod lives;
mod sandboxes;
mod sizes;

const SOON: Duration = Duration::from_secs(10);
const SANDBOX: &str = "sandbox";

/// A pod on a node of its own folder.
struct Node {
    root: tempfile::TempDir,
    pod: Arc<Pod>,
    guest: Arc<Guest>,
    machine: Arc<FakeMachine>,
    events: mpsc::UnboundedReceiver<Envelope>,
    described: Arc<Mutex<Option<Machine>>>,
    removed: Arc<Mutex<Vec<String>>>,
}

/// Containers that a test leaves have mounts, and what is mounted cannot be removed.
impl Drop for Node {
    fn drop(&mut self) {
        for point in mountinfo::below(self.root.path(), &mountinfo::mounts().unwrap_or_default()) {
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

/// Runs `trial` in a folder that goes with it, on a thread with a mount namespace of its own, which takes all that is mounted with it.
pub(crate) fn in_own_mounts(trial: impl FnOnce(&Path) + Send + 'static) {
    let there = tempfile::tempdir().unwrap();
    let root = there.path().to_owned();
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        trial(&root);
    });
    thread.join().unwrap();
}

impl Node {
    async fn new() -> Self {
        Self::with(Start::Works).await
    }

    async fn with(start: impl FnOnce(Arc<FakeMachine>) -> Start) -> Self {
        let root = tempfile::tempdir().unwrap();
        let config = podspec::tests::config(root.path());
        let text = format!(
            "guests_dir = {:?}\nstate_dir = {:?}\n",
            config.guests_dir, config.state_dir
        );
        std::fs::write(root.path().join("config.toml"), text).unwrap();
        let guest = Arc::new(Guest::default());
        let machine = FakeMachine::new(root.path(), &guest).await;
        let (described, removed) = (Arc::default(), Arc::default());
        let hypervisor = FakeHypervisor {
            start: start(machine.clone()),
            described: Arc::clone(&described),
            removed: Arc::clone(&removed),
        };
        let (sink, events) = Events::queue("k8s.io");
        Self {
            pod: Arc::new(Pod::new(
                Box::new(hypervisor),
                None,
                sink,
                Some(root.path().join("config.toml")),
            )),
            root,
            guest,
            machine,
            events,
            described,
            removed,
        }
    }

    /// The request to create a container whose specification is that of [`podspec::tests::spec`] with `annotations`.
    fn request(&self, id: &str, annotations: Value) -> CreateTaskRequest {
        let bundle = self.root.path().join(id);
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec: Spec = podspec::tests::spec(annotations);
        std::fs::write(bundle.join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.to_str().unwrap().to_owned(),
            options: Some(options(&self.root.path().join("config.toml"))).into(),
            ..Default::default()
        }
    }

    fn sandbox_request(&self) -> CreateTaskRequest {
        self.request(SANDBOX, json!({"io.kubernetes.cri.container-type": "sandbox"}))
    }

    fn container_request(&self, id: &str) -> CreateTaskRequest {
        self.request(
            id,
            json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": SANDBOX}),
        )
    }

    async fn run_sandbox(&mut self) {
        self.pod.create(&self.sandbox_request()).await.unwrap();
        self.pod.container(SANDBOX).unwrap().start("").await.unwrap();
        assert_eq!(self.events(2).await, ["create sandbox", "start sandbox"]);
    }

    async fn run(&mut self, id: &str) {
        self.pod.create(&self.container_request(id)).await.unwrap();
        self.pod.container(id).unwrap().start("").await.unwrap();
        assert_eq!(self.events(2).await, [format!("create {id}"), format!("start {id}")]);
    }

    async fn exec(&mut self, id: &str, exec: &str) {
        let container = self.pod.container(id).unwrap();
        container.exec(exec, b"{}".to_vec(), Stdio::default()).await.unwrap();
        container.start(exec).await.unwrap();
        let name = format!("{id}/{exec}");
        assert_eq!(
            self.events(2).await,
            [format!("exec-added {name}"), format!("exec-started {name}")]
        );
    }

    /// The next events, in words: `exit c1/e1 0`.
    async fn events(&mut self, count: usize) -> Vec<String> {
        let mut events = Vec::new();
        while events.len() < count {
            let event = timeout(SOON, self.events.recv()).await;
            let event = event
                .unwrap_or_else(|_| panic!("after {events:?} nothing followed"))
                .unwrap();
            events.push(words(&event));
        }
        events
    }

    /// Does `call` until the guest has been asked to do `what`, and then goes away, as a client does whose time is over.
    async fn give_up_after<T>(&self, what: &str, call: impl Future<Output = ttrpc::Result<T>>) {
        tokio::select! {
            _ = call => panic!("the call is answered"),
            () = self.guest_is_asked_to(what) => {}
        }
    }

    async fn guest_is_asked_to(&self, what: &str) {
        until(|| self.guest.calls.lock().unwrap().iter().any(|call| call == what)).await;
    }

    fn no_more_events(&mut self) {
        if let Ok(event) = self.events.try_recv() {
            panic!("there is one event more: {}", words(&event));
        }
    }

    fn mounts(&self) -> Vec<String> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let root = self.root.path().to_str().unwrap();
        mounts
            .lines()
            .filter(|line| line.contains(root))
            .map(str::to_owned)
            .collect()
    }
}

fn options(config: &Path) -> protobuf::well_known_types::any::Any {
    // Field 2 of runtimeoptions.v1.Options, config_path.
    let path = config.to_str().unwrap().as_bytes();
    let mut value = vec![0x12, u8::try_from(path.len()).unwrap()];
    value.extend_from_slice(path);
    protobuf::well_known_types::any::Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value,
        ..Default::default()
    }
}

fn words(envelope: &Envelope) -> String {
    use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskOOM};

    assert_eq!(envelope.namespace, "k8s.io");
    let value = envelope.event.value.as_slice();
    let name = |container: &str, id: &str| match id {
        id if id.is_empty() || id == container => container.to_owned(),
        id => format!("{container}/{id}"),
    };
    match envelope.topic.as_str() {
        "/tasks/create" => {
            let event = TaskCreate::parse_from_bytes(value).unwrap();
            assert_eq!(event.pid, QEMU);
            format!("create {}", event.container_id)
        }
        "/tasks/start" => format!("start {}", TaskStart::parse_from_bytes(value).unwrap().container_id),
        "/tasks/exec-added" => {
            let event = TaskExecAdded::parse_from_bytes(value).unwrap();
            format!("exec-added {}", name(&event.container_id, &event.exec_id))
        }
        "/tasks/exec-started" => {
            let event = TaskExecStarted::parse_from_bytes(value).unwrap();
            format!("exec-started {}", name(&event.container_id, &event.exec_id))
        }
        "/tasks/oom" => format!("oom {}", TaskOOM::parse_from_bytes(value).unwrap().container_id),
        "/tasks/exit" => {
            let event = TaskExit::parse_from_bytes(value).unwrap();
            assert!(event.exited_at.seconds > 0);
            format!("exit {} {}", name(&event.container_id, &event.id), event.exit_status)
        }
        "/tasks/delete" => {
            let event = TaskDelete::parse_from_bytes(value).unwrap();
            format!("delete {} {}", event.container_id, event.exit_status)
        }
        topic => panic!("an event of the topic {topic}"),
    }
}

async fn until(mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, waiting).await.unwrap();
}

fn fifo(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    path
}

fn context() -> TtrpcContext {
    TtrpcContext {
        mh: ttrpc::MessageHeader::default(),
        metadata: HashMap::default(),
        timeout_nano: 0,
        connection_data: Arc::default(),
    }
}
