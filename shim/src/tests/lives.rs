//! How containers, execs and machines live and end, and what is told of it, in which order.

use super::*;

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
async fn a_folder_is_mounted_once_for_all_containers_and_the_guest_lets_go_of_it_first() {
    let node = Node::new().await;
    node.pod.create(&node.sandbox_request()).await.unwrap();
    let folder = node.root.path().join("of-the-pod");
    std::fs::create_dir(&folder).unwrap();
    let create = async |id: &str, option: &str| {
        let request = node.container_request(id);
        let path = Path::new(&request.bundle).join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        spec["mounts"] =
            json!([{"destination": "/data", "type": "bind", "source": folder, "options": ["rbind", option]}]);
        std::fs::write(path, spec.to_string()).unwrap();
        node.pod.create(&request).await.map(|_| {
            let spec = node.guest.spec.lock().unwrap().clone().unwrap();
            spec["mounts"][0]["source"].as_str().unwrap().to_owned()
        })
    };
    let place = |number: u32| format!("/run/coreos-kvm/shared/.volumes/{number}");
    assert_eq!(create("c1", "rw").await.unwrap(), place(0));
    assert_eq!(create("c2", "ro").await.unwrap(), place(0));
    node.guest.fails.lock().unwrap().insert("create", "it is full");
    create("c3", "rw").await.unwrap_err();
    node.guest.fails.lock().unwrap().clear();
    let mounts = || node.mounts().iter().filter(|line| line.contains("/.volumes/")).count();
    let released = || {
        let calls = node.guest.calls.lock().unwrap();
        calls
            .iter()
            .filter(|call| call.starts_with("release"))
            .cloned()
            .collect::<Vec<_>>()
    };
    node.pod.delete("c1", "").await.unwrap();
    assert_eq!((mounts(), released()), (1, Vec::new()));
    node.pod.delete("c2", "").await.unwrap();
    assert_eq!((mounts(), released()), (0, vec!["release .volumes/0".to_owned()]));
    assert_eq!(node.mounts(), Vec::<String>::new());
    assert_eq!(
        create("c4", "ro").await.unwrap(),
        place(1),
        "the guest has known the other"
    );
    assert_eq!(mounts(), 1);
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
async fn a_guest_that_answers_no_signal_is_ended_by_sigkill() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.guest.held.send_replace("signal");
    let container = node.pod.container("c1").unwrap();
    tokio::time::pause();
    container.kill("", 15, false).await.unwrap();
    assert!(!container.has_stopped());
    container.kill("", 9, false).await.unwrap();
    tokio::time::resume();
    assert_eq!(node.events(2).await, ["exit c1 137", "exit sandbox 137"]);
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
    tokio::time::advance(crate::container::end::DEATH * 2).await;
    tokio::time::resume();
    assert_eq!(node.events(2).await, ["exit c1 137", "exit sandbox 137"]);
}
