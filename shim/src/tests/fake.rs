//! A machine without QEMU, with an agent that runs nothing but speaks the real protocol over a real socket.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use coreos_kvm_launcher::{
    accel::Acceleration,
    agent::AgentClient,
    config::Config,
    machine::Machine,
    state::{CloneMode, Origin, ProcessId, Record, VsockAddress},
    vm::{MachineSize, VmExit, VmInfo},
    vsock::VsockDialer,
};
use coreos_kvm_proto::{
    AGENT_PORT,
    agent::{self as proto, stream_hello::Kind},
    agent_ttrpc::{Agent, create_agent},
    frame::{self, Frames},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, watch},
};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use crate::{
    bundle,
    error::ShimError,
    hypervisor::{Hypervisor, RunningMachine, SandboxProcess},
    rootfs::Share,
};

pub(super) const QEMU: u32 = 4711;
/// What the machine starts with, and the memory that it can have.
const START: MachineSize = MachineSize {
    vcpus: 1,
    memory_mib: 512,
};
const LARGEST_MIB: u64 = 4096;

type Key = (String, String);
/// Exit status, and whether it was for want of memory; None as long as the process runs.
type Exit = watch::Sender<Option<(u32, bool)>>;

/// What the test sees and decides of the guest.
#[derive(Default)]
pub(super) struct Guest {
    /// Every call, as `create c1` or `signal c1/e1 15`.
    pub(super) calls: Mutex<Vec<String>>,
    /// A call of this name fails with these words.
    pub(super) fails: Mutex<HashMap<&'static str, &'static str>>,
    /// Calls of this name are not answered until it is set to something else.
    pub(super) held: watch::Sender<&'static str>,
    /// Signals are answered, and nothing else.
    pub(super) deaf: Mutex<bool>,
    /// What processes print, by container.
    pub(super) prints: Mutex<HashMap<String, Vec<u8>>>,
    /// The processes of each container.
    pub(super) pids: Mutex<Vec<u32>>,
    /// What came to a container's stdin, once it has ended.
    pub(super) stdin: Mutex<HashMap<String, Vec<u8>>>,
    pub(super) sandbox: Mutex<Option<proto::ConfigureSandboxRequest>>,
    pub(super) spec: Mutex<Option<serde_json::Value>>,
    exits: Mutex<HashMap<Key, Exit>>,
    /// A process that ends before its start has been answered.
    pub(super) ends_at_once: Mutex<bool>,
}

impl Guest {
    fn called(&self, name: &'static str, what: String) -> ttrpc::Result<()> {
        self.calls
            .lock()
            .unwrap()
            .push(format!("{name} {what}").trim().to_owned());
        match self.fails.lock().unwrap().get(name) {
            Some(words) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
                ttrpc::Code::INTERNAL,
                *words,
            ))),
            None => Ok(()),
        }
    }

    async fn let_go(&self, name: &'static str) {
        self.held.subscribe().wait_for(|held| *held != name).await.unwrap();
    }

    fn exit(&self, container: &str, exec: &str) -> Exit {
        let mut exits = self.exits.lock().unwrap();
        exits
            .entry((container.to_owned(), exec.to_owned()))
            .or_insert_with(|| watch::Sender::new(None))
            .clone()
    }

    /// Ends a process.
    pub(super) fn end(&self, container: &str, exec: &str, status: u32) {
        self.exit(container, exec).send_replace(Some((status, false)));
    }

    pub(super) fn end_for_want_of_memory(&self, container: &str) {
        self.exit(container, "").send_replace(Some((137, true)));
    }

    async fn ended(&self, container: &str, exec: &str) -> (u32, bool) {
        let mut exit = self.exit(container, exec).subscribe();
        exit.wait_for(Option::is_some).await.unwrap().unwrap()
    }

    /// One connection, with the words of the vsock device first.
    async fn connected(self: Arc<Self>, stream: UnixStream, rpc: mpsc::UnboundedSender<std::io::Result<UnixStream>>) {
        let mut stream = BufReader::with_capacity(1, stream);
        let mut words = String::new();
        stream.read_line(&mut words).await.unwrap();
        let mut stream = stream.into_inner();
        stream.write_all(b"OK 1\n").await.unwrap();
        if words == format!("CONNECT {AGENT_PORT}\n") {
            let _ = rpc.send(Ok(stream));
            return;
        }
        let hello = frame::read_hello(&mut stream).await.unwrap();
        let container = hello.container_id.clone();
        if hello.kind.enum_value() == Ok(Kind::STDIN) {
            let (mut frames, mut all) = (Frames::new(stream), Vec::new());
            while let Ok(Some(bytes)) = frames.next().await {
                all.extend_from_slice(bytes);
            }
            self.stdin.lock().unwrap().insert(container, all);
            return;
        }
        self.ended(&container, &hello.exec_id).await;
        let text = self.prints.lock().unwrap().get(&container).cloned().unwrap_or_default();
        for part in text.chunks(50_000) {
            let mut part = [&[0; frame::HEADER], part].concat();
            if frame::write(&mut stream, &mut part).await.is_err() {
                return;
            }
        }
        let _ = frame::write_end(&mut stream).await;
    }
}

