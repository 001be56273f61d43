//! The client of the agent inside the guest. The guest is not trusted: every call has a deadline, every answer a bound, and
//! its words are made harmless before they reach a log or a person.

use std::{future::Future, io, path::PathBuf, time::Duration};

use coreos_kvm_proto::{
    AGENT_PORT,
    agent::{self as proto, StatsResponse, Streams, create_container_request},
    agent_ttrpc::AgentClient as Rpc,
};
use tokio::{sync::Mutex, time::Instant};
use ttrpc::{
    asynchronous::{Client, transport::Socket},
    context::{Context, with_duration},
};

use crate::{console::harmless, vsock::VsockDialer};

mod forward;
mod output;
mod stream;

pub use output::{OutputWindow, StreamReader};
pub use stream::{Stream, StreamWriter};

/// Calls that only look or signal.
const SHORT: Duration = Duration::from_secs(10);
/// Calls that make something: a container's first start reads its program through virtiofs.
const LONG: Duration = Duration::from_secs(60);
/// How much later than here a call's time is over at the agent, and with the client's own clock. It must not be first: the client
/// would not tell a late answer from a lost connection.
const LATER: Duration = Duration::from_secs(1);
/// Longest text of the guest that goes into an error, in bytes.
const TEXT_MAX: usize = 1024;

/// What the agent did not do.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    Unimplemented(String),
    #[error("the agent in the guest could not {what}: {message}")]
    Failed { what: &'static str, message: String },
    #[error("the agent in the guest did not answer in time when it was to {what}")]
    Timeout { what: &'static str },
    #[error("the agent in the guest cannot be reached to {what}")]
    Unreachable {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("the connection to the agent in the guest was lost when it was to {what}")]
    Lost { what: &'static str },
}

impl AgentError {
    /// The agent has not answered: whether it did what it was to do is not known.
    pub fn is_silence(&self) -> bool {
        matches!(
            self,
            Self::Timeout { .. } | Self::Unreachable { .. } | Self::Lost { .. }
        )
    }
}

/// Whose process namespace a container is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Processes {
    /// As its specification says: one of its own, or the guest's.
    Own,
    /// One that containers of the pod share.
    Pod,
    /// That of the container of this id.
    Container(String),
}

/// A process in the guest: an init of a container, or an exec in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessName<'a> {
    pub container_id: &'a str,
    /// Empty for the container's init.
    pub exec_id: &'a str,
}

