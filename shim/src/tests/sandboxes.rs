//! Pods whose machines containerd makes by the Sandbox API, and what of it is left to the Task API.

use std::time::Duration;

use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
    },
    sandbox_async::Sandbox as _,
};
use k8s_cri::v1::PodSandboxConfig;
use prost::Message as _;

use super::*;
use crate::sandbox::SandboxService;

macro_rules! of_sandbox {
    ($request:ident) => {
        $request {
            sandbox_id: SANDBOX.to_owned(),
            ..Default::default()
        }
    };
}

impl Node {
    fn sandboxes(&self) -> SandboxService {
        SandboxService::new(self.pod.clone())
    }

    fn create_request(&self, config: &PodSandboxConfig) -> CreateSandboxRequest {
        let bundle = self.root.path().join(SANDBOX);
        std::fs::create_dir_all(&bundle).unwrap();
        let options = protobuf::well_known_types::any::Any {
            type_url: "runtime.v1.PodSandboxConfig".to_owned(),
            value: config.encode_to_vec(),
            ..Default::default()
        };
        CreateSandboxRequest {
            bundle_path: bundle.to_str().unwrap().to_owned(),
            options: Some(options).into(),
            netns_path: "/var/run/netns/cni-1".to_owned(),
            ..of_sandbox!(CreateSandboxRequest)
        }
    }

    async fn run_by_sandbox_api(&self) -> SandboxService {
        let service = self.sandboxes();
        let request = self.create_request(&podspec::tests::sandbox_config());
        service.create_sandbox(&context(), request).await.unwrap();
        let started = service
            .start_sandbox(&context(), of_sandbox!(StartSandboxRequest))
            .await
            .unwrap();
        assert_eq!(started.pid, QEMU);
        assert!(started.created_at.seconds > 0);
        service
    }
}

async fn status(service: &SandboxService, verbose: bool) -> SandboxStatusResponse {
    let request = SandboxStatusRequest {
        verbose,
        ..of_sandbox!(SandboxStatusRequest)
    };
    service.sandbox_status(&context(), request).await.unwrap()
}

fn code<T>(answer: ttrpc::Result<T>) -> ttrpc::Code {
    match answer.err().unwrap() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        error => panic!("{error}"),
    }
}

#[tokio::test]
async fn a_sandbox_lives_by_its_own_api_and_its_containers_by_the_other() {
    let mut node = Node::new().await;
    let service = node.run_by_sandbox_api().await;
    let machine = node.described.lock().unwrap().clone().unwrap();
    assert_eq!((machine.id.as_str(), machine.memory_mib), (SANDBOX, 512));
    assert_eq!(machine.cgroup, Some("kubepods/pod1/sandbox".into()));
    let told = node.guest.sandbox.lock().unwrap().clone().unwrap();
    assert_eq!(told.hostname, "web-0");
    let platform = service
        .platform(&context(), of_sandbox!(PlatformRequest))
        .await
        .unwrap();
    assert_eq!(platform.platform.os, "linux");
    let now = status(&service, false).await;
    assert_eq!((now.state.as_str(), now.pid), ("SANDBOX_READY", QEMU));
    assert!(now.info.is_empty());
    service
        .ping_sandbox(&context(), of_sandbox!(PingRequest))
        .await
        .unwrap();

    // Of the sandbox there are no events of tasks, for it is none.
    node.run("c1").await;
    let stop = of_sandbox!(StopSandboxRequest);
    service.stop_sandbox(&context(), stop.clone()).await.unwrap();
    assert_eq!(node.events(1).await, ["exit c1 137"]);
    let exit = service
        .wait_sandbox(&context(), of_sandbox!(WaitSandboxRequest))
        .await
        .unwrap();
    assert_eq!(exit.exit_status, 137);
    let now = status(&service, true).await;
    assert_eq!(
        (now.state.as_str(), now.exited_at),
        ("SANDBOX_NOTREADY", exit.exited_at)
    );
    // Once more, as a kubelet does that has not heard of the first.
    service.stop_sandbox(&context(), stop).await.unwrap();
    let ping = service.ping_sandbox(&context(), of_sandbox!(PingRequest)).await;
    assert_eq!(code(ping), ttrpc::Code::FAILED_PRECONDITION);

    assert_eq!(node.pod.delete("c1", "").await.unwrap().0.status, 137);
    assert_eq!(node.events(1).await, ["delete c1 137"]);
    // What containerd calls after each container's deletion leaves the sandbox alone.
    let tasks = Service::new(node.pod.clone());
    tasks.shutdown(&context(), ShutdownRequest::default()).await.unwrap();
    assert!(timeout(Duration::from_millis(50), node.pod.closed()).await.is_err());
    for _ in 0..2 {
        let shutdown = of_sandbox!(ShutdownSandboxRequest);
        service.shutdown_sandbox(&context(), shutdown).await.unwrap();
    }
    timeout(SOON, node.pod.closed()).await.unwrap();
    node.no_more_events();
    assert_eq!(node.mounts(), Vec::<String>::new());
}

