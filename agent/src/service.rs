//! The calls of the protocol. Thin: each says what it wants of whom.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use coreos_kvm_proto::{
    PROTOCOL,
    agent::{self as proto, create_container_request},
    agent_ttrpc::Agent,
};
use tokio::time::timeout;
use ttrpc::r#async::TtrpcContext;

use crate::{
    containers::{Containers, Processes},
    error::AgentError,
    identity,
    mounts::{self, Shm},
    network,
    reaper::Exit,
    runtime::users::IdMappings,
    share::{self, Share},
    size, stats,
};

/// Longer than mounts and settings take in any guest.
const AHEAD: Duration = Duration::from_secs(30);

pub(crate) struct Service {
    containers: Arc<Containers>,
    share: Arc<Share>,
    shm: Arc<Shm>,
    /// Why the guest has not become the pod's before it was asked for that.
    failed: Mutex<Option<AgentError>>,
}

impl Service {
    pub(crate) fn new(containers: Arc<Containers>, share: Arc<Share>, shm: Arc<Shm>) -> Self {
        Self {
            containers,
            share,
            shm,
            failed: Mutex::default(),
        }
    }

    /// Does what [`Agent::configure_sandbox`] is going to be asked for, and answers whether it is done. If not, whoever asks hears why: what was
    /// begun cannot be done again.
    pub(crate) async fn configure_ahead(&self, request: &proto::ConfigureSandboxRequest) -> bool {
        let made = timeout(AHEAD, self.make_the_pods(request)).await;
        let late = || AgentError::FailedPrecondition(format!("it is not done within {} s", AHEAD.as_secs()));
        let failed = made.unwrap_or_else(|_| Err(late())).err();
        let done = failed.is_none();
        *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = failed;
        done
    }

    async fn make_the_pods(&self, request: &proto::ConfigureSandboxRequest) -> Result<(), AgentError> {
        identity::set_hostname(&request.hostname)?;
        self.share.mount(&request.shared_tag).await?;
        self.shm.mount(request.shm_size)?;
        if let Some(users) = request.users.as_ref().map(IdMappings::of).transpose()? {
            self.shm.give(users.root())?;
            mounts::mqueue()?;
            self.containers.make_users(users).await?;
        }
        identity::set_sysctls(&request.sysctls)
    }
}

type Answer<T> = ttrpc::Result<T>;

fn empty(result: Result<(), AgentError>) -> Answer<proto::Empty> {
    Ok(result.map(|()| proto::Empty::default())?)
}

fn answer(pid: u32, begin: Instant) -> proto::CreateProcessResponse {
    proto::CreateProcessResponse {
        pid,
        took_ns: u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX),
        ..Default::default()
    }
}

