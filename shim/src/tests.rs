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
use coreos_kvm_launcher::machine::Machine;
use oci_spec::runtime::Spec;
use protobuf::Message;
use serde_json::{Value, json};
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use ttrpc::r#async::TtrpcContext;

use crate::{error::ShimError, events::Events, pod::Pod, podspec, service::Service, streams::Stdio};
use fake::{FakeHypervisor, FakeMachine, Guest, QEMU, Start};

mod fake;

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
            pod: Arc::new(Pod::new(Box::new(hypervisor), None, sink)),
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

#[tokio::test]
async fn a_sandbox_is_a_machine_whose_guest_is_made_the_pods() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    let machine = node.described.lock().unwrap().clone().unwrap();
    assert_eq!((machine.id.as_str(), machine.memory_mib), (SANDBOX, 512));
    let told = node.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!(
        (told.hostname.as_str(), told.shared_tag.as_str()),
        ("web-0", "coreos-kvm")
    );
    // Its image's process is not run.
    assert_eq!(*node.guest.calls.lock().unwrap(), ["configure sandbox"]);
    assert_eq!(node.mounts(), Vec::<String>::new());
}

#[tokio::test]
async fn the_life_of_a_container_is_told_in_order() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.exec("c1", "e1").await;
    node.guest.end("c1", "e1", 6);
    assert_eq!(node.events(1).await, ["exit c1/e1 6"]);
    assert_eq!(node.pod.delete("c1", "e1").await.unwrap().0.status, 6);
    node.guest.end("c1", "", 0);
    assert_eq!(node.events(1).await, ["exit c1 0"]);
    assert_eq!(node.pod.delete("c1", "").await.unwrap().0.status, 0);
    assert_eq!(node.events(1).await, ["delete c1 0"]);
    node.no_more_events();
    assert!(matches!(node.pod.delete("c1", "").await, Err(ShimError::NotFound(_))));
}

#[tokio::test]
async fn the_start_is_told_before_the_end_even_if_the_end_overtakes_it() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    *node.guest.ends_at_once.lock().unwrap() = true;
    node.pod.create(&node.container_request("c1")).await.unwrap();
    node.pod.container("c1").unwrap().start("").await.unwrap();
    assert_eq!(node.events(3).await, ["create c1", "start c1", "exit c1 3"]);
}

#[tokio::test]
async fn the_inits_end_comes_after_those_of_its_execs_and_no_exec_follows() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.exec("c1", "e1").await;
    node.guest.end("c1", "", 1);
    let container = node.pod.container("c1").unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    node.no_more_events();
    node.guest.end("c1", "e1", 137);
    assert_eq!(node.events(2).await, ["exit c1/e1 137", "exit c1 1"]);
    let refused = container.exec("e2", b"{}".to_vec(), Stdio::default()).await;
    assert!(matches!(refused, Err(ShimError::FailedPrecondition(_))));
}

#[tokio::test]
async fn the_inits_end_comes_after_that_of_an_exec_that_is_just_being_started() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    let container = node.pod.container("c1").unwrap();
    container.exec("e1", b"{}".to_vec(), Stdio::default()).await.unwrap();
    node.guest.held.send_replace("start");
    let starting = tokio::spawn(async move { container.start("e1").await });
    node.guest_is_asked_to("start c1/e1").await;
    node.guest.end("c1", "", 1);
    node.guest.end("c1", "e1", 137);
    // Long enough for the news of the init's end to overtake the answer.
    tokio::time::sleep(Duration::from_millis(50)).await;
    node.guest.held.send_replace("");
    starting.await.unwrap().unwrap();
    assert_eq!(
        node.events(4).await,
        ["exec-added c1/e1", "exec-started c1/e1", "exit c1/e1 137", "exit c1 1"]
    );
}

