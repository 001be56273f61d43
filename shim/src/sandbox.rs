//! containerd's Sandbox API (`api/runtime/sandbox/v1` in its tree), beside the Task API: with `sandboxer = "shim"` it makes, follows and
//! ends the pod's machine by this, and containers in it by the other. Thin: each call says what it wants of the pod.

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest, PlatformResponse,
        SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest, SandboxStatusResponse,
        ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse, StopSandboxRequest,
        StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::{Sandbox, create_sandbox},
    types::platform::Platform,
};
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::{
    clock,
    error::ShimError,
    facts::Facts,
    metrics,
    pod::{Pod, WantedSandbox, carried_through},
    podspec::{self, PodSpec},
    process::State,
};

type Answer<T> = ttrpc::Result<T>;

/// What containerd takes for a pod's state: the names of `PodSandboxState` of the CRI.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox service of one pod.
#[derive(Clone)]
pub(crate) struct SandboxService {
    pod: Arc<Pod>,
}

impl SandboxService {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    pub(crate) fn named(&self) -> HashMap<String, ttrpc::r#async::Service> {
        create_sandbox(Arc::new(self.clone()))
    }

    async fn create(&self, request: &CreateSandboxRequest) -> Result<(), ShimError> {
        let config = podspec::sandbox_config(request.options.as_ref())?;
        let wanted = WantedSandbox {
            pod: PodSpec::of_cri(&request.sandbox_id, &config, &request.netns_path)?,
            bundle: request.bundle_path.clone(),
            // The start was told.
            config: None,
        };
        self.pod.create_sandbox(wanted).await.map(drop)
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    /// Starts the machine as well: whatever is wrong with a pod is told at once.
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> Answer<CreateSandboxResponse> {
        self.create(&request).await.inspect_err(|error| {
            tracing::warn!(sandbox_id = request.sandbox_id, %error, "the sandbox is not created");
        })?;
        tracing::info!(sandbox_id = request.sandbox_id, "the sandbox is created");
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(&self, _: &TtrpcContext, request: StartSandboxRequest) -> Answer<StartSandboxResponse> {
        let sandbox = self.pod.container(&request.sandbox_id)?;
        sandbox.start("").await?;
        Ok(StartSandboxResponse {
            pid: sandbox.pid(),
            created_at: MessageField::some(sandbox.created_at()),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Answer<PlatformResponse> {
        // The guest's, by the names of Go, whatever the node has.
        let platform = Platform {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            ..Default::default()
        };
        Ok(PlatformResponse {
            platform: MessageField::some(platform),
            ..Default::default()
        })
    }

    async fn stop_sandbox(&self, _: &TtrpcContext, request: StopSandboxRequest) -> Answer<StopSandboxResponse> {
        let sandbox = self.pod.container(&request.sandbox_id)?;
        let grace = Duration::from_secs(request.timeout_secs.into());
        carried_through(async move { sandbox.end_machine(grace).await }).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(&self, _: &TtrpcContext, request: WaitSandboxRequest) -> Answer<WaitSandboxResponse> {
        let stopped = self.pod.container(&request.sandbox_id)?.process("")?.stopped();
        let exit = stopped.await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn sandbox_status(&self, _: &TtrpcContext, request: SandboxStatusRequest) -> Answer<SandboxStatusResponse> {
        let sandbox = self.pod.container(&request.sandbox_id)?;
        let mut response = SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: sandbox.pid(),
            state: NOT_READY.to_owned(),
            created_at: MessageField::some(sandbox.created_at()),
            ..Default::default()
        };
        match sandbox.process("")?.state() {
            State::Created => {}
            State::Running => READY.clone_into(&mut response.state),
            State::Stopped(exit) => response.exited_at = MessageField::some(exit.at),
        }
        if let Some(machine) = self.pod.machine().filter(|_| request.verbose) {
            let info = serde_json::to_string(&Facts::of(&machine.info()));
            let info = info.map_err(ShimError::while_doing("writing what there is to say of the machine"))?;
            // The name under which containerd's own sandboxes have theirs.
            response.info.insert("info".to_owned(), info);
        }
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Answer<PingResponse> {
        match self.pod.container(&request.sandbox_id)?.has_stopped() {
            true => Err(ShimError::FailedPrecondition("the pod's machine has ended".to_owned()).into()),
            false => Ok(PingResponse::default()),
        }
    }

    /// Ends whatever there is, also where there is nothing any more.
    async fn shutdown_sandbox(&self, _: &TtrpcContext, _: ShutdownSandboxRequest) -> Answer<ShutdownSandboxResponse> {
        let pod = self.pod.clone();
        carried_through(async move {
            pod.end(Duration::ZERO).await;
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Answer<SandboxMetricsResponse> {
        let sandbox = self.pod.container(&request.sandbox_id)?;
        if sandbox.has_stopped() {
            return Err(ShimError::NotFound("the pod's machine has ended".to_owned()).into());
        }
        let data = metrics::any(&metrics::of_process(sandbox.pid())?)?;
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.id = request.sandbox_id;
        metrics.timestamp = MessageField::some(clock::now());
        metrics.data = MessageField::some(data);
        Ok(response)
    }
}
