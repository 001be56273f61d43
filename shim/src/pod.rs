//! The pod: one machine and the containers in it.
//!
//! - [`start`]: how the machine comes to be
//! - [`late`]: how it does when its network comes late
//! - [`size`]: how it follows its containers' limits

mod late;
mod size;
mod start;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    api::CreateTaskRequest,
    events::task::{TaskCreate, TaskIO},
};
use coreos_kvm_launcher::agent::Processes;
use protobuf::MessageField;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    bundle,
    container::{Container, Wanted},
    containerd::{Containerd, SharedProcesses},
    error::ShimError,
    events::Events,
    guestspec,
    hypervisor::{Hypervisor, RunningMachine, SandboxProcess as _},
    limits::Limits,
    options,
    pod_volumes::PodVolumes,
    podfiles::WrittenFiles,
    podspec::{self, PodSpec, Role},
    process::{Exit, KILLED},
    streams::Stdio,
    userns::{self, UserNamespace},
};
use late::LateMachine;

/// Pause between two looks at whether containerd still has a pod that has not begun.
const LOOK: Duration = Duration::from_secs(10);

/// The pod of this shim.
pub(crate) struct Pod {
    hypervisor: Box<dyn Hypervisor>,
    containerd: Option<Containerd>,
    events: Events,
    config: Option<PathBuf>,
    contents: Mutex<Contents>,
    volumes: PodVolumes,
    /// Held while limits are changed, and the machine's size with them.
    resizing: tokio::sync::Mutex<()>,
    closing: CancellationToken,
    /// Held while the machine is being ended.
    ending: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Contents {
    machine: Option<Arc<dyn RunningMachine>>,
    /// The machine that starts with the sandbox, and not with its creation.
    late: Option<Arc<LateMachine>>,
    /// The machine whose start is on its way.
    booting: Option<bundle::Record>,
    /// None: being created.
    containers: BTreeMap<String, Option<Arc<Container>>>,
    /// Memory that the guest needs beside its containers.
    guest_memory_overhead_mib: u64,
    /// The pod says how large its machine is.
    size_is_named: bool,
    /// What containers get of the pod, where containerd does not see to that.
    files: Option<WrittenFiles>,
    /// The user namespace that its containers are in.
    users: Option<UserNamespace>,
}

/// A machine that containerd wants to have for a pod, by whichever API.
pub(crate) struct WantedSandbox {
    pub(crate) pod: PodSpec,
    pub(crate) bundle: String,
    /// The configuration file, where it comes along.
    pub(crate) config: Option<PathBuf>,
}

/// What containerd asks to have created.
enum Wish {
    Task(CreateTaskRequest),
    Sandbox(WantedSandbox),
}

impl Wish {
    fn id(&self) -> &str {
        match self {
            Self::Task(request) => &request.id,
            Self::Sandbox(wanted) => &wanted.pod.id,
        }
    }
}

impl Pod {
    /// An empty pod. Without a `containerd` its ports are not asked for. `config` is the configuration file of a machine that comes
    /// without one.
    pub(crate) fn new(
        hypervisor: Box<dyn Hypervisor>,
        containerd: Option<Containerd>,
        events: Events,
        config: Option<PathBuf>,
    ) -> Self {
        Self {
            hypervisor,
            containerd,
            events,
            config,
            contents: Mutex::default(),
            volumes: PodVolumes::default(),
            resizing: tokio::sync::Mutex::default(),
            closing: CancellationToken::new(),
            ending: tokio::sync::Mutex::default(),
        }
    }

    /// The container of that id, created in full.
    pub(crate) fn container(&self, id: &str) -> Result<Arc<Container>, ShimError> {
        let found = self.contents().containers.get(id).cloned().flatten();
        found.ok_or_else(|| ShimError::NotFound(format!("there is no container {id}")))
    }

    /// The machine, once it is there.
    pub(crate) fn machine(&self) -> Option<Arc<dyn RunningMachine>> {
        self.contents().machine.clone()
    }