#[tokio::test]
async fn a_process_that_is_prepared_while_its_container_ends_is_taken_back() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    let container = node.pod.container("c1").unwrap();
    node.guest.held.send_replace("exec");
    let preparing = tokio::spawn(async move { container.exec("e1", b"{}".to_vec(), Stdio::default()).await });
    node.guest_is_asked_to("exec c1/e1").await;
    node.guest.end("c1", "", 0);
    assert_eq!(node.events(1).await, ["exit c1 0"]);
    node.guest.held.send_replace("");
    assert!(matches!(
        preparing.await.unwrap(),
        Err(ShimError::FailedPrecondition(_))
    ));
    node.guest_is_asked_to("delete c1/e1").await;
    node.no_more_events();
    let container = node.pod.container("c1").unwrap();
    assert!(matches!(container.process("e1"), Err(ShimError::NotFound(_))));
}

#[tokio::test]
async fn a_kill_for_want_of_memory_is_told_before_the_end() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.guest.end_for_want_of_memory("c1");
    assert_eq!(node.events(2).await, ["oom c1", "exit c1 137"]);
}

#[tokio::test]
async fn the_machines_end_is_that_of_everything_in_it_and_the_sandboxs_comes_last() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.exec("c1", "e1").await;
    node.pod.create(&node.container_request("c2")).await.unwrap();
    assert_eq!(node.events(1).await, ["create c2"]);
    node.machine.die("QEMU was killed by signal 9", false).await;
    let mut ends = node.events(4).await;
    assert_eq!(ends.pop().unwrap(), "exit sandbox 137");
    let place = |name: &str| ends.iter().position(|end| end == name).unwrap();
    assert!(place("exit c1/e1 137") < place("exit c1 137"));
    place("exit c2 137");
    // Everything can be deleted without the guest.
    for id in ["c1", "c2", SANDBOX] {
        assert_eq!(node.pod.delete(id, "").await.unwrap().0.status, 137);
    }
    assert_eq!(
        node.events(3).await,
        ["delete c1 137", "delete c2 137", "delete sandbox 137"]
    );
    node.no_more_events();
    assert_eq!(node.mounts(), Vec::<String>::new());
}

#[tokio::test]
async fn a_machine_that_powers_itself_off_has_done_its_work() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.machine.die("the guest powered off", true).await;
    assert_eq!(node.events(1).await, ["exit sandbox 0"]);
}

#[tokio::test]
async fn a_sandbox_that_is_killed_takes_its_machine_along() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    let sandbox = node.pod.container(SANDBOX).unwrap();
    let end = sandbox.process("").unwrap().stopped();
    sandbox.kill("", 9, false).await.unwrap();
    assert_eq!(end.await.status, 137);
    assert_eq!(node.events(1).await, ["exit sandbox 137"]);
    assert!(matches!(sandbox.kill("", 9, false).await, Err(ShimError::NotFound(_))));
}

#[tokio::test]
async fn a_guest_that_leaves_a_killed_container_alone_is_ended() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    *node.guest.deaf.lock().unwrap() = true;
    let container = node.pod.container("c1").unwrap();
    container.kill("", 9, false).await.unwrap();
    // Its watch begins.
    tokio::task::yield_now().await;
    tokio::time::pause();
    tokio::time::advance(crate::container::DEATH * 2).await;
    tokio::time::resume();
    assert_eq!(node.events(2).await, ["exit c1 137", "exit sandbox 137"]);
}

#[tokio::test]
async fn a_container_that_cannot_be_created_leaves_nothing() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.guest.fails.lock().unwrap().insert("create", "no room");
    let error = node.pod.create(&node.container_request("c1")).await.err().unwrap();
    assert!(error.to_string().contains("no room"), "{error}");
    assert_eq!(node.mounts(), Vec::<String>::new());
    assert_eq!(std::fs::read_dir(node.root.path().join("shared")).unwrap().count(), 0);
    node.no_more_events();
    node.guest.fails.lock().unwrap().clear();
    node.run("c1").await;
}