impl ProcessName<'_> {
    fn request(self) -> proto::ProcessRequest {
        proto::ProcessRequest {
            container_id: self.container_id.to_owned(),
            exec_id: self.exec_id.to_owned(),
            ..Default::default()
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessExit {
    /// 0 to 255; of a process ended by signal N: 128 + N.
    pub status: u32,
    /// Guest's wall clock, nanoseconds since the epoch.
    pub at_ns: i64,
    pub oom_killed: bool,
}

impl From<proto::WaitProcessResponse> for ProcessExit {
    fn from(said: proto::WaitProcessResponse) -> Self {
        Self {
            status: said.exit_status & 0xff,
            at_ns: said.exited_at_ns,
            oom_killed: said.oom_killed,
        }
    }
}

/// The client. One connection, made when it is first needed and made anew when it was lost.
pub struct AgentClient {
    dialer: VsockDialer,
    output: Option<OutputWindow>,
    // Held while dialing: whoever comes meanwhile wants the same connection.
    connection: Mutex<Option<Client>>,
}

impl AgentClient {
    /// Much output comes in `output`, if the machine has it and this is its only client.
    pub fn new(dialer: VsockDialer, output: Option<OutputWindow>) -> Self {
        Self {
            dialer,
            output,
            connection: Mutex::new(None),
        }
    }

    /// # Errors
    /// Of [`AgentError`], as of every method here.
    pub async fn info(&self) -> Result<proto::InfoResponse, AgentError> {
        let request = proto::InfoRequest::default();
        self.call("say what it is", SHORT, async |rpc, context| {
            rpc.info(context, &request).await
        })
        .await
    }

    pub async fn configure_sandbox(&self, request: &proto::ConfigureSandboxRequest) -> Result<(), AgentError> {
        self.call("make the guest the pod's", LONG, async |rpc, context| {
            rpc.configure_sandbox(context, request).await
        })
        .await
        .map(drop)
    }

    /// Moves the guest's wall clock by so many nanoseconds, at once or half a millisecond a second. Answers what it then is, in
    /// nanoseconds since the epoch.
    pub async fn adjust_clock(&self, by_ns: i64, slowly: bool) -> Result<i64, AgentError> {
        let request = proto::AdjustClockRequest {
            by_ns,
            slowly,
            ..Default::default()
        };
        let answer = self.call("adjust its clock", SHORT, async |rpc, context| {
            rpc.adjust_clock(context, &request).await
        });
        Ok(answer.await?.wall_clock_ns)
    }

    pub async fn configure_network(&self, request: &proto::ConfigureNetworkRequest) -> Result<(), AgentError> {
        self.call("set up the network", LONG, async |rpc, context| {
            rpc.configure_network(context, request).await
        })
        .await
        .map(drop)
    }

    /// Has the guest use so many processors, and at least so much memory. Answers how many processors it uses,
    /// and how much memory it could do without.
    pub async fn take_size(&self, vcpus: u32, memory_mib: u64) -> Result<proto::TakeSizeResponse, AgentError> {
        let request = proto::TakeSizeRequest {
            vcpus,
            memory_mib,
            ..Default::default()
        };
        self.call("use what it has been given", LONG, async |rpc, context| {
            rpc.take_size(context, &request).await
        })
        .await
    }

    /// Creates a container from its OCI specification (JSON, with the guest's paths), for which the pod's /dev/shm holds `shm_size` bytes at
    /// least. Answers the init's pid in the guest.
    pub async fn create_container(
        &self,
        id: &str,
        spec: Vec<u8>,
        streams: Streams,
        processes: Processes,
        shm_size: u64,
    ) -> Result<u32, AgentError> {
        let request = proto::CreateContainerRequest {
            container_id: id.to_owned(),
            spec,
            streams: Some(streams).into(),
            processes: match processes {
                Processes::Own => None,
                Processes::Pod => Some(create_container_request::Processes::OfPod(true)),
                Processes::Container(id) => Some(create_container_request::Processes::OfContainer(id)),
            },
            shm_size,
            ..Default::default()
        };
        let answer = self.call("create the container", LONG, async |rpc, context| {
            rpc.create_container(context, &request).await
        });
        Ok(made(id, "", &answer.await?))
    }

    /// Prepares a process in a container from the `process` object of the OCI specification (JSON).
    pub async fn create_exec(
        &self,
        name: ProcessName<'_>,
        process: Vec<u8>,
        streams: Streams,
    ) -> Result<(), AgentError> {
        let request = exec_request(name, process, streams);
        self.call("prepare the process", SHORT, async |rpc, context| {
            rpc.create_exec(context, &request).await
        })
        .await
        .map(drop)
    }

    /// Prepares a process in the guest's own namespaces.
    pub async fn create_guest_exec(&self, exec_id: &str, process: Vec<u8>, streams: Streams) -> Result<(), AgentError> {
        let name = ProcessName {
            container_id: coreos_kvm_proto::GUEST_CONTAINER_ID,
            exec_id,
        };
        let request = exec_request(name, process, streams);
        self.call("prepare the process", SHORT, async |rpc, context| {
            rpc.create_guest_exec(context, &request).await
        })
        .await
        .map(drop)
    }

    /// Runs a prepared process. Answers its pid in the guest.
    pub async fn start_process(&self, name: ProcessName<'_>) -> Result<u32, AgentError> {
        let request = name.request();
        let answer = self.call("start the process", LONG, async |rpc, context| {
            rpc.start_process(context, &request).await
        });
        Ok(made(name.container_id, name.exec_id, &answer.await?))
    }

    /// Waits until the process has ended, however long that takes. The machine's end ends this call too.
    pub async fn wait_process(&self, name: ProcessName<'_>) -> Result<ProcessExit, AgentError> {
        let what = "wait for the process";
        let request = name.request();
        let rpc = self.connect(what).await?;
        match rpc.wait_process(Context::default(), &request).await {
            Ok(said) => Ok(said.into()),
            Err(error) => Err(self.judge(what, error).await),
        }
    }

    pub async fn signal_process(&self, name: ProcessName<'_>, signal: u32, all: bool) -> Result<(), AgentError> {
        let request = proto::SignalProcessRequest {
            container_id: name.container_id.to_owned(),
            exec_id: name.exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.call("signal the process", SHORT, async |rpc, context| {
            rpc.signal_process(context, &request).await
        })
        .await
        .map(drop)
    }

    pub async fn resize_pty(&self, name: ProcessName<'_>, columns: u32, rows: u32) -> Result<(), AgentError> {
        let request = proto::ResizePtyRequest {
            container_id: name.container_id.to_owned(),
            exec_id: name.exec_id.to_owned(),
            columns,
            rows,
            ..Default::default()
        };
        self.call("resize the terminal", SHORT, async |rpc, context| {
            rpc.resize_pty(context, &request).await
        })
        .await
        .map(drop)
    }

    /// Forgets an ended or never started process; of an init, the whole container.
    pub async fn delete_process(&self, name: ProcessName<'_>) -> Result<ProcessExit, AgentError> {
        let request = name.request();
        let answer = self.call("delete the process", LONG, async |rpc, context| {
            rpc.delete_process(context, &request).await
        });
        Ok(answer.await?.into())
    }

    /// Lets go of folders below the shared directory that no container uses any more.
    pub async fn release_volumes(&self, folders: &[PathBuf]) -> Result<(), AgentError> {
        let request = proto::ReleaseVolumesRequest {
            folders: folders.iter().map(|folder| folder.display().to_string()).collect(),
            ..Default::default()
        };
        self.call("let go of volumes", SHORT, async |rpc, context| {
            rpc.release_volumes(context, &request).await
        })
        .await
        .map(drop)
    }

    /// Processes of the container, as pids in the guest.
    pub async fn list_pids(&self, container_id: &str) -> Result<Vec<u32>, AgentError> {
        let request = container_request(container_id);
        let answer = self.call("list the processes", SHORT, async |rpc, context| {
            rpc.list_pids(context, &request).await
        });
        Ok(answer.await?.pids)
    }

    /// Changes the limits of a container: the `linux.resources` object of the OCI specification (JSON).
    pub async fn update_resources(&self, container_id: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = proto::UpdateResourcesRequest {
            container_id: container_id.to_owned(),
            resources,
            ..Default::default()
        };
        self.call("change the container's limits", SHORT, async |rpc, context| {
            rpc.update_resources(context, &request).await
        })
        .await
        .map(drop)
    }

    pub async fn pause_container(&self, container_id: &str) -> Result<(), AgentError> {
        let request = container_request(container_id);
        self.call("pause the container", SHORT, async |rpc, context| {
            rpc.pause_container(context, &request).await
        })
        .await
        .map(drop)
    }

    pub async fn resume_container(&self, container_id: &str) -> Result<(), AgentError> {
        let request = container_request(container_id);
        self.call("resume the container", SHORT, async |rpc, context| {
            rpc.resume_container(context, &request).await
        })
        .await
        .map(drop)
    }

    pub async fn stats(&self, container_id: &str) -> Result<StatsResponse, AgentError> {
        let request = container_request(container_id);
        self.call("measure the container", SHORT, async |rpc, context| {
            rpc.stats(context, &request).await
        })
        .await
    }

    /// Asks the guest to power off.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        let request = proto::Empty::default();
        self.call("power off", SHORT, async |rpc, context| {
            rpc.shutdown(context, &request).await
        })
        .await
        .map(drop)
    }

    /// A connection for one stream of a process, which need not be there yet. The guest keeps it for 10 s.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn stream(&self) -> io::Result<Stream> {
        Stream::dial(&self.dialer, self.output.clone()).await
    }

    /// What the process writes to its stdout or stderr.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn output(&self, name: ProcessName<'_>, stderr: bool) -> io::Result<StreamReader> {
        self.stream().await?.output(name, stderr).await
    }

    /// The process's stdin.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn input(&self, name: ProcessName<'_>) -> io::Result<StreamWriter> {
        self.stream().await?.input(name).await
    }

    async fn call<T, F: Future<Output = ttrpc::Result<T>>>(
        &self,
        what: &'static str,
        deadline: Duration,
        call: impl FnOnce(Rpc, Context) -> F,
    ) -> Result<T, AgentError> {
        let begin = Instant::now();
        let rpc = self.connect(what).await?;
        // The deadline goes to the agent as well, but it is not the agent who is trusted to keep it.
        let answer = tokio::time::timeout(deadline, call(rpc, with_duration(deadline + LATER))).await;
        tracing::debug!(took = ?begin.elapsed(), "the agent was asked to {what}");
        match answer {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.judge(what, error).await),
            Err(_) => Err(AgentError::Timeout { what }),
        }
    }

    async fn connect(&self, what: &'static str) -> Result<Rpc, AgentError> {
        let mut connection = self.connection.lock().await;
        if let Some(client) = connection.as_ref() {
            return Ok(Rpc::new(client.clone()));
        }
        let stream = self.dialer.dial(AGENT_PORT).await;
        let stream = stream.map_err(|source| AgentError::Unreachable { what, source })?;
        let client = Client::new(Socket::new(stream));
        *connection = Some(client.clone());
        Ok(Rpc::new(client))
    }

    /// What an error of ttrpc means; a connection that broke is not used again.
    async fn judge(&self, what: &'static str, error: ttrpc::Error) -> AgentError {
        let ttrpc::Error::RpcStatus(status) = error else {
            *self.connection.lock().await = None;
            return AgentError::Lost { what };
        };
        let message = harmless(&status.message().chars().take(TEXT_MAX).collect::<String>());
        match status.code() {
            ttrpc::Code::NOT_FOUND => AgentError::NotFound(message),
            ttrpc::Code::ALREADY_EXISTS => AgentError::AlreadyExists(message),
            ttrpc::Code::INVALID_ARGUMENT => AgentError::InvalidArgument(message),
            ttrpc::Code::FAILED_PRECONDITION => AgentError::FailedPrecondition(message),
            ttrpc::Code::UNIMPLEMENTED => AgentError::Unimplemented(message),
            ttrpc::Code::DEADLINE_EXCEEDED => AgentError::Timeout { what },
            _ => AgentError::Failed { what, message },
        }
    }
}

fn made(container_id: &str, exec_id: &str, answer: &proto::CreateProcessResponse) -> u32 {
    let in_guest_us = answer.took_ns / 1000;
    tracing::debug!(container_id, exec_id, in_guest_us, "the guest has done its part");
    answer.pid
}

fn container_request(container_id: &str) -> proto::ContainerRequest {
    proto::ContainerRequest {
        container_id: container_id.to_owned(),
        ..Default::default()
    }
}

fn exec_request(name: ProcessName<'_>, process: Vec<u8>, streams: Streams) -> proto::CreateExecRequest {
    proto::CreateExecRequest {
        container_id: name.container_id.to_owned(),
        exec_id: name.exec_id.to_owned(),
        process,
        streams: Some(streams).into(),
        ..Default::default()
    }
}