    /// The pid of the machine, or of what stands for it until it is there; 0 where there is neither. It is by this that containerd knows
    /// the sandbox's process.
    pub(crate) fn pid(&self) -> u32 {
        let contents = self.contents();
        let late = contents.late.as_ref().map(|late| late.pid());
        let machine = contents.machine.as_ref().map(|machine| machine.pid());
        machine.or(late).unwrap_or_default()
    }

    /// Creates what containerd asks for by the Task API: the machine, a container in it, or both.
    ///
    /// # Errors
    /// When it cannot be; nothing of it is left then.
    pub(crate) async fn create(self: &Arc<Self>, request: &CreateTaskRequest) -> Result<Arc<Container>, ShimError> {
        self.make(Wish::Task(request.clone())).await
    }

    /// Creates the sandbox that containerd asks for by the Sandbox API.
    ///
    /// # Errors
    /// When it cannot be; nothing of it is left then.
    pub(crate) async fn create_sandbox(self: &Arc<Self>, wanted: WantedSandbox) -> Result<Arc<Container>, ShimError> {
        self.make(Wish::Sandbox(wanted)).await
    }

    async fn make(self: &Arc<Self>, wish: Wish) -> Result<Arc<Container>, ShimError> {
        let given_up = CancellationToken::new();
        let _guard = given_up.clone().drop_guard();
        let pod = self.clone();
        carried_through(async move {
            let made = pod.create_or_undo(&wish, &given_up).await;
            // Nobody may come to close the pod then: containerd has its own time for that from the one that is over.
            if made.is_err() && given_up.is_cancelled() && matches!(wish, Wish::Sandbox(_)) {
                pod.close_if_empty();
            }
            made
        })
        .await
    }

    /// When the caller goes away before the end, nothing is left either, in the guest or on the host.
    async fn create_or_undo(
        self: &Arc<Self>,
        wish: &Wish,
        given_up: &CancellationToken,
    ) -> Result<Arc<Container>, ShimError> {
        let id = wish.id();
        let reservation = Reservation::new(self, id)?;
        let container = match wish {
            Wish::Task(request) => self.created(request, given_up).await?,
            Wish::Sandbox(wanted) => {
                let machine = self.booted(wanted, given_up).await?;
                let (events, stdio) = (Events::unheard(), Stdio::default());
                Container::sandbox(machine, events, id, &wanted.bundle, stdio, Limits::default())
            }
        };
        if given_up.is_cancelled() {
            // The container's end ends the machine that it brought.
            if let Err(error) = container.abandon().await {
                tracing::warn!(container_id = id, %error, "something is left of a container that nobody waits for");
            }
            if container.role() != Role::Member {
                let mut contents = self.contents();
                (contents.machine, contents.late) = (None, None);
            }
            return Err(ShimError::Internal(
                "containerd has given up the container's creation".to_owned(),
            ));
        }
        if let Wish::Task(request) = wish {
            self.events.publish(&TaskCreate {
                container_id: request.id.clone(),
                bundle: request.bundle.clone(),
                rootfs: request.rootfs.clone(),
                io: MessageField::some(TaskIO {
                    stdin: request.stdin.clone(),
                    stdout: request.stdout.clone(),
                    stderr: request.stderr.clone(),
                    terminal: request.terminal,
                    ..Default::default()
                }),
                pid: container.pid(),
                ..Default::default()
            });
        }
        reservation.fulfil(container.clone());
        if container.role() != Role::Member {
            self.watch(container.clone());
        }
        Ok(container)
    }