#[tokio::test]
async fn a_machine_that_does_not_come_up_leaves_an_empty_pod() {
    let mut node = Node::with(|_| Start::Fails("the guest did not come up within 1 s")).await;
    let error = node.pod.create(&node.sandbox_request()).await.err().unwrap();
    assert_eq!(error.to_string(), "the guest did not come up within 1 s");
    node.no_more_events();
    node.pod.close_if_empty();
    timeout(SOON, node.pod.closed()).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_cannot_be_made_the_pods_is_ended() {
    let mut node = Node::new().await;
    node.guest.fails.lock().unwrap().insert("configure", "no such sysctl");
    let error = node.pod.create(&node.sandbox_request()).await.err().unwrap();
    assert!(error.to_string().contains("no such sysctl"), "{error}");
    assert!(node.pod.machine().is_none());
    use crate::hypervisor::RunningMachine as _;
    timeout(SOON, node.machine.exited()).await.unwrap();
    node.no_more_events();
}

#[tokio::test]
async fn bad_input_is_told_before_a_machine_is_started() {
    let node = Node::new().await;
    let mut request = node.request(
        SANDBOX,
        json!({"io.kubernetes.cri.container-type": "sandbox", "coreos-kvm.io/vcpu": "1"}),
    );
    let error = node.pod.create(&request).await.err().unwrap();
    assert!(error.to_string().contains("vcpus"), "{error}");
    std::fs::write(node.root.path().join("config.toml"), "\ngests_dir = \"/\"\n").unwrap();
    request.id = "again".to_owned();
    let error = node.pod.create(&request).await.err().unwrap();
    assert!(error.to_string().contains("config.toml:2"), "{error}");
    assert!(node.described.lock().unwrap().is_none());
}

#[tokio::test]
async fn closing_waits_for_the_last_container_and_gives_up_a_start() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.pod.close_if_empty();
    assert!(timeout(Duration::from_millis(50), node.pod.closed()).await.is_err());

    let node = Node::with(|_| Start::Hangs).await;
    let (pod, request) = (node.pod.clone(), node.sandbox_request());
    let creating = tokio::spawn(async move { pod.create(&request).await.err().unwrap() });
    while node.described.lock().unwrap().is_none() {
        tokio::task::yield_now().await;
    }
    let service = Service::new(node.pod.clone());
    service.shutdown(&context(), ShutdownRequest::default()).await.unwrap();
    timeout(SOON, node.pod.closed()).await.unwrap();
    assert!(matches!(creating.await.unwrap(), ShimError::FailedPrecondition(_)));
    node.pod.end(Duration::ZERO).await;
    assert_eq!(*node.removed.lock().unwrap(), [SANDBOX]);
}

#[tokio::test]
async fn a_container_alone_has_a_machine_of_its_own_that_ends_with_it() {
    let mut node = Node::new().await;
    let request = node.request("alone", json!({}));
    node.pod.create(&request).await.unwrap();
    node.pod.container("alone").unwrap().start("").await.unwrap();
    node.guest.end("alone", "", 4);
    assert_eq!(node.events(3).await, ["create alone", "start alone", "exit alone 4"]);
    assert_eq!(node.pod.delete("alone", "").await.unwrap().0.status, 4);
    use crate::hypervisor::RunningMachine as _;
    timeout(SOON, node.machine.exited()).await.unwrap();
    assert_eq!(node.events(1).await, ["delete alone 4"]);
}

#[tokio::test]
async fn a_container_whose_creation_is_given_up_leaves_nothing() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.guest.held.send_replace("create");
    let service = Service::new(node.pod.clone());
    node.give_up_after("create c1", service.create(&context(), node.container_request("c1")))
        .await;
    node.guest.held.send_replace("");
    node.guest_is_asked_to("delete c1").await;
    until(|| node.mounts().is_empty()).await;
    assert!(matches!(node.pod.container("c1"), Err(ShimError::NotFound(_))));
    node.no_more_events();
}

