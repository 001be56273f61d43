//! What cannot be, is given up or comes at the wrong time: nothing of it is left.

use super::*;

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
    use crate::hypervisor::SandboxProcess as _;
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
    use crate::hypervisor::SandboxProcess as _;

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
async fn a_kill_that_nobody_answers_is_answered_before_the_machine_has_ended_for_it() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.machine.lose_agent().await;
    node.guest.held.send_replace("shutdown");
    let container = node.pod.container("c1").unwrap();
    timeout(SOON, container.kill("", 9, true)).await.unwrap().unwrap();
    node.no_more_events();
    node.guest.held.send_replace("");
    let mut ended = node.events(2).await;
    ended.sort();
    assert_eq!(ended, ["exit c1 137", "exit sandbox 137"]);
}

#[tokio::test]
async fn a_sandbox_whose_network_comes_late_holds_a_namespace_until_it_is_given_up() {
    use containerd_shim_protos::{api::ConnectRequest, events::task::TaskCreate};

    let mut node = Node::new().await;
    let request = node.sandbox_request();
    let path = Path::new(&request.bundle).join("config.json");
    let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    spec["linux"]["namespaces"] = json!([{"type": "network"}]);
    std::fs::write(path, spec.to_string()).unwrap();

    let sandbox = node.pod.create(&request).await.unwrap();
    let created = timeout(SOON, node.events.recv()).await.unwrap().unwrap();
    let created = TaskCreate::parse_from_bytes(&created.event.value).unwrap();
    assert_eq!((created.container_id.as_str(), created.pid), (SANDBOX, sandbox.pid()));
    let service = Service::new(node.pod.clone());
    let connected = service.connect(&context(), ConnectRequest::default()).await.unwrap();
    assert_eq!(connected.task_pid, sandbox.pid());
    let holder = PathBuf::from(format!("/proc/{}", sandbox.pid()));
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/net")).unwrap();
    assert_ne!(namespace(&holder), namespace(Path::new("/proc/self")));
    until(|| std::fs::read_dir(holder.join("fd")).unwrap().next().is_none()).await;

    let early = node.pod.create(&node.container_request("c1")).await;
    assert!(matches!(early, Err(ShimError::FailedPrecondition(_))));
    assert!(matches!(sandbox.pause().await, Err(ShimError::FailedPrecondition(_))));
    // Who it is that knows the network is not there.
    let error = node.pod.start(&sandbox, "").await.unwrap_err().to_string();
    assert!(error.contains("without containerd"), "{error}");
    assert!(node.described.lock().unwrap().is_none());

    sandbox.kill("", 9, false).await.unwrap();
    assert_eq!(node.events(1).await, ["exit sandbox 137"]);
    assert!(!holder.exists());
    assert_eq!(node.pod.delete(SANDBOX, "").await.unwrap().0.status, 137);
    assert_eq!(node.events(1).await, ["delete sandbox 137"]);
    node.no_more_events();
}
