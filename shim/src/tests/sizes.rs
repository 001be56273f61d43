//! The size of a machine that runs, as limits change.

use super::*;

/// Limits of so many MiB and thousandths of a processor.
fn limits(mib: u64, millicpus: u64) -> Vec<u8> {
    let limits = json!({"memory": {"limit": mib << 20}, "cpu": {"quota": millicpus * 100, "period": 100_000}});
    limits.to_string().into_bytes()
}

impl Node {
    /// What was done with the machine's size and with limits since this was asked last.
    fn changes(&self) -> Vec<String> {
        let mut calls = std::mem::take(&mut *self.guest.calls.lock().unwrap());
        calls.retain(|call| call.starts_with("size") || call.starts_with("update") || call.starts_with("create"));
        calls
    }

    async fn update(&self, id: &str, resources: &[u8]) -> Result<(), ShimError> {
        self.pod.update(id, resources).await
    }

    /// A request whose specification has these limits.
    fn limited_request(&self, id: &str, resources: &[u8]) -> CreateTaskRequest {
        let request = self.container_request(id);
        let path = Path::new(&request.bundle).join("config.json");
        let mut spec: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        spec["linux"]["resources"] = serde_json::from_slice(resources).unwrap();
        std::fs::write(path, spec.to_string()).unwrap();
        request
    }
}

#[tokio::test]
async fn the_machine_is_larger_before_a_limit_is_and_smaller_after_it() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.run("c2").await;
    node.changes();
    node.update("c1", &limits(1024, 1500)).await.unwrap();
    assert_eq!(node.changes(), ["size 2 1280", "update c1"]);
    node.update("c2", &limits(512, 1000)).await.unwrap();
    assert_eq!(node.changes(), ["size 3 1792", "update c2"]);
    // What it does not speak of stays.
    node.update("c1", b"{}").await.unwrap();
    assert_eq!(node.changes(), ["update c1"]);
    node.update("c1", &limits(128, 100)).await.unwrap();
    assert_eq!(node.changes(), ["update c1", "size 2 896"]);
    // Never less than it has started with.
    let unlimited = br#"{"memory": {"limit": -1}, "cpu": {"quota": -1}}"#;
    node.update("c2", unlimited).await.unwrap();
    assert_eq!(node.changes(), ["update c2", "size 1 512"]);
}

#[tokio::test]
async fn the_limits_of_the_sandbox_are_the_pods() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.changes();
    node.update(SANDBOX, &limits(1024, 2000)).await.unwrap();
    assert_eq!(node.changes(), ["size 2 1280"]);
    node.update("c1", &limits(512, 500)).await.unwrap();
    assert_eq!(node.changes(), ["update c1"]);
    node.update(SANDBOX, &limits(128, 500)).await.unwrap();
    assert_eq!(node.changes(), ["size 1 768"]);
}

#[tokio::test]
async fn a_limit_that_cannot_be_leaves_all_as_it_was() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.changes();
    let too_large = node.update("c1", &limits(1 << 20, 100)).await;
    assert!(matches!(too_large, Err(ShimError::InvalidArgument(_))), "{too_large:?}");
    assert_eq!(node.changes(), Vec::<String>::new());
    // The guest does not set the limit: the machine need not be larger.
    node.guest.fails.lock().unwrap().insert("update", "no");
    assert!(node.update("c1", &limits(1024, 1000)).await.is_err());
    assert_eq!(node.changes(), ["size 1 1280", "update c1", "size 1 512"]);
    let nonsense = node.update("c1", b"[1]").await;
    assert!(matches!(nonsense, Err(ShimError::InvalidArgument(_))), "{nonsense:?}");
}

#[tokio::test]
async fn a_container_that_has_ended_needs_nothing() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.run("c1").await;
    node.run("c2").await;
    node.update("c1", &limits(1024, 1000)).await.unwrap();
    node.guest.end("c1", "", 0);
    assert_eq!(node.events(1).await, ["exit c1 0"]);
    node.changes();
    let ended = node.update("c1", &limits(2048, 1000)).await;
    assert!(matches!(ended, Err(ShimError::NotFound(_))), "{ended:?}");
    node.update("c2", &limits(512, 1000)).await.unwrap();
    assert_eq!(node.changes(), ["update c2", "size 1 768"]);
}

#[tokio::test]
async fn a_container_that_comes_with_more_than_the_pod_was_started_with_finds_it() {
    let mut node = Node::new().await;
    node.run_sandbox().await;
    node.changes();
    let request = node.limited_request("c1", &limits(1024, 2000));
    node.pod.create(&request).await.unwrap();
    assert_eq!(node.changes(), ["size 2 1280", "create c1"]);
    // More than there can be is no reason not to run: it is a limit.
    let request = node.limited_request("c2", &limits(1 << 20, 100));
    node.pod.create(&request).await.unwrap();
    assert_eq!(node.changes(), ["create c2"]);
}

#[tokio::test]
async fn a_pod_that_names_its_machines_size_has_it() {
    let node = Node::new().await;
    let annotations = json!({"io.kubernetes.cri.container-type": "sandbox", "coreos-kvm.io/memory": "512Mi"});
    node.pod.create(&node.request(SANDBOX, annotations)).await.unwrap();
    node.changes();
    let request = node.limited_request("c1", &limits(1024, 2000));
    node.pod.create(&request).await.unwrap();
    assert_eq!(node.changes(), ["create c1"]);
}