#[tokio::test]
async fn the_machine_of_a_container_alone_whose_creation_is_given_up_ends() {
    use crate::hypervisor::RunningMachine as _;

    let mut node = Node::new().await;
    node.guest.held.send_replace("create");
    let service = Service::new(node.pod.clone());
    let request = node.request("alone", json!({}));
    node.give_up_after("create alone", service.create(&context(), request))
        .await;
    node.guest.held.send_replace("");
    timeout(SOON, node.machine.exited()).await.unwrap();
    until(|| node.pod.machine().is_none()).await;
    node.no_more_events();
}

#[tokio::test]
async fn a_start_is_carried_through_when_nobody_waits_for_it() {
    use containerd_shim_protos::api::StartRequest;

    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    let container = node.pod.container("c1").unwrap();
    container.exec("e1", b"{}".to_vec(), Stdio::default()).await.unwrap();
    node.guest.held.send_replace("start");
    let service = Service::new(node.pod.clone());
    let request = StartRequest {
        id: "c1".to_owned(),
        exec_id: "e1".to_owned(),
        ..Default::default()
    };
    node.give_up_after("start c1/e1", service.start(&context(), request))
        .await;
    node.guest.held.send_replace("");
    assert_eq!(node.events(2).await, ["exec-added c1/e1", "exec-started c1/e1"]);
    node.guest.end("c1", "e1", 0);
    assert_eq!(node.events(1).await, ["exit c1/e1 0"]);
}

#[tokio::test]
async fn a_container_that_is_deleted_twice_at_once_is_told_once() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.guest.end("c1", "", 0);
    assert_eq!(node.events(1).await, ["exit c1 0"]);
    let (first, second) = tokio::join!(node.pod.delete("c1", ""), node.pod.delete("c1", ""));
    assert_eq!(first.unwrap().0.status, 0);
    assert!(matches!(second, Err(ShimError::NotFound(_))));
    assert_eq!(node.events(1).await, ["delete c1 0"]);
    node.no_more_events();
}

