//! containerd's Task API, versions 2 and 3. Thin: each call says what it wants of the pod.

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
        DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, PidsResponse,
        ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
        StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    shim_async::{Task, create_task},
};
use protobuf::MessageField;
use ttrpc::r#async::TtrpcContext;

use crate::{
    error::ShimError,
    metrics,
    pod::{Pod, carried_through},
    podspec::Role,
    process::State,
    streams::Stdio,
};

type Answer<T> = ttrpc::Result<T>;

/// The Task service of one pod.
#[derive(Clone)]
pub(crate) struct Service {
    pod: Arc<Pod>,
}

impl Service {
    pub(crate) fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    /// The service under the names of both versions of the API, which do not differ in anything else.
    pub(crate) fn both_versions(&self) -> HashMap<String, ttrpc::r#async::Service> {
        let named = |version: &str| {
            create_task(Arc::new(self.clone()))
                .into_values()
                .map(move |service| (format!("containerd.task.{version}.Task"), service))
                .collect::<Vec<_>>()
        };
        named("v2").into_iter().chain(named("v3")).collect()
    }
}

#[async_trait]
impl Task for Service {
    async fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Answer<CreateTaskResponse> {
        let container = self.pod.create(&request).await.inspect_err(|error| {
            tracing::warn!(container_id = request.id, %error, "the container is not created");
        })?;
        tracing::info!(container_id = request.id, "the container is created");
        Ok(CreateTaskResponse {
            pid: container.pid(),
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Answer<StartResponse> {
        let container = self.pod.container(&request.id)?;
        let pod = self.pod.clone();
        let pid = carried_through(async move { pod.start(&container, &request.exec_id).await }).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Answer<StateResponse> {
        let container = self.pod.container(&request.id)?;
        let process = container.process(&request.exec_id)?;
        let state = process.state();
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: container.bundle().to_owned(),
            pid: container.pid(),
            status: state.status().into(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            ..Default::default()
        };
        match state {
            State::Running if container.is_paused() => response.status = Status::PAUSED.into(),
            State::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = MessageField::some(exit.at);
            }
            _ => {}
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Answer<WaitResponse> {
        let stopped = self.pod.container(&request.id)?.process(&request.exec_id)?.stopped();
        let exit = stopped.await;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Answer<Empty> {
        let container = self.pod.container(&request.id)?;
        container.kill(&request.exec_id, request.signal, request.all).await?;
        Ok(Empty::default())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Answer<DeleteResponse> {
        let pod = self.pod.clone();
        let (exit, pid) = carried_through(async move { pod.delete(&request.id, &request.exec_id).await }).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at),
            ..Default::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Answer<Empty> {
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        // typeurl of the OCI specification's process, whose encoding is JSON.
        let process = request.spec.into_option().unwrap_or_default().value;
        let container = self.pod.container(&request.id)?;
        carried_through(async move { container.exec(&request.exec_id, process, stdio).await }).await?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Answer<Empty> {
        let container = self.pod.container(&request.id)?;
        container
            .resize(&request.exec_id, request.width, request.height)
            .await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Answer<Empty> {
        let process = self.pod.container(&request.id)?.process(&request.exec_id)?;
        if request.stdin {
            process.copies.close_stdin();
        }
        Ok(Empty::default())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Answer<PidsResponse> {
        let container = self.pod.container(&request.id)?;
        // containerd counts them, and takes a container without any for a leaked one.
        let process = ProcessInfo {
            pid: container.pid(),
            ..Default::default()
        };
        Ok(PidsResponse {
            processes: vec![process; container.process_count().await],
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Answer<Empty> {
        let container = self.pod.container(&request.id)?;
        carried_through(async move { container.pause().await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Answer<Empty> {
        let container = self.pod.container(&request.id)?;
        carried_through(async move { container.resume().await }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Answer<Empty> {
        Err(ShimError::Unimplemented("containers in a machine cannot be checkpointed yet".to_owned()).into())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Answer<Empty> {
        let resources = request.resources.into_option().unwrap_or_default().value;
        let pod = self.pod.clone();
        carried_through(async move { pod.update(&request.id, &resources).await }).await?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Answer<StatsResponse> {
        let container = self.pod.container(&request.id)?;
        if container.process("")?.has_stopped() {
            // Not an error to containerd, which measures all containers at once.
            return Err(ShimError::NotFound(format!("the container {} has ended", container.id())).into());
        }
        let metrics = match container.role() {
            Role::Sandbox => metrics::of_process(container.pid())?,
            _ => {
                let stats = container.agent()?.stats(&request.id).await;
                metrics::of_container(stats.map_err(ShimError::from)?)
            }
        };
        Ok(StatsResponse {
            stats: MessageField::some(metrics::any(&metrics)?),
            ..Default::default()
        })
    }

    /// Also of an id that is not known: containerd asks so what became of a container.
    async fn connect(&self, _: &TtrpcContext, _: ConnectRequest) -> Answer<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod.pid(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Answer<Empty> {
        self.pod.close_if_empty();
        Ok(Empty::default())
    }
}