    async fn created(
        &self,
        request: &CreateTaskRequest,
        given_up: &CancellationToken,
    ) -> Result<Arc<Container>, ShimError> {
        if !request.checkpoint.is_empty() {
            return Err(ShimError::Unimplemented(
                "containers cannot be restored from checkpoints yet".to_owned(),
            ));
        }
        let mut spec = bundle::spec(Path::new(&request.bundle))?;
        let role = podspec::role(&spec);
        let users = UserNamespace::of_oci(&spec)?;
        let processes = match (guestspec::shares_processes(&spec), role) {
            (false, _) => Processes::Own,
            (true, Role::Member) => match self.shared_processes(&request.id).await? {
                SharedProcesses::Pod => Processes::Pod,
                SharedProcesses::Container(id) => Processes::Container(id),
                SharedProcesses::Node => {
                    guestspec::see_all_processes(&mut spec);
                    Processes::Own
                }
            },
            (true, Role::Sandbox | Role::Alone) => {
                return Err(ShimError::InvalidArgument(
                    "a process namespace of the host cannot be entered from a machine".to_owned(),
                ));
            }
        };
        if users.is_some() && guestspec::sees_all_processes(&spec) {
            return Err(userns::among_the_nodes_processes());
        }
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let events = self.events.clone();
        let (id, bundle) = (&request.id, &request.bundle);
        if role == Role::Sandbox && podspec::has_network_later(&spec) {
            let late = Arc::new(LateMachine::new(bundle, request.options.clone())?);
            self.expect(&late)?;
            return Ok(Container::sandbox(late, events, id, bundle, stdio, Limits::of(&spec)));
        }
        let machine = match role {
            Role::Member => {
                let machine = self.running_machine().await?;
                userns::expect_same(self.contents().users, users)?;
                self.make_room(&request.id, &spec, &machine).await;
                if let Some(files) = &self.contents().files {
                    files.add_to(&mut spec);
                }
                machine
            }
            Role::Sandbox | Role::Alone => {
                let wanted = WantedSandbox {
                    pod: PodSpec::of_oci(&request.id, &spec)?,
                    bundle: request.bundle.clone(),
                    config: options::config_path(request.options.as_ref())?,
                };
                self.booted(&wanted, given_up).await?
            }
        };
        if role == Role::Sandbox {
            self.tell(id, &machine);
            return Ok(Container::sandbox(
                machine,
                events,
                id,
                bundle,
                stdio,
                Limits::of(&spec),
            ));
        }
        let wanted = Wanted {
            id,
            bundle,
            role,
            spec,
            rootfs: &request.rootfs,
            stdio,
            processes,
            volumes: &self.volumes,
        };
        let created = Container::create(machine.clone(), events, wanted).await;
        if created.is_err() && role == Role::Alone {
            self.give_up(&machine).await;
        }
        created
    }

    /// The machine for a container that is to be in it.
    async fn running_machine(&self) -> Result<Arc<dyn RunningMachine>, ShimError> {
        let machine = self
            .machine()
            .ok_or_else(|| ShimError::FailedPrecondition("the pod's machine does not run".to_owned()))?;
        match timeout(Duration::ZERO, machine.exited()).await {
            Ok(exit) => Err(ShimError::FailedPrecondition(format!(
                "the pod's machine has ended: {}",
                exit.reason
            ))),
            Err(_) => Ok(machine),
        }
    }

    /// Whose process namespace a container is in that has none of its own.
    async fn shared_processes(&self, id: &str) -> Result<SharedProcesses, ShimError> {
        match &self.containerd {
            Some(containerd) => containerd.shared_processes(id).await,
            None => Ok(SharedProcesses::Pod),
        }
    }