#[tokio::test]
async fn a_machine_tells_whoever_looks_at_its_sandbox_what_it_is() {
    let node = Node::new().await;
    let service = node.run_by_sandbox_api().await;
    let info: Value = serde_json::from_str(&status(&service, true).await.info["info"]).unwrap();
    assert_eq!(
        info,
        json!({
            "pid": QEMU, "cid": 3, "accel": "tcg", "accelReason": "a trial took too long", "guest": "reference",
            "console": "/run/coreos-kvm/sandbox/console.log",
            "kind": "clone", "template": "0123abcd", "memory": "copy-on-write",
        })
    );
    let measured = service
        .sandbox_metrics(&context(), of_sandbox!(SandboxMetricsRequest))
        .await;
    // There is no such process.
    assert_eq!(code(measured), ttrpc::Code::UNKNOWN);
}

#[tokio::test]
async fn a_pod_that_containerd_forgets_before_it_begins_is_ended() {
    let node = Node::new().await;
    let request = node.create_request(&podspec::tests::sandbox_config());
    let bundle = std::path::PathBuf::from(&request.bundle_path);
    let service = node.sandboxes();
    service.create_sandbox(&context(), request).await.unwrap();
    tokio::time::pause();
    let is_forgotten = async || tokio::time::timeout(Duration::from_secs(3600), node.pod.forgotten(&bundle)).await;
    assert!(is_forgotten().await.is_err(), "containerd still has it");
    std::fs::remove_dir_all(&bundle).unwrap();
    is_forgotten().await.unwrap();
    service
        .start_sandbox(&context(), of_sandbox!(StartSandboxRequest))
        .await
        .unwrap();
    assert!(is_forgotten().await.is_err(), "it has begun");
}

#[tokio::test]
async fn a_machines_end_is_told_to_who_waits_for_its_sandbox() {
    let mut node = Node::new().await;
    let service = node.run_by_sandbox_api().await;
    node.run("c1").await;
    let waiter = service.clone();
    let waiting = tokio::spawn(async move { waiter.wait_sandbox(&context(), of_sandbox!(WaitSandboxRequest)).await });
    node.machine.die("the guest powered off", true).await;
    assert_eq!(waiting.await.unwrap().unwrap().exit_status, 0);
    assert_eq!(node.events(1).await, ["exit c1 137"]);
    node.no_more_events();
    let error = node.pod.create(&node.container_request("c2")).await.err().unwrap();
    assert_eq!(error.to_string(), "the pod's machine has ended: the guest powered off");
}

