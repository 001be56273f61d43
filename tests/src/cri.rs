//! The Container Runtime Interface, spoken as a kubelet (or crictl) speaks it, each call with a bound.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use containerd_client::services::v1::{UpdateTaskRequest, tasks_client::TasksClient};
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    ContainerState, ContainerStats, ContainerStatsRequest, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, ExecRequest, ExecSyncRequest, ExecSyncResponse, LinuxContainerResources,
    ListContainersRequest, ListPodSandboxRequest, PodSandboxStats, PodSandboxStatsRequest, PodSandboxStatus,
    PodSandboxStatusRequest, PortForwardRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StatusRequest, StopContainerRequest, StopPodSandboxRequest, UpdateContainerResourcesRequest,
};
use tonic::transport::Channel;
use tonic::{Response, Status};

use crate::node::Node;
use crate::pod::{Container, Pod};

/// Runtime handler of this runtime.
pub const COREOS_KVM: &str = "coreos-kvm";
/// Runtime handler of plain containers.
pub const RUNC: &str = "runc";

/// Bound of a call that boots a machine: a cold boot without KVM on a loaded machine, with room.
const BOOT_BOUND: Duration = Duration::from_secs(240);
/// Bound of any other call.
pub(crate) const CALL_BOUND: Duration = Duration::from_secs(60);

/// A client; its methods block. The RPC's own error is kept (`downcast_ref::<Status>`), with the call's name before it.
#[derive(Debug)]
pub struct Cri {
    runtime: tokio::runtime::Runtime,
    pub(crate) channel: Channel,
    client: RuntimeServiceClient<Channel>,
}

/// What a process in a container said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    pub stdout: String,
    pub stderr: String,
    pub exit_code: i32,
}