    /// Waits for the machine's end, which is that of everything in it.
    fn watch(self: &Arc<Self>, sandbox: Arc<Container>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let exit = sandbox.sandbox_process().exited().await;
            if exit.orderly {
                tracing::info!(sandbox_id = sandbox.id(), reason = exit.reason, "the machine has ended");
            } else {
                let console = exit.console.join(" | ");
                tracing::warn!(
                    sandbox_id = sandbox.id(),
                    reason = exit.reason,
                    console,
                    "the machine has ended"
                );
            }
            let containers: Vec<_> = pod.contents().containers.values().flatten().cloned().collect();
            for container in containers.iter().filter(|container| container.id() != sandbox.id()) {
                container.machine_ended(KILLED).await;
            }
            let is_sandbox = sandbox.role() == Role::Sandbox;
            sandbox
                .machine_ended(if exit.orderly && is_sandbox { 0 } else { KILLED })
                .await;
        });
    }

    /// Forgets a process; with an init goes its container.
    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> Result<(Exit, u32), ShimError> {
        let container = self.container(id)?;
        let exit = container.delete(exec_id).await?;
        if exec_id.is_empty() {
            let mut contents = self.contents();
            contents.containers.remove(id);
            if container.role() != Role::Member {
                (contents.machine, contents.late) = (None, None);
            }
        }
        Ok((exit, container.pid()))
    }

    /// Closes the pod if nothing is in it; what is being created is given up.
    pub(crate) fn close_if_empty(&self) {
        if self.contents().containers.values().all(Option::is_none) {
            self.closing.cancel();
        }
    }

    /// Waits until containerd has removed the bundle of a pod of which nothing has been started yet: its client has given it up in a
    /// moment in which containerd does not come to end it, and nobody else will.
    pub(crate) async fn forgotten(&self, bundle: &Path) {
        let begun = || {
            let contents = self.contents();
            let mut containers = contents.containers.values().flatten();
            containers.any(|container| container.has_begun())
        };
        while !begun() {
            sleep(LOOK).await;
            if !begun() && !bundle.exists() {
                tracing::warn!("the pod is ended, for containerd has forgotten it before it began");
                return;
            }
        }
        std::future::pending().await
    }

    /// Waits until the pod is closed.
    pub(crate) async fn closed(&self) {
        self.closing.cancelled().await;
    }

    /// Closes the pod and ends its machine, whatever is in it, also one that is just being started.
    pub(crate) async fn end(&self, grace: Duration) {
        self.closing.cancel();
        // Whoever asks for the same meanwhile is answered when it is done.
        let _alone = self.ending.lock().await;
        let (machine, late, booting) = {
            let mut contents = self.contents();
            (contents.machine.clone(), contents.late.clone(), contents.booting.take())
        };
        let removed = match (machine, booting) {
            (Some(machine), _) => machine.shutdown(grace).await,
            (None, Some(record)) => self.hypervisor.remove(&record).await,
            (None, None) => Ok(()),
        };
        if let Some(late) = late {
            late.give_up().await;
        }
        if let Err(error) = removed {
            tracing::error!(%error, "something of the machine is left");
        }
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        // Every change leaves the contents whole.
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` to its end, also when whoever asked for it goes away meanwhile: ttrpc drops a call when the client's time is
/// over or its connection is lost, as every connection is when containerd is restarted.
pub(crate) async fn carried_through<T: Send + 'static>(
    work: impl Future<Output = Result<T, ShimError>> + Send + 'static,
) -> Result<T, ShimError> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(ShimError::while_doing("answering containerd")(error)))
}

/// A container's id while it is being created; dropping it frees the id.
struct Reservation<'a> {
    pod: &'a Pod,
    id: &'a str,
    fulfilled: bool,
}

impl<'a> Reservation<'a> {
    fn new(pod: &'a Pod, id: &'a str) -> Result<Self, ShimError> {
        let mut contents = pod.contents();
        if contents.containers.contains_key(id) {
            return Err(ShimError::AlreadyExists(format!("there is a container {id} already")));
        }
        contents.containers.insert(id.to_owned(), None);
        Ok(Self {
            pod,
            id,
            fulfilled: false,
        })
    }

    fn fulfil(mut self, container: Arc<Container>) {
        self.fulfilled = true;
        self.pod
            .contents()
            .containers
            .insert(self.id.to_owned(), Some(container));
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.fulfilled {
            self.pod.contents().containers.remove(self.id);
        }
    }
}
