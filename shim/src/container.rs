//! One container of the pod: its files on the host, its processes in the guest.

pub(crate) mod end;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    api::Mount,
    events::task::{TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart},
};
use coreos_kvm_launcher::agent::{AgentClient, AgentError, Processes};
use oci_spec::runtime::{LinuxResources, Spec};
use protobuf::{MessageField, well_known_types::timestamp::Timestamp};
use tokio::time::{Instant, timeout};

use crate::{
    clock,
    error::ShimError,
    events::Events,
    guestspec,
    hypervisor::{RunningMachine, SandboxProcess},
    limits::Limits,
    pod_volumes::PodVolumes,
    podspec::Role,
    process::{Exit, KILLED, Process, State},
    rootfs::ContainerFiles,
    streams::{Connections, Stdio},
};

/// How long the guest may take to count a container's processes: containerd asks for them when it starts, and has 5 s for a shim.
const COUNT: Duration = Duration::from_secs(2);
/// A guest may say any number. So many of them are far below the 4 MiB of a message.
const COUNT_MAX: usize = 1 << 15;

/// A container, known to containerd by its id.
pub(crate) struct Container {
    id: String,
    bundle: String,
    role: Role,
    sandbox: Arc<dyn SandboxProcess>,
    /// The machine that it is in. None of a sandbox: it is the machine.
    machine: Option<Arc<dyn RunningMachine>>,
    events: Events,
    init: Arc<Process>,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
    files: Mutex<Option<ContainerFiles>>,
    paused: AtomicBool,
    killed: AtomicBool,
    limits: Mutex<Limits>,
    created_at: Timestamp,
}

/// What containerd wants to have created.
pub(crate) struct Wanted<'a> {
    pub(crate) id: &'a str,
    pub(crate) bundle: &'a str,
    pub(crate) role: Role,
    pub(crate) spec: Spec,
    pub(crate) rootfs: &'a [Mount],
    pub(crate) stdio: Stdio,
    /// Whose process namespace it is in.
    pub(crate) processes: Processes,
    /// What the pod's containers have in common.
    pub(crate) volumes: &'a PodVolumes,
}

impl Container {
    /// The sandbox of a pod. It is the machine, and has no process in it.
    pub(crate) fn sandbox(
        process: Arc<dyn SandboxProcess>,
        events: Events,
        id: &str,
        bundle: &str,
        stdio: Stdio,
        limits: Limits,
    ) -> Arc<Self> {
        let init = Process::new(id, "", stdio);
        Arc::new(Self::new(process, events, bundle, Role::Sandbox, init, limits))
    }

    fn new(
        sandbox: Arc<dyn SandboxProcess>,
        events: Events,
        bundle: &str,
        role: Role,
        init: Arc<Process>,
        limits: Limits,
    ) -> Self {
        Self {
            id: init.name().container_id.to_owned(),
            bundle: bundle.to_owned(),
            role,
            sandbox,
            machine: None,
            events,
            init,
            execs: Mutex::default(),
            files: Mutex::default(),
            paused: AtomicBool::new(false),
            killed: AtomicBool::new(false),
            limits: Mutex::new(limits),
            created_at: clock::now(),
        }
    }