impl Cri {
    pub fn connect(node: &Node) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let channel = runtime
            .block_on(containerd_client::connect(node.place().socket()))
            .context("connecting to containerd")?;
        Ok(Self {
            runtime,
            client: RuntimeServiceClient::new(channel.clone()),
            channel,
        })
    }

    /// Runs a sandbox and answers its id.
    pub fn run_pod(&self, pod: &Pod, handler: &str) -> Result<String> {
        let request = run_request(pod, handler)?;
        let mut client = self.client.clone();
        Ok(self
            .call("runp", BOOT_BOUND, client.run_pod_sandbox(request))?
            .pod_sandbox_id)
    }

    /// A client that is gone as soon as it has seen enough.
    ///
    /// # Errors
    /// Of looking, and when the pod runs or is refused before.
    pub fn give_up_pod(&self, pod: &Pod, handler: &str, enough: impl Fn() -> Result<bool>) -> Result<()> {
        let request = run_request(pod, handler)?;
        let mut client = self.client.clone();
        let seen = async {
            while !enough()? {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        };
        self.runtime.block_on(async {
            tokio::select! {
                seen = seen => seen,
                answer = client.run_pod_sandbox(request) => bail!("the answer comes before enough is seen: {answer:?}"),
            }
        })
    }

    pub fn create(&self, sandbox: &str, container: &Container, pod: &Pod) -> Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(container.config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        let mut client = self.client.clone();
        Ok(self
            .call("create", CALL_BOUND, client.create_container(request))?
            .container_id)
    }

    pub fn start(&self, container: &str) -> Result<()> {
        self.start_within(container, CALL_BOUND)
    }

    /// A start by a client that gives up after so long, and says so beforehand, as a kubelet does.
    pub fn start_within(&self, container: &str, bound: Duration) -> Result<()> {
        let mut request = tonic::Request::new(StartContainerRequest {
            container_id: container.to_owned(),
        });
        request.set_timeout(bound);
        let mut client = self.client.clone();
        self.call("start", bound, client.start_container(request)).map(drop)
    }

    /// Creates and starts.
    pub fn run(&self, sandbox: &str, container: &Container, pod: &Pod) -> Result<String> {
        let id = self.create(sandbox, container, pod)?;
        self.start(&id)?;
        Ok(id)
    }

    /// SIGTERM, and SIGKILL after the grace period.
    pub fn stop(&self, container: &str, grace: Duration) -> Result<()> {
        let request = StopContainerRequest {
            container_id: container.to_owned(),
            timeout: i64::try_from(grace.as_secs())?,
        };
        let mut client = self.client.clone();
        self.call("stop", CALL_BOUND + grace, client.stop_container(request))
            .map(drop)
    }

    pub fn remove(&self, container: &str) -> Result<()> {
        let request = RemoveContainerRequest {
            container_id: container.to_owned(),
        };
        let mut client = self.client.clone();
        self.call("rm", CALL_BOUND, client.remove_container(request)).map(drop)
    }

    /// Changes a container's limits, as the kubelet does when a pod is resized in place.
    pub fn update(&self, container: &str, limits: LinuxContainerResources) -> Result<()> {
        let request = UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(limits),
            ..UpdateContainerResourcesRequest::default()
        };
        let mut client = self.client.clone();
        self.call("update", CALL_BOUND, client.update_container_resources(request))
            .map(drop)
    }

    /// Changes the limits of a sandbox, `linux.resources` of the OCI specification, past the CRI: no containerd that this is tried
    /// with hands on to a sandbox what it is told of its limits.
    pub fn update_sandbox(&self, sandbox: &str, limits: &serde_json::Value) -> Result<()> {
        let mut request = tonic::Request::new(UpdateTaskRequest {
            container_id: sandbox.to_owned(),
            resources: Some(prost_types::Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
                value: limits.to_string().into_bytes(),
            }),
            ..UpdateTaskRequest::default()
        });
        let namespace = "k8s.io".parse().context("naming the namespace")?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        let mut client = TasksClient::new(self.channel.clone());
        self.call("task update", CALL_BOUND, client.update(request)).map(drop)
    }

    pub fn stop_pod(&self, sandbox: &str) -> Result<()> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: sandbox.to_owned(),
        };
        let mut client = self.client.clone();
        self.call("stopp", CALL_BOUND, client.stop_pod_sandbox(request))
            .map(drop)
    }

    pub fn remove_pod(&self, sandbox: &str) -> Result<()> {
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: sandbox.to_owned(),
        };
        let mut client = self.client.clone();
        self.call("rmp", CALL_BOUND, client.remove_pod_sandbox(request))
            .map(drop)
    }

    pub fn pod_status(&self, sandbox: &str) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.to_owned(),
            verbose: false,
        };
        let mut client = self.client.clone();
        self.call("inspectp", CALL_BOUND, client.pod_sandbox_status(request))?
            .status
            .context("inspectp: no status")
    }

    /// What is said of the pod beside its status, as `crictl inspectp` shows it: JSON, by names.
    pub fn pod_info(&self, sandbox: &str) -> Result<HashMap<String, String>> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: sandbox.to_owned(),
            verbose: true,
        };
        let mut client = self.client.clone();
        let response = self.call("inspectp", CALL_BOUND, client.pod_sandbox_status(request))?;
        Ok(response.info)
    }

    /// The pod's address in the node's network.
    pub fn pod_address(&self, sandbox: &str) -> Result<String> {
        let network = self.pod_status(sandbox)?.network.context("the pod has no network")?;
        Ok(network.ip)
    }

    pub fn status(&self, container: &str) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let mut client = self.client.clone();
        self.call("inspect", CALL_BOUND, client.container_status(request))?
            .status
            .context("inspect: no status")
    }

    pub fn stats(&self, container: &str) -> Result<ContainerStats> {
        let request = ContainerStatsRequest {
            container_id: container.to_owned(),
        };
        let mut client = self.client.clone();
        self.call("stats", CALL_BOUND, client.container_stats(request))?
            .stats
            .context("stats: none")
    }

    pub fn pod_stats(&self, sandbox: &str) -> Result<PodSandboxStats> {
        let request = PodSandboxStatsRequest {
            pod_sandbox_id: sandbox.to_owned(),
        };
        let mut client = self.client.clone();
        self.call("statsp", CALL_BOUND, client.pod_sandbox_stats(request))?
            .stats
            .context("statsp: none")
    }

    /// Whether the runtime and its network are ready, as `crictl info` shows them.
    pub fn ready(&self) -> Result<bool> {
        let mut client = self.client.clone();
        let response = self.call("info", CALL_BOUND, client.status(StatusRequest { verbose: false }))?;
        let conditions = response.status.context("info: no status")?.conditions;
        Ok(!conditions.is_empty() && conditions.iter().all(|condition| condition.status))
    }

    pub fn exec(&self, container: &str, command: &[&str]) -> Result<Said> {
        self.exec_within(container, command, CALL_BOUND)
    }

    /// An exec that containerd ends, with an error, when it takes longer (whole seconds).
    pub fn exec_within(&self, container: &str, command: &[&str], limit: Duration) -> Result<Said> {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: i64::try_from(limit.as_secs())?,
        };
        let mut client = self.client.clone();
        let ExecSyncResponse {
            stdout,
            stderr,
            exit_code,
        } = self.call("exec", limit + Duration::from_secs(10), client.exec_sync(request))?;
        Ok(Said {
            stdout: text(&stdout),
            stderr: text(&stderr),
            exit_code,
        })
    }

    /// The address of an interactive exec, on loopback in the node's network.
    pub fn exec_url(&self, container: &str, command: &[&str], tty: bool) -> Result<String> {
        let request = ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let mut client = self.client.clone();
        Ok(self.call("exec", CALL_BOUND, client.exec(request))?.url)
    }

    /// The address of a port-forward, on loopback in the node's network.
    pub fn port_forward_url(&self, sandbox: &str, port: u16) -> Result<String> {
        let request = PortForwardRequest {
            pod_sandbox_id: sandbox.to_owned(),
            port: vec![port.into()],
        };
        let mut client = self.client.clone();
        Ok(self.call("port-forward", CALL_BOUND, client.port_forward(request))?.url)
    }

    /// Ids of all sandboxes.
    pub fn pods(&self) -> Result<Vec<String>> {
        let mut client = self.client.clone();
        let pods = self.call(
            "pods",
            CALL_BOUND,
            client.list_pod_sandbox(ListPodSandboxRequest { filter: None }),
        )?;
        Ok(pods.items.into_iter().map(|pod| pod.id).collect())
    }

    /// Ids of all containers.
    pub fn containers(&self) -> Result<Vec<String>> {
        let mut client = self.client.clone();
        let containers = self.call(
            "ps",
            CALL_BOUND,
            client.list_containers(ListContainersRequest { filter: None }),
        )?;
        Ok(containers
            .containers
            .into_iter()
            .map(|container| container.id)
            .collect())
    }

    /// Waits until a container has ended.
    pub fn wait_exited(&self, container: &str, bound: Duration) -> Result<ContainerStatus> {
        let deadline = Instant::now() + bound;
        loop {
            let status = self.status(container)?;
            if status.state() == ContainerState::ContainerExited {
                return Ok(status);
            }
            if Instant::now() >= deadline {
                bail!(
                    "after {} s the container is still {}",
                    bound.as_secs(),
                    status.state().as_str_name()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn call<T>(
        &self,
        name: &'static str,
        bound: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T> {
        let outcome = self.runtime.block_on(async { tokio::time::timeout(bound, call).await });
        match outcome {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(anyhow::Error::new(status).context(name)),
            Err(_) => bail!("{name}: no answer within {} s", bound.as_secs()),
        }
    }
}

/// The pod's folder of logs is there then, as a kubelet sees to it.
fn run_request(pod: &Pod, handler: &str) -> Result<RunPodSandboxRequest> {
    fs::create_dir_all(pod.log_directory()).context("making the pod's folder of logs")?;
    Ok(RunPodSandboxRequest {
        config: Some(pod.config.clone()),
        runtime_handler: handler.to_owned(),
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The message of the RPC error inside an error of [`Cri`].
pub fn message(error: &anyhow::Error) -> String {
    error
        .downcast_ref::<Status>()
        .map_or_else(|| format!("{error:#}"), |status| status.message().to_owned())
}

/// One line of a container's log, in the kubelet's format: time, stream, tag (F for a full line, P for a part), text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub stream: String,
    pub text: String,
}

/// Reads a container's log.
pub fn read_log(path: &Path) -> Result<Vec<LogLine>> {
    let log = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    log.lines()
        .map(|line| {
            let mut fields = line.splitn(4, ' ');
            let (Some(_time), Some(stream), Some(_tag), Some(text)) =
                (fields.next(), fields.next(), fields.next(), fields.next())
            else {
                bail!("{}: {line:?} is no line of a container's log", path.display())
            };
            Ok(LogLine {
                stream: stream.to_owned(),
                text: text.to_owned(),
            })
        })
        .collect()
}

/// Waits until a container's log has a line that satisfies the condition.
pub fn wait_for_log(path: &Path, bound: Duration, condition: impl Fn(&LogLine) -> bool) -> Result<LogLine> {
    let deadline = Instant::now() + bound;
    loop {
        let lines = read_log(path).unwrap_or_default();
        if let Some(line) = lines.iter().find(|line| condition(line)) {
            return Ok(line.clone());
        }
        if Instant::now() >= deadline {
            bail!(
                "no such line in {} within {} s; it has: {lines:?}",
                path.display(),
                bound.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