fn ended(exit: Exit, oom_killed: bool) -> proto::WaitProcessResponse {
    proto::WaitProcessResponse {
        exit_status: exit.status,
        exited_at_ns: exit.at_ns,
        oom_killed,
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn info(&self, _: &TtrpcContext, _: proto::InfoRequest) -> Answer<proto::InfoResponse> {
        Ok(proto::InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
            kernel_release: identity::kernel_release(),
            os_name: identity::os_name(),
            ..Default::default()
        })
    }

    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: proto::ConfigureSandboxRequest,
    ) -> Answer<proto::Empty> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        empty(match failed {
            Some(error) => Err(error),
            None => self.make_the_pods(&request).await,
        })
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: proto::AdjustClockRequest,
    ) -> Answer<proto::AdjustClockResponse> {
        Ok(proto::AdjustClockResponse {
            wall_clock_ns: identity::adjust_clock(request.by_ns, request.slowly)?,
            ..Default::default()
        })
    }

    async fn configure_network(
        &self,
        _: &TtrpcContext,
        request: proto::ConfigureNetworkRequest,
    ) -> Answer<proto::Empty> {
        empty(network::configure(&request).await)
    }

    async fn take_size(&self, _: &TtrpcContext, request: proto::TakeSizeRequest) -> Answer<proto::TakeSizeResponse> {
        Ok(proto::TakeSizeResponse {
            vcpus: size::take(request.vcpus, request.memory_mib).await?,
            available_mib: size::available_mib()?,
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> Answer<proto::CreateProcessResponse> {
        let streams = request.streams.unwrap_or_default();
        let processes = match &request.processes {
            Some(create_container_request::Processes::OfContainer(id)) => Processes::Container(id),
            Some(create_container_request::Processes::OfPod(true)) => Processes::Pod,
            _ => Processes::Own,
        };
        let begin = Instant::now();
        self.shm.hold(request.shm_size)?;
        let made = self
            .containers
            .create(&request.container_id, &request.spec, streams, processes);
        Ok(answer(made.await?, begin))
    }

    async fn create_exec(&self, _: &TtrpcContext, request: proto::CreateExecRequest) -> Answer<proto::Empty> {
        let streams = request.streams.unwrap_or_default();
        empty(
            self.containers
                .prepare(&request.container_id, &request.exec_id, &request.process, streams),
        )
    }

    async fn create_guest_exec(&self, _: &TtrpcContext, request: proto::CreateExecRequest) -> Answer<proto::Empty> {
        let streams = request.streams.unwrap_or_default();
        let guest = coreos_kvm_proto::GUEST_CONTAINER_ID;
        empty(
            self.containers
                .prepare(guest, &request.exec_id, &request.process, streams),
        )
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> Answer<proto::CreateProcessResponse> {
        let begin = Instant::now();
        let made = self.containers.start(&request.container_id, &request.exec_id);
        Ok(answer(made.await?, begin))
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> Answer<proto::WaitProcessResponse> {
        let (exit, oom_killed) = self.containers.wait(&request.container_id, &request.exec_id).await?;
        Ok(ended(exit, oom_killed))
    }

    async fn signal_process(&self, _: &TtrpcContext, request: proto::SignalProcessRequest) -> Answer<proto::Empty> {
        empty(
            self.containers
                .signal(&request.container_id, &request.exec_id, request.signal, request.all),
        )
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: proto::ResizePtyRequest) -> Answer<proto::Empty> {
        empty(
            self.containers
                .resize(&request.container_id, &request.exec_id, request.columns, request.rows),
        )
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> Answer<proto::WaitProcessResponse> {
        Ok(ended(
            self.containers.delete(&request.container_id, &request.exec_id).await?,
            false,
        ))
    }

    async fn release_volumes(&self, _: &TtrpcContext, request: proto::ReleaseVolumesRequest) -> Answer<proto::Empty> {
        let folders: Vec<_> = request.folders.into_iter().map(PathBuf::from).collect();
        let released = tokio::task::spawn_blocking(move || share::let_go(&folders)).await;
        let released = released.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        empty(released.map_err(AgentError::failed("unmounting volumes failed")))
    }

    async fn list_pids(&self, _: &TtrpcContext, request: proto::ContainerRequest) -> Answer<proto::ListPidsResponse> {
        let pids = self.containers.pids(&request.container_id)?;
        Ok(proto::ListPidsResponse {
            pids,
            ..Default::default()
        })
    }

    async fn update_resources(&self, _: &TtrpcContext, request: proto::UpdateResourcesRequest) -> Answer<proto::Empty> {
        empty(self.containers.update(&request.container_id, &request.resources))
    }

    async fn pause_container(&self, _: &TtrpcContext, request: proto::ContainerRequest) -> Answer<proto::Empty> {
        empty(self.containers.freeze(&request.container_id, true))
    }

    async fn resume_container(&self, _: &TtrpcContext, request: proto::ContainerRequest) -> Answer<proto::Empty> {
        empty(self.containers.freeze(&request.container_id, false))
    }

    async fn stats(&self, _: &TtrpcContext, request: proto::ContainerRequest) -> Answer<proto::StatsResponse> {
        self.containers.process(&request.container_id, "")?;
        let directory = self.containers.cgroup_directory(&request.container_id);
        Ok(stats::read(&directory).map_err(AgentError::failed("reading the container's cgroup failed"))?)
    }

    async fn shutdown(&self, _: &TtrpcContext, _: proto::Empty) -> Answer<proto::Empty> {
        empty(identity::power_off())
    }
}