#[tokio::test]
async fn output_arrives_whole_and_ends_and_stdin_ends_when_it_is_closed() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    let text: Vec<u8> = (0..300_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    node.guest.prints.lock().unwrap().insert("c1".to_owned(), text.clone());
    let mut request = node.container_request("c1");
    let folder = node.root.path();
    let (stdin, stdout) = (fifo(folder, "in"), fifo(folder, "out"));
    request.stdin = stdin.to_str().unwrap().to_owned();
    request.stdout = stdout.to_str().unwrap().to_owned();

    let reading = tokio::task::spawn_blocking(move || std::fs::read(stdout).unwrap());
    node.pod.create(&request).await.unwrap();
    // Written and closed before the process is started.
    std::fs::write(&stdin, b"for the process").unwrap();
    let container = node.pod.container("c1").unwrap();
    container.process("").unwrap().copies.close_stdin();
    container.start("").await.unwrap();
    let told = async {
        loop {
            if let Some(told) = node.guest.stdin.lock().unwrap().get("c1") {
                return told.clone();
            }
            tokio::task::yield_now().await;
        }
    };
    assert_eq!(timeout(SOON, told).await.unwrap(), b"for the process");
    node.guest.end("c1", "", 0);
    assert!(timeout(SOON, reading).await.unwrap().unwrap() == text);
    // Only what a FIFO holds may be on its way when the container is deleted: nothing is lost by that.
    node.pod.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn the_task_api_answers_for_what_it_knows() {
    use containerd_shim_protos::api::{
        ConnectRequest, KillRequest, PidsRequest, StateRequest, StatsRequest, WaitRequest,
    };

    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    let service = Service::new(node.pod.clone());
    let id = || "c1".to_owned();
    let state = service
        .state(
            &context(),
            StateRequest {
                id: id(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!((state.status.unwrap(), state.pid), (Status::RUNNING, QEMU));
    let pids = service
        .pids(
            &context(),
            PidsRequest {
                id: id(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(pids.processes[0].pid, QEMU);
    let stats = service
        .stats(
            &context(),
            StatsRequest {
                id: id(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(stats.stats.type_url, "io.containerd.cgroups.v2.Metrics");
    // Of any id: containerd asks what became of a container after its own restart.
    let connected = service.connect(&context(), ConnectRequest::default()).await.unwrap();
    assert_eq!((connected.shim_pid, connected.task_pid), (std::process::id(), QEMU));

    let kill = KillRequest {
        id: id(),
        signal: 15,
        ..Default::default()
    };
    service.kill(&context(), kill.clone()).await.unwrap();
    let exit = service
        .wait(
            &context(),
            WaitRequest {
                id: id(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!(exit.exit_status, 143);
    let state = service
        .state(
            &context(),
            StateRequest {
                id: id(),
                ..Default::default()
            },
        )
        .await
        .unwrap();
    assert_eq!((state.status.unwrap(), state.exit_status), (Status::STOPPED, 143));
    let measured = service
        .stats(
            &context(),
            StatsRequest {
                id: id(),
                ..Default::default()
            },
        )
        .await;
    let code = |error| match error {
        ttrpc::Error::RpcStatus(status) => status.code(),
        error => panic!("{error}"),
    };
    assert_eq!(code(measured.unwrap_err()), ttrpc::Code::NOT_FOUND);
    assert_eq!(
        code(service.kill(&context(), kill).await.unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    let unknown = PidsRequest {
        id: "c9".to_owned(),
        ..Default::default()
    };
    assert_eq!(
        code(service.pids(&context(), unknown).await.unwrap_err()),
        ttrpc::Code::NOT_FOUND
    );
    let mut versions: Vec<_> = service.both_versions().into_keys().collect();
    versions.sort();
    assert_eq!(versions, ["containerd.task.v2.Task", "containerd.task.v3.Task"]);
}

fn context() -> TtrpcContext {
    TtrpcContext {
        mh: ttrpc::MessageHeader::default(),
        metadata: HashMap::default(),
        timeout_nano: 0,
        connection_data: Arc::default(),
    }
}

/// containerd, as far as events go: present only from some time on.
#[tokio::test]
async fn events_wait_in_order_for_a_containerd_that_is_gone() {
    use async_trait::async_trait;
    use containerd_shim_protos::{
        api::{Empty, ForwardRequest},
        shim_async::{Events as Service, create_events},
    };

    /// It refuses what comes first, as one does that is shutting down.
    struct Containerd(mpsc::UnboundedSender<Envelope>, AtomicBool);

    #[async_trait]
    impl Service for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            if self.1.swap(false, Ordering::Relaxed) {
                let status = ttrpc::get_status(ttrpc::Code::UNKNOWN, "context canceled");
                return Err(ttrpc::Error::RpcStatus(status));
            }
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::default())
        }
    }

    let root = tempfile::tempdir().unwrap();
    let socket = root.path().join("containerd.sock.ttrpc");
    let address = socket.to_str().unwrap().to_owned();
    let (events, queue) = Events::queue("k8s.io");
    let forwarding = crate::events::forward(address.clone(), queue);
    for id in ["a", "b", "c"] {
        events.publish(&TaskStart {
            container_id: id.to_owned(),
            ..Default::default()
        });
    }
    let given_up = CancellationToken::new();
    assert!(timeout(Duration::from_millis(100), given_up.cancelled()).await.is_err());
    let (sender, mut received) = mpsc::unbounded_channel();
    let mut server = ttrpc::r#async::Server::new()
        .bind(&format!("unix://{address}"))
        .unwrap()
        .register_service(create_events(Arc::new(Containerd(sender, AtomicBool::new(true)))));
    server.start().await.unwrap();
    drop(events);
    timeout(SOON, forwarding).await.unwrap().unwrap();
    let mut names = Vec::new();
    while let Ok(envelope) = received.try_recv() {
        names.push(words(&envelope));
    }
    assert_eq!(names, ["start a", "start b", "start c"]);
    server.shutdown().await.unwrap();
}