struct FakeAgent(Arc<Guest>);

fn name(request: &proto::ProcessRequest) -> String {
    match request.exec_id.as_str() {
        "" => request.container_id.clone(),
        exec => format!("{}/{exec}", request.container_id),
    }
}

#[async_trait]
impl Agent for FakeAgent {
    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: proto::ConfigureSandboxRequest,
    ) -> ttrpc::Result<proto::Empty> {
        self.0.called("configure", request.sandbox_id.clone())?;
        *self.0.sandbox.lock().unwrap() = Some(request);
        Ok(proto::Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: proto::CreateContainerRequest,
    ) -> ttrpc::Result<proto::CreateProcessResponse> {
        self.0.called("create", request.container_id.clone())?;
        self.0.let_go("create").await;
        *self.0.spec.lock().unwrap() = Some(serde_json::from_slice(&request.spec).unwrap());
        Ok(proto::CreateProcessResponse::default())
    }

    async fn create_exec(&self, _: &TtrpcContext, request: proto::CreateExecRequest) -> ttrpc::Result<proto::Empty> {
        self.0
            .called("exec", format!("{}/{}", request.container_id, request.exec_id))?;
        self.0.let_go("exec").await;
        Ok(proto::Empty::default())
    }

    async fn start_process(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> ttrpc::Result<proto::CreateProcessResponse> {
        self.0.called("start", name(&request))?;
        self.0.let_go("start").await;
        if *self.0.ends_at_once.lock().unwrap() {
            self.0.end(&request.container_id, &request.exec_id, 3);
            // Long enough for the news of the end to overtake the answer.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(proto::CreateProcessResponse::default())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> ttrpc::Result<proto::WaitProcessResponse> {
        let (exit_status, oom_killed) = self.0.ended(&request.container_id, &request.exec_id).await;
        Ok(proto::WaitProcessResponse {
            exit_status,
            oom_killed,
            ..Default::default()
        })
    }

    async fn signal_process(
        &self,
        _: &TtrpcContext,
        request: proto::SignalProcessRequest,
    ) -> ttrpc::Result<proto::Empty> {
        self.0
            .called("signal", format!("{} {}", request.container_id, request.signal))?;
        self.0.let_go("signal").await;
        if !*self.0.deaf.lock().unwrap() {
            self.0
                .end(&request.container_id, &request.exec_id, 128 + request.signal);
        }
        Ok(proto::Empty::default())
    }

    async fn delete_process(
        &self,
        _: &TtrpcContext,
        request: proto::ProcessRequest,
    ) -> ttrpc::Result<proto::WaitProcessResponse> {
        self.0.called("delete", name(&request))?;
        self.0.let_go("delete").await;
        self.0.end(&request.container_id, &request.exec_id, 137);
        Ok(proto::WaitProcessResponse::default())
    }

    async fn release_volumes(
        &self,
        _: &TtrpcContext,
        request: proto::ReleaseVolumesRequest,
    ) -> ttrpc::Result<proto::Empty> {
        self.0.called("release", request.folders.join(" "))?;
        Ok(proto::Empty::default())
    }

    async fn update_resources(
        &self,
        _: &TtrpcContext,
        request: proto::UpdateResourcesRequest,
    ) -> ttrpc::Result<proto::Empty> {
        self.0.called("update", request.container_id)?;
        Ok(proto::Empty::default())
    }

    async fn list_pids(
        &self,
        _: &TtrpcContext,
        request: proto::ContainerRequest,
    ) -> ttrpc::Result<proto::ListPidsResponse> {
        self.0.called("pids", request.container_id)?;
        self.0.let_go("pids").await;
        Ok(proto::ListPidsResponse {
            pids: self.0.pids.lock().unwrap().clone(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, _: proto::ContainerRequest) -> ttrpc::Result<proto::StatsResponse> {
        Ok(proto::StatsResponse {
            memory_usage: 4096,
            ..Default::default()
        })
    }
}

/// The machine: as long as it lives its agent answers.
pub(super) struct FakeMachine {
    agent: AgentClient,
    share: Share,
    exit: watch::Sender<Option<VmExit>>,
    accepting: tokio::task::JoinHandle<()>,
    server: tokio::sync::Mutex<Option<Server>>,
    size: Mutex<MachineSize>,
    guest: Arc<Guest>,
}

impl FakeMachine {
    pub(super) async fn new(root: &Path, guest: &Arc<Guest>) -> Arc<Self> {
        let socket = root.join("guest.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let (rpc, connections) = mpsc::unbounded_channel();
        let incoming = futures::stream::unfold(connections, |mut connections| async {
            Some((connections.recv().await?, connections))
        });
        let mut server = Server::new()
            .add_listener(Listener::new(incoming))
            .register_service(create_agent(Arc::new(FakeAgent(guest.clone()))));
        server.start().await.unwrap();
        let (guest, resized) = (guest.clone(), guest.clone());
        let accepting = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(guest.clone().connected(stream, rpc.clone()));
            }
        });
        let shared = root.join("shared");
        std::fs::create_dir(&shared).unwrap();
        Arc::new(Self {
            agent: AgentClient::new(VsockDialer::new(VsockAddress::Socket(socket)), None),
            share: Share {
                points: shared.clone(),
                shared,
            },
            exit: watch::Sender::new(None),
            size: Mutex::new(START),
            guest: resized,
            accepting,
            server: tokio::sync::Mutex::new(Some(server)),
        })
    }

    /// The end of the agent and of all connections, of which the machine knows nothing.
    pub(super) async fn lose_agent(&self) {
        self.accepting.abort();
        if let Some(mut server) = self.server.lock().await.take() {
            server.disconnect().await;
        }
    }

    /// The machine's end, and with it that of all connections.
    pub(super) async fn die(&self, reason: &str, orderly: bool) {
        self.lose_agent().await;
        let exit = VmExit {
            reason: reason.to_owned(),
            orderly,
            console: Vec::new(),
        };
        self.exit.send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(exit);
            }
            first
        });
    }
}