    /// Creates the container in the machine; its init then waits for its start.
    ///
    /// # Errors
    /// When the host or the guest cannot make it; nothing of it is left then.
    pub(crate) async fn create(
        machine: Arc<dyn RunningMachine>,
        events: Events,
        wanted: Wanted<'_>,
    ) -> Result<Arc<Self>, ShimError> {
        let stdio = wanted.stdio.open().await?;
        let init = Process::new(wanted.id, "", wanted.stdio);
        let limits = Limits::of(&wanted.spec);
        let root = root_of(wanted.bundle, &wanted.spec);
        let (share, id, rootfs) = (machine.share(), wanted.id.to_owned(), wanted.rootfs.to_vec());
        let volumes = wanted.volumes.clone();
        // On another thread: a root of many layers is mounted from a working directory of that thread's own.
        let mounting =
            tokio::task::spawn_blocking(move || ContainerFiles::of(share, &volumes, &id, wanted.spec, &rootfs, &root));
        let (inside, mut files) = mounting
            .await
            .map_err(ShimError::while_doing("mounting the container's files"))??;
        let json = serde_json::to_vec(&inside.spec).map_err(ShimError::while_doing("writing the specification"))?;
        let agent = machine.agent();
        let mut silent = false;
        let created = async {
            agent
                .create_container(wanted.id, json, init.stdio.wanted(), wanted.processes, inside.shm_size)
                .await
                .inspect_err(|error| silent = error.is_silence())?;
            let connected = async {
                let connections = Connections::dial(agent, &init.stdio).await?;
                init.copies.start(init.name(), stdio, connections).await
            };
            if let Err(error) = connected.await {
                if let Err(problem) = agent.delete_process(init.name()).await {
                    silent = problem.is_silence();
                    tracing::warn!(container_id = wanted.id, %problem, "the guest still has the container");
                }
                return Err(error);
            }
            Ok(())
        };
        if let Err(error) = created.await {
            // Who does not answer is not asked again.
            if !silent {
                release_volumes(&*machine, wanted.id, &mut files).await;
            }
            unmount(wanted.id, files);
            return Err(error);
        }
        let mut container = Self::new(machine.clone(), events, wanted.bundle, wanted.role, init, limits);
        container.machine = Some(machine);
        container.files = Mutex::new(Some(files));
        let container = Arc::new(container);
        container.watch(container.init.clone());
        Ok(container)
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn bundle(&self) -> &str {
        &self.bundle
    }

    pub(crate) fn role(&self) -> Role {
        self.role
    }

    pub(crate) fn is_sandbox(&self) -> bool {
        self.role == Role::Sandbox
    }

    /// The pid of all its processes, see [`SandboxProcess::pid`].
    pub(crate) fn pid(&self) -> u32 {
        self.sandbox.pid()
    }

    /// How many processes are in it, at least one: also where the guest does not tell soon.
    pub(crate) async fn process_count(&self) -> usize {
        let Some(machine) = self.machine.as_ref().filter(|_| self.init.is_running()) else {
            return 1;
        };
        match timeout(COUNT, machine.agent().list_pids(&self.id)).await {
            Ok(Ok(pids)) => pids.len().clamp(1, COUNT_MAX),
            Ok(Err(error)) => {
                tracing::debug!(container_id = self.id, %error, "the guest does not tell a container's processes");
                1
            }
            Err(_) => 1,
        }
    }

    /// The machine that it is, or is in.
    pub(crate) fn sandbox_process(&self) -> &Arc<dyn SandboxProcess> {
        &self.sandbox
    }

    /// The agent that has its processes.
    ///
    /// # Errors
    /// Of a sandbox, which has none.
    pub(crate) fn agent(&self) -> Result<&AgentClient, ShimError> {
        let machine = self.machine.as_ref().ok_or_else(|| {
            ShimError::Unimplemented(
                "a sandbox has no processes: `coreos-kvm exec` runs commands in the guest itself".to_owned(),
            )
        })?;
        Ok(machine.agent())
    }

    pub(crate) fn created_at(&self) -> Timestamp {
        self.created_at.clone()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// The process of that name; an empty one is the init's.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, ShimError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        self.execs()
            .get(exec_id)
            .cloned()
            .ok_or_else(|| ShimError::NotFound(format!("there is no process {exec_id} in the container {}", self.id)))
    }

    /// Prepares a further process: `spec` is the `process` object of the OCI specification (JSON).
    pub(crate) async fn exec(&self, exec_id: &str, spec: Vec<u8>, stdio: Stdio) -> Result<(), ShimError> {
        let agent = self.agent()?;
        if !self.init.is_running() {
            return Err(self.does_not_run());
        }
        let process = Process::new(&self.id, exec_id, stdio);
        {
            let mut execs = self.execs();
            if execs.contains_key(exec_id) {
                return Err(ShimError::AlreadyExists(format!(
                    "there is a process {exec_id} already"
                )));
            }
            execs.insert(exec_id.to_owned(), process.clone());
        }
        let begin = Instant::now();
        let prepared = async {
            let stdio = process.stdio.open().await?;
            // At the same time: each is a way to the guest and back.
            let (created, connections) = tokio::join!(
                agent.create_exec(process.name(), spec, process.stdio.wanted()),
                Connections::dial(agent, &process.stdio),
            );
            created?;
            let started = async { process.copies.start(process.name(), stdio, connections?).await }.await;
            if started.is_ok() && self.init.is_running() {
                return Ok(());
            }
            if let Err(problem) = agent.delete_process(process.name()).await {
                tracing::debug!(container_id = self.id, exec_id, %problem, "the guest still has the process");
            }
            started.and(Err(self.does_not_run()))
        };
        if let Err(error) = prepared.await {
            self.execs().remove(exec_id);
            return Err(error);
        }
        tracing::debug!(
            container_id = self.id,
            exec_id,
            took_us = begin.elapsed().as_micros(),
            "the process is prepared"
        );
        self.events.publish(&TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        });
        Ok(())
    }

