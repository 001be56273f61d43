//! What goes between containerd and the shim: the Task API, streams, events.

use super::*;

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

#[tokio::test(start_paused = true)]
async fn containerd_is_told_how_many_processes_there_are_and_never_that_there_are_none() {
    use containerd_shim_protos::api::PidsRequest;

    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    let service = Service::new(node.pod.clone());
    let told = async |id: &str| {
        let request = PidsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let told = service.pids(&context(), request).await.unwrap().processes;
        assert!(told.iter().all(|process| process.pid == QEMU));
        told.len()
    };
    *node.guest.pids.lock().unwrap() = vec![7, 8, 9];
    assert_eq!((told("c1").await, told(SANDBOX).await), (3, 1));
    *node.guest.pids.lock().unwrap() = (1..=1 << 20).collect();
    assert_eq!(told("c1").await, 1 << 15);
    node.guest.pids.lock().unwrap().clear();
    assert_eq!(told("c1").await, 1);
    node.guest.held.send_replace("pids");
    assert_eq!(told("c1").await, 1);
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

/// Adds to the specification that a request is for.
fn with_users(request: &CreateTaskRequest, namespaces: Value) {
    let path = Path::new(&request.bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let line = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
    let linux = spec["linux"].as_object_mut().unwrap();
    linux["namespaces"]
        .as_array_mut()
        .unwrap()
        .extend(namespaces.as_array().unwrap().clone());
    linux.extend([
        ("uidMappings".to_owned(), line.clone()),
        ("gidMappings".to_owned(), line),
    ]);
    std::fs::write(path, spec.to_string()).unwrap();
}

#[tokio::test]
async fn the_containers_of_a_pod_are_in_its_user_namespace() {
    let node = Node::new().await;
    let sandbox = node.sandbox_request();
    with_users(&sandbox, json!([{"type": "user"}]));
    node.pod.create(&sandbox).await.unwrap();
    let told = node.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!(told.users.uids.outside, 65536);

    let error = node.pod.create(&node.container_request("c1")).await.err().unwrap();
    assert!(error.to_string().contains("the container's none"), "{error}");
    let request = node.container_request("c1");
    with_users(&request, json!([{"type": "user", "path": "/proc/4321/ns/user"}]));
    node.pod.create(&request).await.unwrap();
    let spec = node.guest.spec.lock().unwrap().clone().unwrap();
    let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
    assert!(namespaces.contains(&json!({"type": "user"})), "{namespaces:?}");
}

#[tokio::test]
async fn a_pod_in_a_user_namespace_is_not_among_the_nodes_processes() {
    let node = Node::new().await;
    let request = node.sandbox_request();
    let path = Path::new(&request.bundle).join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(r#""type":"pid""#, r#""type":"mount""#)).unwrap();
    with_users(&request, json!([{"type": "user"}]));
    let error = node.pod.create(&request).await.err().unwrap();
    assert!(error.to_string().contains("remove hostPID"), "{error}");
    assert!(node.described.lock().unwrap().is_none());
}