impl RunningMachine for FakeMachine {
    fn agent(&self) -> &AgentClient {
        &self.agent
    }

    fn info(&self) -> VmInfo {
        VmInfo {
            record: Record {
                id: "sandbox".to_owned(),
                guest: "reference".to_owned(),
                launcher: None,
                qemu: Some(ProcessId {
                    pid: QEMU,
                    start_time: 1,
                }),
                helpers: Vec::new(),
                vsock: Some(VsockAddress::Cid(3)),
                acceleration: Some(Acceleration::Tcg),
                acceleration_reason: Some("a trial took too long".to_owned()),
                origin: Some(Origin::Clone {
                    template: "0123abcd".to_owned(),
                    mode: CloneMode::CopyOnWrite,
                }),
                vcpus: START.vcpus,
                memory_mib: START.memory_mib,
                netns: None,
                cgroup: None,
                uid: None,
            },
            console: "/run/coreos-kvm/sandbox/console.log".into(),
        }
    }

    fn share(&self) -> Share {
        self.share.clone()
    }
}

#[async_trait]
impl SandboxProcess for FakeMachine {
    fn pid(&self) -> u32 {
        QEMU
    }

    async fn exited(&self) -> VmExit {
        self.exit
            .subscribe()
            .wait_for(Option::is_some)
            .await
            .unwrap()
            .clone()
            .unwrap()
    }

    async fn shutdown(&self, _: Duration) -> Result<(), ShimError> {
        self.guest.let_go("shutdown").await;
        self.die("QEMU was killed", false).await;
        Ok(())
    }

    async fn pause(&self) -> Result<(), ShimError> {
        Ok(())
    }

    async fn resume(&self) -> Result<(), ShimError> {
        Ok(())
    }

    async fn grow(&self, wanted: MachineSize) -> Result<(), ShimError> {
        if wanted.memory_mib > LARGEST_MIB {
            return Err(ShimError::InvalidArgument("the machine would be too large".to_owned()));
        }
        self.change(|now| MachineSize {
            vcpus: now.vcpus.max(wanted.vcpus),
            memory_mib: now.memory_mib.max(wanted.memory_mib),
        });
        Ok(())
    }

    async fn shrink(&self, wanted: MachineSize) -> Result<(), ShimError> {
        self.change(|now| MachineSize {
            vcpus: now.vcpus.min(wanted.vcpus.max(START.vcpus)),
            memory_mib: now.memory_mib.min(wanted.memory_mib.max(START.memory_mib)),
        });
        Ok(())
    }
}

impl FakeMachine {
    fn change(&self, change: impl FnOnce(MachineSize) -> MachineSize) {
        let mut now = self.size.lock().unwrap();
        let new = change(*now);
        if std::mem::replace(&mut *now, new) != new {
            let what = format!("{} {}", new.vcpus, new.memory_mib);
            let _ = self.guest.called("size", what);
        }
    }
}

/// How a machine's start goes.
pub(super) enum Start {
    Works(Arc<FakeMachine>),
    Fails(&'static str),
    Hangs,
}

/// Hands out one machine.
pub(super) struct FakeHypervisor {
    pub(super) start: Start,
    pub(super) described: Arc<Mutex<Option<Machine>>>,
    pub(super) removed: Arc<Mutex<Vec<String>>>,
}

#[async_trait]
impl Hypervisor for FakeHypervisor {
    async fn start(&self, _: &Config, machine: Machine) -> Result<Arc<dyn RunningMachine>, ShimError> {
        *self.described.lock().unwrap() = Some(machine.clone());
        match &self.start {
            Start::Works(started) => {
                if let Some(sandbox) = &machine.sandbox {
                    started.agent().configure_sandbox(sandbox).await?;
                }
                Ok(started.clone())
            }
            Start::Fails(words) => Err(ShimError::Internal((*words).to_owned())),
            Start::Hangs => std::future::pending().await,
        }
    }

    async fn remove(&self, record: &bundle::Record) -> Result<(), ShimError> {
        self.removed.lock().unwrap().push(record.machine.clone());
        Ok(())
    }
}