    fn does_not_run(&self) -> ShimError {
        ShimError::FailedPrecondition(format!("the container {} does not run", self.id))
    }

    /// Starts the init or a prepared process.
    pub(crate) async fn start(self: &Arc<Self>, exec_id: &str) -> Result<(), ShimError> {
        let begin = Instant::now();
        let process = self.process(exec_id)?;
        let _turn = process.turn().await;
        match process.state() {
            State::Created => {}
            State::Running => return Err(ShimError::FailedPrecondition("the process runs already".to_owned())),
            State::Stopped(_) => {
                return Err(ShimError::FailedPrecondition(
                    "the process has ended already".to_owned(),
                ));
            }
        }
        if !process.is_init() && !self.init.is_running() {
            return Err(self.does_not_run());
        }
        if let Some(machine) = &self.machine {
            machine.agent().start_process(process.name()).await?;
        }
        process.set_running();
        tracing::debug!(
            container_id = self.id,
            exec_id,
            took_us = begin.elapsed().as_micros(),
            "the process runs"
        );
        if process.is_init() {
            self.events.publish(&TaskStart {
                container_id: self.id.clone(),
                pid: self.pid(),
                ..Default::default()
            });
        } else {
            self.events.publish(&TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: exec_id.to_owned(),
                pid: self.pid(),
                ..Default::default()
            });
            self.watch(process.clone());
        }
        Ok(())
    }

    pub(crate) async fn resize(&self, exec_id: &str, columns: u32, rows: u32) -> Result<(), ShimError> {
        let process = self.process(exec_id)?;
        Ok(self.agent()?.resize_pty(process.name(), columns, rows).await?)
    }

    pub(crate) async fn pause(&self) -> Result<(), ShimError> {
        match &self.machine {
            None => self.sandbox.pause().await?,
            Some(machine) => machine.agent().pause_container(&self.id).await?,
        }
        self.paused.store(true, Ordering::Relaxed);
        self.events.publish(&TaskPaused {
            container_id: self.id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    pub(crate) async fn resume(&self) -> Result<(), ShimError> {
        match &self.machine {
            None => self.sandbox.resume().await?,
            Some(machine) => machine.agent().resume_container(&self.id).await?,
        }
        self.paused.store(false, Ordering::Relaxed);
        self.events.publish(&TaskResumed {
            container_id: self.id.clone(),
            ..Default::default()
        });
        Ok(())
    }

    /// It was started, or has ended without.
    pub(crate) fn has_begun(&self) -> bool {
        self.init.state() != State::Created
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.init.has_stopped()
    }

    /// What it may use. Nothing once it has ended.
    pub(crate) fn limits(&self) -> Limits {
        if self.has_stopped() {
            return Limits::default();
        }
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what it may use. A sandbox runs nothing that could be limited.
    pub(crate) async fn update(&self, resources: &LinuxResources) -> Result<(), ShimError> {
        let limits = self.limits().changed(resources);
        if let Some(machine) = &self.machine {
            let resources = guestspec::resources(resources)?;
            machine.agent().update_resources(&self.id, resources).await?;
        }
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
        Ok(())
    }

    /// Forgets a process that has ended or never ran. With the init go the container's files, and with a sandbox or a container
    /// alone its machine. May be tried again after an error.
    pub(crate) async fn delete(&self, exec_id: &str) -> Result<Exit, ShimError> {
        let process = self.process(exec_id)?;
        let _turn = process.turn().await;
        let exit = self.removed(&process).await?;
        if process.is_init() {
            self.events.publish(&TaskDelete {
                container_id: self.id.clone(),
                pid: self.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at.clone()),
                ..Default::default()
            });
        }
        Ok(exit)
    }

    /// Removes a container that was created but that nobody has heard of.
    pub(crate) async fn abandon(&self) -> Result<(), ShimError> {
        let _turn = self.init.turn().await;
        self.removed(&self.init).await.map(drop)
    }

    /// To be called in the process's turn.
    async fn removed(&self, process: &Process) -> Result<Exit, ShimError> {
        if process.is_forgotten() {
            return Err(ShimError::NotFound("the process has been deleted already".to_owned()));
        }
        let state = process.state();
        match state {
            State::Running => return Err(ShimError::FailedPrecondition("the process still runs".to_owned())),
            // What it has said until its end is taken before the guest forgets it.
            State::Stopped(_) => process.copies.drain().await,
            State::Created => {}
        }
        let mut guest_forgets = false;
        if let Some(machine) = &self.machine {
            match machine.agent().delete_process(process.name()).await {
                Ok(_) | Err(AgentError::NotFound(_)) => guest_forgets = true,
                Err(error) if timeout(Duration::ZERO, machine.exited()).await.is_ok() => {
                    tracing::debug!(container_id = self.id, %error, "the machine has ended, and the process with it");
                }
                // Its end has been told. Who could not forget it would keep its pod for as long as the guest likes.
                Err(error) if matches!(state, State::Stopped(_)) => {
                    tracing::warn!(container_id = self.id, exec_id = process.exec_id(), %error, "the guest keeps what is left of a process");
                }
                Err(error) => return Err(error.into()),
            }
        }
        process.copies.drain().await;
        let exit = match state {
            State::Stopped(exit) => exit,
            _ => process.end(KILLED).unwrap_or_else(|| Exit::now(KILLED)),
        };
        if !process.is_init() {
            self.execs().remove(process.exec_id());
            process.forget();
            return Ok(exit);
        }
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut files) = files {
            if let Some(machine) = self.machine.as_ref().filter(|_| guest_forgets) {
                release_volumes(&**machine, &self.id, &mut files).await;
            }
            unmount(&self.id, files);
        }
        if self.role != Role::Member {
            self.sandbox.shutdown(Duration::ZERO).await?;
        }
        process.forget();
        Ok(exit)
    }

    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        // Every change leaves the map whole.
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has the guest let go of the volumes that no container uses any more. Those that it keeps it is told of again with the next ones.
async fn release_volumes(machine: &dyn RunningMachine, id: &str, files: &mut ContainerFiles) {
    let volumes = files.give_up_volumes();
    let ended = volumes.ended();
    if ended.is_empty() {
        return;
    }
    match machine.agent().release_volumes(&ended).await {
        Ok(()) => volumes.released(&ended),
        Err(error) => {
            tracing::debug!(container_id = id, %error, "the guest still has volumes that no container uses");
        }
    }
}

/// What stays is unmounted when the machine ends.
fn unmount(id: &str, files: ContainerFiles) {
    if let Err(error) = files.unmount() {
        tracing::warn!(container_id = id, %error, "files of the container stay until its machine ends");
    }
}

/// The root directory where containerd describes no mounts for it: that of the specification, relative to the bundle.
fn root_of(bundle: &str, spec: &Spec) -> std::path::PathBuf {
    let root = spec.root().as_ref().map_or(Path::new("rootfs"), |root| root.path());
    Path::new(bundle).join(root)
}
