//! The pod: one machine and the containers in it.

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
use coreos_kvm_launcher::{agent::Processes, config::Config, machine::Network, state::ProcessId, vm::MachineSize};
use oci_spec::runtime::{LinuxResources, Spec};
use protobuf::MessageField;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    bundle,
    container::{Container, Wanted},
    containerd::{self, Containerd, SharedProcesses},
    error::{ShimError, sentence},
    events::Events,
    facts::Facts,
    guestspec,
    hypervisor::{Hypervisor, RunningMachine},
    limits::Limits,
    logging, options,
    pod_volumes::PodVolumes,
    podfiles::WrittenFiles,
    podspec::{self, PodSpec, Role},
    portforward,
    process::{Exit, KILLED},
    streams::Stdio,
    userns::{self, UserNamespace},
    volume::EmptyDirs,
};

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
                self.contents().machine = None;
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
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let events = self.events.clone();
        if role == Role::Sandbox {
            self.tell(&request.id, &machine);
            let limits = Limits::of(&spec);
            return Ok(Container::sandbox(
                machine,
                events,
                &request.id,
                &request.bundle,
                stdio,
                limits,
            ));
        }
        let wanted = Wanted {
            id: &request.id,
            bundle: &request.bundle,
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

    /// Starts the pod's machine, unless nobody waits for it any more: a start that is dropped undoes itself.
    async fn booted(
        &self,
        wanted: &WantedSandbox,
        given_up: &CancellationToken,
    ) -> Result<Arc<dyn RunningMachine>, ShimError> {
        tokio::select! {
            biased;
            () = self.closing.cancelled() => {
                Err(ShimError::FailedPrecondition("the pod is being removed".to_owned()))
            }
            () = given_up.cancelled() => {
                Err(ShimError::Internal("containerd has given up the machine's start".to_owned()))
            }
            machine = self.boot(wanted) => machine,
        }
    }

    /// Starts the pod's machine.
    async fn boot(&self, wanted: &WantedSandbox) -> Result<Arc<dyn RunningMachine>, ShimError> {
        {
            let contents = self.contents();
            // Another container that is being created may be starting the machine.
            if contents.machine.is_some() || contents.containers.len() > 1 {
                return Err(ShimError::AlreadyExists("the pod has a machine already".to_owned()));
            }
        }
        let (pod, bundle) = (&wanted.pod, Path::new(&wanted.bundle));
        let config = wanted.config.as_ref().or(self.config.as_ref());
        let config = Config::load_or_default(config.map(PathBuf::as_path)).map_err(ShimError::invalid)?;
        logging::set_level(config.log_level);
        let machine = pod.machine(&config)?;
        let netns = match &machine.network {
            Network::Tap { netns, .. } => Some(netns.clone()),
            _ => None,
        };
        let files = pod.files.as_ref().map(|files| files.write(&bundle::work(bundle)));
        let files = files.transpose()?;
        let record = bundle::Record {
            machine: machine.id.to_string(),
            state_dir: config.state_dir.clone(),
            shim: ProcessId::of(std::process::id()),
        };
        record.write(bundle)?;

        self.contents().booting = Some(record);
        let (machine, ports) = tokio::join!(self.hypervisor.start(&config, machine), self.ports(pod));
        let machine = machine.inspect_err(|_| self.contents().booting = None)?;
        if let Some(netns) = netns
            && let Err(error) = portforward::start(machine.clone(), &netns).await
        {
            // All else works.
            tracing::warn!(
                sandbox_id = pod.id,
                error = sentence(&error),
                "port-forward will not work"
            );
        }
        tracing::info!(
            sandbox_id = pod.id,
            qemu = machine.pid(),
            ports,
            "the pod's machine is up"
        );
        let mut contents = self.contents();
        (contents.machine, contents.booting) = (Some(machine.clone()), None);
        contents.guest_memory_overhead_mib = config.guest_memory_overhead_mib;
        contents.size_is_named = pod.names_size();
        contents.files = files;
        contents.users = pod.users;
        if let Some(own) = EmptyDirs::of(&config.kubelet_dir, &pod.uid) {
            self.volumes.own(own);
        }
        Ok(machine)
    }

    /// The pod's ports, for the log. In a machine that has the pod's addresses every port is the pod's, and those that the
    /// node forwards are the CNI's: nothing has to be done for them, so not knowing them is no failure.
    async fn ports(&self, pod: &PodSpec) -> String {
        let asked = match (&pod.ports, &self.containerd) {
            (Some(ports), _) => Ok(ports.clone()),
            (None, Some(containerd)) => containerd.ports(&pod.id).await,
            (None, None) => Ok(Vec::new()),
        };
        match asked {
            Ok(ports) => containerd::list(&ports),
            Err(error) => {
                tracing::warn!(sandbox_id = pod.id, %error, "containerd does not tell the pod's ports");
                String::new()
            }
        }
    }

    /// Has containerd know what the machine is, for whoever looks at the sandbox. Nobody waits for it.
    fn tell(&self, id: &str, machine: &Arc<dyn RunningMachine>) {
        let (containerd, id) = (self.containerd.clone(), id.to_owned());
        let annotations = Facts::of(&machine.info()).annotations();
        if let Some(containerd) = containerd {
            tokio::spawn(async move {
                if let Err(error) = containerd.annotate(&id, &annotations).await {
                    let error = sentence(&error);
                    tracing::warn!(
                        sandbox_id = id,
                        error,
                        "`crictl inspectp` will not tell what the machine is"
                    );
                }
            });
        }
    }

    /// Whose process namespace a container is in that has none of its own.
    async fn shared_processes(&self, id: &str) -> Result<SharedProcesses, ShimError> {
        match &self.containerd {
            Some(containerd) => containerd.shared_processes(id).await,
            None => Ok(SharedProcesses::Pod),
        }
    }

    async fn give_up(&self, machine: &Arc<dyn RunningMachine>) {
        self.contents().machine = None;
        if let Err(error) = machine.shutdown(Duration::ZERO).await {
            tracing::error!(%error, "the machine of a pod that is not to be could not be removed");
        }
    }

    /// Waits for the machine's end, which is that of everything in it.
    fn watch(self: &Arc<Self>, sandbox: Arc<Container>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let exit = sandbox.machine().exited().await;
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
                contents.machine = None;
            }
        }
        Ok((exit, container.pid()))
    }

    /// Changes a container's limits, and with them the size of the machine; those of a sandbox are the pod's. `resources` is the
    /// OCI specification's `linux.resources` as JSON.
    ///
    /// # Errors
    /// When the machine cannot become so large: the limits then stay.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), ShimError> {
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| ShimError::InvalidArgument(format!("the limits cannot be read: {error}")))?;
        let container = self.container(id)?;
        if container.has_stopped() {
            return Err(ShimError::NotFound(format!("the container {id} has ended")));
        }
        let machine = container.machine();
        let _alone = self.resizing.lock().await;
        let (before, wanted) = (
            self.size_with(&[]),
            self.size_with(&[(id, container.limits().changed(&resources))]),
        );
        // What is allowed is there before, and taken away only when it is not allowed any more.
        let updated = match machine.grow(wanted).await {
            Ok(()) => container.update(&resources).await,
            Err(error) => Err(error),
        };
        let needed = if updated.is_ok() { wanted } else { before };
        if let Err(error) = machine.shrink(needed).await {
            tracing::warn!(container_id = id, %error, "the machine keeps what it does not need any more");
        }
        updated
    }

    /// Has the machine grow to what a new container may use beside the others, where the pod was started with less: its limits may
    /// have changed since, or whoever started it did not know of them.
    async fn make_room(&self, id: &str, spec: &Spec, machine: &Arc<dyn RunningMachine>) {
        if self.contents().size_is_named {
            return;
        }
        let _alone = self.resizing.lock().await;
        let wanted = self.size_with(&[(id, Limits::of(spec))]);
        if let Err(error) = machine.grow(wanted).await {
            tracing::warn!(container_id = id, %error, "the container may use more than its machine has");
        }
    }

    /// The size for all containers, those of `changes` with these limits.
    fn size_with(&self, changes: &[(&str, Limits)]) -> MachineSize {
        let contents = self.contents();
        let all: BTreeMap<_, _> = contents
            .containers
            .iter()
            .filter_map(|(id, container)| Some((id.as_str(), container.as_ref()?.limits())))
            .chain(changes.iter().copied())
            .collect();
        let is_sandbox = |id: &&str| {
            let container = contents.containers.get(*id).and_then(Option::as_ref);
            container.is_some_and(|container| container.role() == Role::Sandbox)
        };
        let (pod, members): (Vec<_>, Vec<_>) = all.into_iter().partition(|(id, _)| is_sandbox(id));
        let size = |limits: Vec<(&str, Limits)>| {
            let limits = limits.into_iter().map(|(_, limits)| limits);
            Limits::size(limits, contents.guest_memory_overhead_mib)
        };
        let (pod, sum) = (size(pod), size(members));
        MachineSize {
            vcpus: pod.vcpus.max(sum.vcpus),
            memory_mib: pod.memory_mib.max(sum.memory_mib),
        }
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
        let (machine, booting) = {
            let mut contents = self.contents();
            (contents.machine.clone(), contents.booting.take())
        };
        let removed = match (machine, booting) {
            (Some(machine), _) => machine.shutdown(grace).await,
            (None, Some(record)) => self.hypervisor.remove(&record).await,
            (None, None) => Ok(()),
        };
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