#[tokio::test]
async fn containers_find_the_pods_files() {
    let mut node = Node::new().await;
    node.run_by_sandbox_api().await;
    node.run("c1").await;
    let spec = node.guest.spec.lock().unwrap().clone().unwrap();
    let sources: Vec<_> = spec["mounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| {
            (
                mount["destination"].as_str().unwrap(),
                mount["source"].as_str().unwrap(),
            )
        })
        .filter(|(destination, _)| ["/etc/hostname", "/etc/hosts"].contains(destination))
        .collect();
    assert_eq!(sources.len(), 2, "{spec}");
    for (destination, source) in sources {
        let below = source.strip_prefix(coreos_kvm_proto::SHARED_MOUNT).unwrap();
        let shared = node.root.path().join("shared").join(below.trim_start_matches('/'));
        let name = destination.trim_start_matches("/etc/");
        let written = node.root.path().join(SANDBOX).join("work").join(name);
        assert_eq!(std::fs::read(shared).unwrap(), std::fs::read(written).unwrap());
    }
    node.guest.end("c1", "", 0);
    assert_eq!(node.events(1).await, ["exit c1 0"]);
    node.pod.delete("c1", "").await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_a_sandbox_is_told_before_a_machine_is_started() {
    let node = Node::new().await;
    let service = node.sandboxes();
    let refused = async |request: CreateSandboxRequest| match service.create_sandbox(&context(), request).await {
        Err(ttrpc::Error::RpcStatus(status)) => status.message().to_owned(),
        answer => panic!("{answer:?}"),
    };
    let good = podspec::tests::sandbox_config();
    let mut request = node.create_request(&good);
    request.options.clear();
    assert!(refused(request).await.contains("PodSandboxConfig"));
    let mut request = node.create_request(&good);
    request.netns_path.clear();
    assert!(refused(request).await.contains("hostNetwork"));
    for (key, value, word) in [
        ("coreos-kvm.io/vcpu", "1", "vcpus"),
        ("coreos-kvm.io/kernel-args", "single", "config.toml"),
        ("coreos-kvm.io/memory", "1Ti", "65536Mi"),
    ] {
        let mut config = good.clone();
        config.annotations.insert(key.to_owned(), value.to_owned());
        let error = refused(node.create_request(&config)).await;
        assert!(error.contains(word), "{error}");
    }
    assert!(node.described.lock().unwrap().is_none());
    // There is nothing to speak of, and nothing to end.
    let asked = service
        .sandbox_status(&context(), of_sandbox!(SandboxStatusRequest))
        .await;
    assert_eq!(code(asked), ttrpc::Code::NOT_FOUND);
    let asked = service
        .start_sandbox(&context(), of_sandbox!(StartSandboxRequest))
        .await;
    assert_eq!(code(asked), ttrpc::Code::NOT_FOUND);
    let error = node.pod.create(&node.container_request("c1")).await.err().unwrap();
    assert_eq!(error.to_string(), "the pod's machine does not run");
    let shutdown = of_sandbox!(ShutdownSandboxRequest);
    service.shutdown_sandbox(&context(), shutdown).await.unwrap();
    timeout(SOON, node.pod.closed()).await.unwrap();
}

#[tokio::test]
async fn a_second_sandbox_is_refused_and_a_second_start_too() {
    let node = Node::new().await;
    let service = node.run_by_sandbox_api().await;
    let request = node.create_request(&podspec::tests::sandbox_config());
    let again = service.create_sandbox(&context(), request.clone()).await;
    assert_eq!(code(again), ttrpc::Code::ALREADY_EXISTS);
    let other = CreateSandboxRequest {
        sandbox_id: "other".to_owned(),
        ..request
    };
    assert_eq!(
        code(service.create_sandbox(&context(), other).await),
        ttrpc::Code::ALREADY_EXISTS
    );
    let again = service
        .start_sandbox(&context(), of_sandbox!(StartSandboxRequest))
        .await;
    assert_eq!(code(again), ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(status(&service, false).await.state, "SANDBOX_READY");
}

#[tokio::test]
async fn a_sandbox_whose_creation_is_given_up_leaves_nothing_and_its_shim_ends() {
    let mut node = Node::new().await;
    node.guest.held.send_replace("configure");
    let service = node.sandboxes();
    let request = node.create_request(&podspec::tests::sandbox_config());
    node.give_up_after("configure sandbox", service.create_sandbox(&context(), request))
        .await;
    node.guest.held.send_replace("");
    timeout(SOON, node.pod.closed()).await.unwrap();
    node.pod.end(Duration::ZERO).await;
    assert!(node.pod.machine().is_none());
    node.no_more_events();
}
