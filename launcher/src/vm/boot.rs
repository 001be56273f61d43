//! Bringing a machine up: everything it needs, in an order in which a failure costs least, and all of it undone when one
//! thing fails or the caller goes away.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tokio::{sync::watch, task::JoinError, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{DestroyError, Vm, remains, watch::Watch};
use crate::{
    accel::{self, AccelError, Acceleration},
    agent::{AgentClient, AgentError},
    carriage::{self, Carriage, CarriageError},
    cgroup::{self, CgroupError},
    config::Config,
    console::{Console, Watcher},
    disk::{self, DiskError},
    forward::{self, ForwardError},
    machine::{Machine, MachineError, Network},
    netdev::{self, NetdevError},
    process::{Confinement, Process, ProcessError},
    provision::{self, ProvisionError},
    qemu::{
        arguments::{self, Descriptors},
        program::{self, QemuError},
        qmp::{Qmp, QmpError},
    },
    state::{Helper, ProcessId, Record, StateDir, StateError},
    user::{self, UserError},
    virtiofs::{self, VirtioFs, VirtioFsError},
    vsock::{Backend, GreetingError, ReadyListener, VsockDevice, VsockError},
};

/// A machine did not come up. What was made for it is gone again.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    #[error(transparent)]
    Carriage(#[from] CarriageError),
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Acceleration(#[from] AccelError),
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Network(#[from] NetdevError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error(transparent)]
    VirtioFs(#[from] VirtioFsError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error("{what} failed")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("the agent's disk {} is missing; `devtool build` makes it, `agent_disk` in the configuration names it", path.display())]
    AgentDisk { path: PathBuf },
    #[error("QEMU may not use KVM: {0}")]
    Kvm(String),
    #[error("the guest did not come up within {} s; its console's last lines: {console}", timeout.as_secs())]
    Timeout { timeout: Duration, console: String },
    #[error("the guest ended before its agent answered: {reason}; its console's last lines: {console}")]
    Ended { reason: String, console: String },
    #[error("the start was given up")]
    Cancelled,
    #[error(transparent)]
    Destroy(#[from] DestroyError),
}

impl VmError {
    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    fn task(error: JoinError) -> Self {
        Self::io("the machine's start")(io::Error::other(error))
    }
}

/// Starts the machine in a task of its own: when the caller goes away, the task still undoes what it has made. When
/// `interruption` is there first, it does so before this answers.
pub(super) async fn start(
    config: &Config,
    machine: Machine,
    watcher: Option<Watcher>,
    interruption: impl Future<Output = ()>,
) -> Result<Vm, VmError> {
    let given_up = CancellationToken::new();
    let guard = given_up.clone().drop_guard();
    let mut task = tokio::spawn(start_or_undo(config.clone(), machine, watcher, given_up));
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = interruption => {
            drop(guard);
            return interrupted(task.await).await;
        }
    };
    guard.disarm();
    ended.unwrap_or_else(|error| Err(VmError::task(error)))
}

/// The outcome of a start that was given up, which may have come too late for it.
async fn interrupted(ended: Result<Result<Vm, VmError>, JoinError>) -> Result<Vm, VmError> {
    match ended {
        Ok(Ok(vm)) => vm.shutdown(Duration::ZERO).await?,
        Ok(Err(error)) => return Err(error),
        Err(error) => return Err(VmError::task(error)),
    }
    Err(VmError::Cancelled)
}

async fn start_or_undo(
    config: Config,
    machine: Machine,
    watcher: Option<Watcher>,
    given_up: CancellationToken,
) -> Result<Vm, VmError> {
    let plan = tokio::select! {
        plan = plan(&config, &machine) => plan?,
        () = given_up.cancelled() => return Err(VmError::Cancelled),
    };
    let state = StateDir::create(&config.state_dir, &machine.id)?;
    let mut record = Record {
        id: machine.id.to_string(),
        guest: machine.guest.name.clone(),
        launcher: ProcessId::of(std::process::id()),
        qemu: None,
        helpers: Vec::new(),
        vsock: None,
        acceleration: Some(plan.acceleration),
        acceleration_reason: Some(plan.reason.clone()),
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        netns: None,
        cgroup: None,
        uid: None,
    };
    tracing::info!(machine = %machine.id, acceleration = %plan.acceleration, reason = plan.reason, "the machine starts");
    let built = tokio::select! {
        built = build(&config, &machine, plan, &state, &mut record, watcher) => built,
        () = given_up.cancelled() => Err(VmError::Cancelled),
    };
    if built.is_err() {
        undo(&config.state_dir, &state, &record).await;
    }
    built
}

/// Frees everything of a machine that is not to be; what cannot be freed is for the log, the caller has the first error.
pub(super) async fn undo(state_dir: &Path, state: &StateDir, record: &Record) {
    let mut problems = Vec::new();
    remains::free(state_dir, state, Some(record), &mut problems).await;
    for problem in problems {
        tracing::warn!(machine = record.id, problem, "something of the machine is left behind");
    }
}

/// What can be decided before anything is made: everything that is wrong with what the user or the admin wrote is found here.
struct Plan {
    ignition: Carriage,
    data_disk: Option<File>,
    qemu: PathBuf,
    acceleration: Acceleration,
    reason: String,
    groups: Vec<u32>,
}

async fn plan(config: &Config, machine: &Machine) -> Result<Plan, VmError> {
    machine.check()?;
    // Asked for only where they may be needed: it costs a thread in the pod's network.
    let addresses = match &machine.configuration {
        Some(_) => netdev::addresses(&machine.network).await?,
        None => Vec::new(),
    };
    // A long configuration keeps a thread busy, and this one has others to serve.
    let provisioned = tokio::task::spawn_blocking({
        let machine = machine.clone();
        move || provision::provision(&machine, &addresses)
    });
    let ignition = provisioned
        .await
        .map_err(|error| VmError::io("reading the configuration")(io::Error::other(error)))?;
    let ignition = carriage::carry(ignition?, &machine.guest)?;
    if let Network::User { forwards } = &machine.network {
        forward::check(forwards)?;
    }
    let data_disk = machine.disk.as_ref();
    let data_disk = data_disk.map(|disk| disk::open(disk, machine.disk_min())).transpose()?;
    if !config.agent_disk.is_file() {
        return Err(VmError::AgentDisk {
            path: config.agent_disk.clone(),
        });
    }
    let (qemu, _) = program::find(&config.qemu).await?;
    let (acceleration, reason) = accel::choose(machine.acceleration, &config.state_dir).await?;
    let groups = match acceleration {
        Acceleration::Kvm => accel::kvm_group().map_err(VmError::Kvm)?.into_iter().collect(),
        Acceleration::Tcg => Vec::new(),
    };
    Ok(Plan {
        ignition,
        data_disk,
        qemu,
        acceleration,
        reason,
        groups,
    })
}

/// Makes everything and waits for the agent. `record` names each thing before it is made.
async fn build(
    config: &Config,
    machine: &Machine,
    plan: Plan,
    state: &StateDir,
    record: &mut Record,
    watcher: Option<Watcher>,
) -> Result<Vm, VmError> {
    state.write(record)?;
    let uid = user::allocate(
        &config.state_dir,
        config.vm_uids.start,
        config.vm_uids.end - config.vm_uids.start,
        &machine.id,
    )?;
    record.uid = Some(uid);
    record.cgroup = machine.cgroup.clone();
    if let Network::Tap { netns, .. } = &machine.network {
        record.netns = Some(netns.clone());
    }
    state.write(record)?;

    let mut wall = Confinement {
        uid: Some(uid),
        groups: plan.groups,
        ..Confinement::default()
    };
    if let Some(cgroup) = &machine.cgroup {
        wall.cgroups = cgroup::create(cgroup)?;
    }
    if let Network::Tap { netns, .. } = &machine.network {
        let open = File::open(netns).map_err(VmError::io(format!(
            "opening the network namespace {}",
            netns.display()
        )))?;
        wall.netns = Some(open);
    }
    let another_wall = || wall.try_clone().map_err(VmError::io("duplicating descriptors"));

    // virtiofsd starts while the vsock device is waited for.
    virtiofs::prepare(&state.mount_points(), &state.shared())?;
    // As root, for the files of containers have any owner; it confines itself further.
    let confinement = Confinement {
        uid: None,
        groups: Vec::new(),
        ..another_wall()?
    };
    let virtiofs = VirtioFs::start(
        &config.virtiofsd,
        &state.shared(),
        &state.path().join("virtiofs"),
        confinement,
    )?;
    note_helper(record, "virtiofsd", &virtiofs.process);
    let vsock = VsockDevice::prepare(&config.vhost_device_vsock, state.path(), another_wall()?).await?;
    if let Backend::VhostUser { process, .. } = &vsock.backend {
        note_helper(record, "vhost-device-vsock", process);
    }
    record.vsock = Some(vsock.address.clone());
    state.write(record)?;
    let ready = ReadyListener::bind(&vsock.address, Some(uid))?;
    let dialer = vsock.dialer();

    let network = match &machine.network {
        Network::None | Network::User { .. } => None,
        Network::Tap { netns, redirects } => Some(netdev::attach(netns, redirects).await?),
    };

    let (qmp_here, qmp_there) = UnixStream::pair().map_err(VmError::io("making QEMU's control connection"))?;
    let (console_here, console_there) = UnixStream::pair().map_err(VmError::io("making the console's connection"))?;
    let mut inherited = Inherited::default();
    let mut helpers = vec![("virtiofsd", virtiofs.process)];
    let mut descriptors = Descriptors {
        kernel: inherited.file(&machine.guest.kernel)?,
        initramfs: inherited.file(&machine.guest.initramfs)?,
        ignition: match plan.ignition {
            Carriage::FwCfg(text) | Carriage::FwCfgCompressed(text) => arguments::Ignition::FwCfg {
                descriptor: inherited.add(in_memory(&text)?),
            },
            Carriage::Disk { serial, content } => arguments::Ignition::Disk {
                descriptor: inherited.add(in_memory(&content)?),
                serial,
            },
        },
        root: inherited.file(&machine.guest.root)?,
        agent_disk: inherited.file(&config.agent_disk)?,
        data_disk: plan.data_disk.map(|disk| inherited.add(disk)),
        qmp: inherited.add(qmp_there),
        console: inherited.add(console_there),
        shared: inherited.add(virtiofs.connection),
        vsock: match vsock.backend {
            Backend::Vhost { device, cid } => arguments::Vsock::Vhost {
                descriptor: inherited.add(device),
                cid,
            },
            Backend::VhostUser { process, connection } => {
                helpers.push(("vhost-device-vsock", process));
                arguments::Vsock::VhostUser {
                    connection: inherited.add(connection),
                }
            }
        },
        taps: Vec::new(),
        ready_port: ready
            .port()
            .map_err(VmError::io("asking for the port of the agent's greeting"))?,
    };
    let configuration = network.map(|attached| {
        for tap in attached.taps {
            descriptors.taps.push(arguments::Tap {
                descriptor: inherited.add(tap.descriptor),
                vhost: tap.vhost.map(|vhost| inherited.add(vhost)),
                mac: tap.mac,
                mtu: tap.mtu,
            });
        }
        attached.configuration
    });
    let configuration = match &machine.network {
        Network::User { .. } => Some(netdev::user_configuration()),
        _ => configuration,
    };

    let console = async_socket(console_here).map_err(VmError::io("reading the console"))?;
    let console = Console::start(console, &state.console(), watcher).map_err(VmError::io("recording the console"))?;
    let arguments = arguments::arguments(machine, plan.acceleration, &descriptors);
    let qemu = Arc::new(Process::start(&plan.qemu, &arguments, inherited.0, wall)?);
    record.qemu = Some(qemu.id());
    state.write(record)?;

    let begin = Instant::now();
    let deadline = begin + machine.boot_timeout;
    let mut watch = Watch {
        qemu: qemu.clone(),
        helpers,
        console,
        ending: None,
    };
    let qmp = watch
        .during(deadline, machine.boot_timeout, async { Ok(Qmp::open(qmp_here).await?) })
        .await?;
    watch.ending = Some(qmp.ending());
    watch
        .during(deadline, machine.boot_timeout, async { Ok(ready.greeted().await?) })
        .await?;
    let agent = AgentClient::new(dialer);
    let configured = async {
        if let Some(configuration) = &configuration {
            agent.configure_network(configuration).await?;
        }
        Ok(())
    };
    watch.during(deadline, machine.boot_timeout, configured).await?;
    tracing::info!(machine = %machine.id, seconds = begin.elapsed().as_secs_f64(), "the guest is up");

    let (ended, exit) = watch::channel(None);
    let supervisor = tokio::spawn(async move {
        let exit = watch.end().await;
        ended.send_replace(Some(exit));
    });
    Ok(Vm {
        id: machine.id.clone(),
        state: state.clone(),
        state_dir: config.state_dir.clone(),
        record: record.clone(),
        qmp,
        qemu,
        agent,
        exit,
        supervisor,
        freed: tokio::sync::Mutex::new(false),
    })
}

fn note_helper(record: &mut Record, name: &str, process: &Process) {
    record.helpers.push(Helper {
        name: name.to_owned(),
        process: process.id(),
    });
}

/// Descriptors that QEMU is given; their numbers stay.
#[derive(Default)]
struct Inherited(Vec<OwnedFd>);

impl Inherited {
    fn add(&mut self, descriptor: impl Into<OwnedFd>) -> RawFd {
        let descriptor = descriptor.into();
        let number = descriptor.as_raw_fd();
        self.0.push(descriptor);
        number
    }

    fn file(&mut self, path: &Path) -> Result<RawFd, VmError> {
        File::open(path)
            .map(|file| self.add(file))
            .map_err(VmError::io(format!("opening {}", path.display())))
    }
}

fn in_memory(configuration: &str) -> Result<File, VmError> {
    sealed(configuration).map_err(VmError::io("keeping the configuration in memory"))
}

/// A file in memory that nobody can change any more, and that has no name: a configuration may hold secrets.
fn sealed(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create(
        c"ignition",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    file.write_all(text.as_bytes())?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    // Of a disk's descriptors QEMU takes the one that is open as the disk is: for reading alone.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn async_socket(socket: UnixStream) -> io::Result<tokio::net::UnixStream> {
    socket.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(socket)
}
