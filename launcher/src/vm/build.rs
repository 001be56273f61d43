//! Making what a machine consists of, in an order in which a failure costs least, to the point where its QEMU answers.

use std::{
    fs::{DirBuilder, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{
            fs::{DirBuilderExt, chown},
            net::UnixStream,
        },
    },
    path::Path,
    sync::Arc,
};

use coreos_kvm_proto::{
    agent::ConfigureNetworkRequest,
    output_window::{self, Reader},
};
use nix::{
    fcntl::{FcntlArg, SealFlag, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use tokio::{net::UnixListener, time::Instant};

use super::{VmError, plan::Plan, watch::Watch};
use crate::{
    agent::OutputWindow,
    carriage::Carriage,
    cgroup,
    config::Config,
    console::{Console, Watcher},
    mac::Mac,
    machine::{Machine, Network},
    netdev,
    process::{Confinement, Process},
    qemu::{
        arguments::{self, Descriptors, Start},
        devices::{self, CLONE_TAPS_MAX, Connections, Device},
        program::Qemu,
        qmp::Qmp,
    },
    sentence,
    share_server::{self, ShareServer},
    state::{CloneMode, Helper, Record, StateDir},
    template::{card::give_address, memory::Filler, resident::Resident},
    user,
    virtiofs::{self, VirtioFs},
    vsock::{Backend, Multiplexed, ReadyListener, VsockDevice, VsockDialer},
};

/// What the guest's memory is at first, and what becomes of the guest.
pub(super) enum Origin {
    /// Empty; it boots.
    Boot,
    /// Empty, in a file that is saved later.
    Template { memory: File },
    /// What a template had in memory, when its devices had that state.
    Clone { memory: Memory, state: Vec<u8> },
}

/// A clone's memory.
pub(super) enum Memory {
    /// A file of its own, which is being filled.
    Copy { memory: File, filler: Filler },
    /// One that all clones of the template map.
    Shared(Resident),
}

impl Memory {
    fn mode(&self) -> CloneMode {
        match self {
            Self::Copy { .. } => CloneMode::Copy,
            Self::Shared(_) => CloneMode::CopyOnWrite,
        }
    }

    fn file(&self) -> &File {
        match self {
            Self::Copy { memory, .. } => memory,
            Self::Shared(shared) => shared.memory(),
        }
    }
}

/// The same while the clone comes up.
pub(super) enum CloneMemory {
    Copy {
        memory: File,
        /// The process that fills it.
        filling: Process,
    },
    /// Open as long as the clone runs.
    Shared(Resident),
}

/// Where QEMU leaves the state of its devices, or finds it.
pub(super) enum Transfer {
    None,
    /// A descriptor, by its number in QEMU's process.
    From(RawFd),
    /// A socket of that name in a folder, which has that number in QEMU's process: QEMU may start no other process, and knows no
    /// other way to be given a place to write to.
    To {
        listener: UnixListener,
        folder: RawFd,
        name: &'static str,
    },
}

/// A machine whose QEMU answers.
pub(super) struct Made {
    pub(super) qemu: Arc<Process>,
    pub(super) watch: Watch,
    pub(super) qmp: Qmp,
    pub(super) begin: Instant,
    /// The host's ends of the ports that templates and clones have.
    pub(super) ports: Option<Ports>,
    pub(super) transfer: Transfer,
    /// The ways to the guest's agent; a template has none, and a clone whose connections are on a serial port only when it is awake.
    pub(super) line: Option<Line>,
    /// A clone's.
    pub(super) memory: Option<CloneMemory>,
    /// The address of the first network interface.
    pub(super) card: Option<Mac>,
    /// What a clone is given when it has been restored, and a template when its guest has booted, in this order.
    pub(super) devices: Vec<Device>,
    pub(super) network: Option<ConfigureNetworkRequest>,
}

/// The ways between launcher and agent.
pub(super) struct Line {
    pub(super) ready: ReadyListener,
    pub(super) dialer: VsockDialer,
    /// What carries them, where that is this process.
    pub(super) multiplexed: Option<Multiplexed>,
    /// For much output, where the machine has such memory.
    pub(super) output: Option<OutputWindow>,
}

/// The host's ends of the ports that templates and clones have, kept open also when nobody needs them any more: that a port is closed
/// would be news for the guest.
pub(super) struct Ports {
    pub(super) agent: tokio::net::UnixStream,
    /// None where a process serves it.
    pub(super) share: Option<UnixStream>,
    /// None where QEMU has no device for it, and once somebody reads there.
    pub(super) output: Option<OutputWindow>,
}

/// Makes everything. `record` names each thing before it is made.
pub(super) async fn make(
    config: &Config,
    machine: &Machine,
    plan: &Plan,
    mut origin: Origin,
    (state, record): (&StateDir, &mut Record),
    watcher: Option<Watcher>,
) -> Result<Made, VmError> {
    state.write(record)?;
    let wall = wall(config, machine, plan, state, record)?;
    // It takes longer than anything that follows, which has not to wait for it.
    let filling = match &mut origin {
        Origin::Clone {
            memory: Memory::Copy { filler, .. },
            ..
        } => Some(Process::fork(|| filler.fill(), &wall)?),
        Origin::Boot | Origin::Template { .. } | Origin::Clone { .. } => None,
    };
    let mode = match &origin {
        Origin::Clone { memory, .. } => Some(memory.mode()),
        Origin::Boot | Origin::Template { .. } => None,
    };
    let connected = match origin {
        Origin::Template { .. } => Connected::default(),
        Origin::Boot | Origin::Clone { .. } => connect(config, machine, &wall, mode, state, record).await?,
    };
    let mut inherited = connected.inherited;
    let mut connections = connected.connections;
    let card = connections.taps.first().map(|tap| tap.mac);
    if card.is_none() && !matches!(origin, Origin::Boot) {
        // A boot needs none.
        let tap = netdev::unconnected().await.map_err(no_card)?;
        let vhost = netdev::vhost().map(|vhost| inherited.add(vhost));
        let tap = devices::Tap::of_template(inherited.add(tap), vhost);
        connections.taps.push(tap);
    }

    let interfaces = connections.taps.len();
    if matches!(origin, Origin::Clone { .. }) && interfaces > CLONE_TAPS_MAX {
        return Err(VmError::NoTemplate(format!(
            "it has {interfaces} network interfaces, and a clone can have {CLONE_TAPS_MAX}"
        )));
    }

    let (qmp_here, qmp_there) = UnixStream::pair().map_err(VmError::io("making QEMU's control connection"))?;
    let (console_here, console_there) = UnixStream::pair().map_err(VmError::io("making the console's connection"))?;
    let qmp = inherited.add(qmp_there);
    let console = inherited.add(console_there);
    let (mut ports, mut clone_memory, mut transfer) = (None, None, Transfer::None);
    let start = match origin {
        Origin::Boot => Start::Boot {
            kernel: inherited.file(&machine.guest.kernel)?,
            initramfs: inherited.file(&machine.guest.initramfs)?,
            ready_port: match &connected.line {
                Some(line) => line
                    .ready
                    .port()
                    .map_err(VmError::io("asking for the port of the agent's greeting"))?,
                None => coreos_kvm_proto::READY_PORT,
            },
        },
        Origin::Template { memory } => {
            transfer = place_to_save(state, record.uid, &mut inherited)?;
            Start::Template {
                kernel: inherited.file(&machine.guest.kernel)?,
                initramfs: inherited.file(&machine.guest.initramfs)?,
                memory: inherited.add(memory),
                ports: make_ports(&mut ports, &plan.qemu, None, &mut inherited)?,
            }
        }
        Origin::Clone { memory, mut state } => {
            if let Some(card) = card
                && !give_address(&mut state, card)
            {
                return Err(VmError::NoTemplate("its devices have no network card".to_owned()));
            }
            transfer = Transfer::From(inherited.add(in_memory(&state)?));
            let mode = memory.mode();
            let another = memory
                .file()
                .try_clone()
                .map_err(VmError::io("duplicating descriptors"))?;
            clone_memory = match memory {
                Memory::Copy { memory, .. } => filling.map(|filling| CloneMemory::Copy { memory, filling }),
                // By its own number others find it.
                Memory::Shared(shared) => Some(CloneMemory::Shared(shared)),
            };
            Start::Clone {
                memory: inherited.add(another),
                mode,
                ports: make_ports(&mut ports, &plan.qemu, connected.share_port, &mut inherited)?,
            }
        }
    };
    let descriptors = Descriptors {
        start,
        ignition: match &plan.ignition {
            Carriage::FwCfg(text) | Carriage::FwCfgCompressed(text) => arguments::Ignition::FwCfg {
                descriptor: inherited.add(in_memory(text.as_bytes())?),
            },
            Carriage::Disk { serial, content } => arguments::Ignition::Disk {
                descriptor: inherited.add(in_memory(content.as_bytes())?),
                serial: serial.clone(),
            },
        },
        root: inherited.file(&machine.guest.root)?,
        agent_disk: inherited.file(&config.agent_disk)?,
        data_disk: plan.data_disk()?.map(|disk| inherited.add(disk)),
        qmp,
        console,
        connections,
    };

    let console = async_socket(console_here).map_err(VmError::io("reading the console"))?;
    let console = Console::start(console, &state.console(), watcher).map_err(VmError::io("recording the console"))?;
    let arguments = arguments::arguments(machine, &plan.host, &descriptors);
    let devices = match &descriptors.start {
        Start::Boot { .. } => Vec::new(),
        Start::Template { .. } => devices::card(&descriptors.connections).into_iter().collect(),
        Start::Clone { .. } => devices::plugged(&descriptors.connections),
    };
    let begin = Instant::now();
    let qemu = Arc::new(Process::start(&plan.qemu.path, &arguments, inherited.0, wall)?);
    record.qemu = Some(qemu.id());
    state.write(record)?;

    let mut watch = Watch {
        qemu: qemu.clone(),
        helpers: connected.helpers,
        console,
        ending: None,
        deadline: begin + machine.boot_timeout,
        boot_timeout: machine.boot_timeout,
    };
    let qmp = watch.during(async { Ok(Qmp::open(qmp_here).await?) }).await?;
    watch.ending = Some(qmp.ending());
    Ok(Made {
        qemu,
        watch,
        qmp,
        begin,
        ports,
        transfer,
        line: connected.line,
        memory: clone_memory,
        card,
        devices,
        network: connected.network,
    })
}

fn no_card(error: netdev::NetdevError) -> VmError {
    VmError::NoTemplate(format!("it has no network card: {}", sentence(&error)))
}

/// What all of the machine's processes are behind.
fn wall(
    config: &Config,
    machine: &Machine,
    plan: &Plan,
    state: &StateDir,
    record: &mut Record,
) -> Result<Confinement, VmError> {
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
        groups: plan.groups.clone(),
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
    Ok(wall)
}

/// The host's side of a guest's connections.
#[derive(Default)]
struct Connected {
    connections: Connections,
    helpers: Vec<super::watch::Helper>,
    line: Option<Line>,
    /// Who serves the shared directory of a guest without virtiofs.
    share_port: Option<OwnedFd>,
    network: Option<ConfigureNetworkRequest>,
    inherited: Inherited,
}

async fn connect(
    config: &Config,
    machine: &Machine,
    wall: &Confinement,
    mode: Option<CloneMode>,
    state: &StateDir,
    record: &mut Record,
) -> Result<Connected, VmError> {
    let another_wall = || wall.try_clone().map_err(VmError::io("duplicating descriptors"));

    // virtiofsd starts while the vsock device is waited for.
    virtiofs::prepare(&state.mount_points(), &state.shared())?;
    // As root, for the files of containers have any owner; it confines itself further.
    let confinement = Confinement {
        uid: None,
        groups: Vec::new(),
        ..another_wall()?
    };
    let mut connected = Connected::default();
    if mode == Some(CloneMode::CopyOnWrite) {
        let server = ShareServer::start(&config.share_server, &state.shared(), confinement)?;
        note_helper(record, share_server::PROGRAM, &server.process);
        state.write(record)?;
        connected.helpers.push((share_server::PROGRAM, server.process));
        connected.share_port = Some(server.connection);
        attach(machine, &mut connected).await?;
        return Ok(connected);
    }
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
    let line = Line {
        ready: ReadyListener::bind(&vsock.address, wall.uid)?,
        dialer: vsock.dialer(),
        multiplexed: None,
        output: None,
    };

    connected.helpers.push(("virtiofsd", virtiofs.process));
    connected.line = Some(line);
    let inherited = &mut connected.inherited;
    connected.connections.shared = Some(inherited.add(virtiofs.connection));
    connected.connections.vsock = Some(match vsock.backend {
        Backend::Vhost { device, cid } => devices::Vsock::Vhost {
            descriptor: inherited.add(device),
            cid,
        },
        Backend::VhostUser { process, connection } => {
            connected.helpers.push(("vhost-device-vsock", process));
            devices::Vsock::VhostUser {
                connection: inherited.add(connection),
            }
        }
    });
    attach(machine, &mut connected).await?;
    Ok(connected)
}

/// Connects the machine's network.
async fn attach(machine: &Machine, connected: &mut Connected) -> Result<(), VmError> {
    match &machine.network {
        Network::None => {}
        Network::User { .. } => connected.network = Some(netdev::user_configuration()),
        Network::Tap { netns, redirects } => {
            let attached = netdev::attach(netns, redirects).await?;
            for tap in attached.taps {
                connected.connections.taps.push(devices::Tap {
                    descriptor: connected.inherited.add(tap.descriptor),
                    vhost: tap.vhost.map(|vhost| connected.inherited.add(vhost)),
                    mac: tap.mac,
                    mtu: tap.mtu,
                });
            }
            connected.network = Some(attached.configuration);
        }
    }
    Ok(())
}

fn note_helper(record: &mut Record, name: &str, process: &Process) {
    record.helpers.push(Helper {
        name: name.to_owned(),
        process: process.id(),
    });
}

/// Makes the connections of the serial ports, that of the share only where nobody serves it, and that of output where QEMU has a device for the
/// memory that goes with it: answers QEMU's ends, and leaves ours in `here`.
fn make_ports(
    here: &mut Option<Ports>,
    qemu: &Qemu,
    share: Option<OwnedFd>,
    inherited: &mut Inherited,
) -> Result<arguments::Ports, VmError> {
    let make = || {
        let (ours, agent) = UnixStream::pair()?;
        let (window, output) = qemu.ivshmem.then(make_window).transpose()?.unzip();
        let (kept, share) = match share {
            Some(share) => (None, share),
            None => UnixStream::pair().map(|(ours, theirs)| (Some(ours), theirs.into()))?,
        };
        *here = Some(Ports {
            agent: async_socket(ours)?,
            share: kept,
            output: window,
        });
        Ok(arguments::Ports {
            agent: inherited.add(agent),
            share: inherited.add(share),
            output: output.map(|(bell, memory)| arguments::Output {
                port: inherited.add(bell),
                memory: inherited.add(memory),
            }),
        })
    };
    make().map_err(VmError::io("making the connections of the guest's serial ports"))
}

/// Makes the socket to which QEMU connects in order to save its devices.
fn place_to_save(state: &StateDir, uid: Option<u32>, inherited: &mut Inherited) -> Result<Transfer, VmError> {
    const NAME: &str = "devices";
    let mut make = || {
        let path = state.path().join("save");
        DirBuilder::new().mode(0o700).create(&path)?;
        chown(&path, uid, uid)?;
        // By the folder's descriptor, for the folders above are closed to QEMU; that also keeps the path short: unix(7).
        let open = File::open(&path)?;
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{NAME}", open.as_raw_fd()))?;
        chown(path.join(NAME), uid, uid)?;
        Ok(Transfer::To {
            listener,
            folder: inherited.add(open),
            name: NAME,
        })
    };
    make().map_err(VmError::io("making the socket to which the state of devices is saved"))
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

fn in_memory(content: &[u8]) -> Result<File, VmError> {
    sealed(content).map_err(VmError::io("keeping the configuration in memory"))
}

/// A file in memory that nobody can change any more, and that has no name: a configuration may hold secrets.
fn sealed(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(
        c"coreos-kvm",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    file.write_all(content)?;
    let seals = SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    // Of a disk's descriptors QEMU takes the one that is open as the disk is: for reading alone.
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Memory for a guest, all zero, of which nothing is there yet.
pub(super) fn empty_memory(machine: &Machine) -> Result<File, VmError> {
    let make = || {
        let memory = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC)?);
        memory.set_len(machine.memory_mib << 20)?;
        Ok(memory)
    };
    make().map_err(VmError::io("making the guest's memory"))
}

/// Makes the memory in which much output comes, and QEMU's end of the connection that goes with it.
fn make_window() -> io::Result<(OutputWindow, (UnixStream, File))> {
    let (bell, port) = UnixStream::pair()?;
    let memory = File::from(memfd_create(
        c"window",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    memory.set_len(output_window::SIZE as u64)?;
    // Nobody can take away what this process has mapped.
    let seals = SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    let reader = Reader::open(memory.try_clone()?)?;
    Ok((OutputWindow::new(reader, async_socket(bell)?), (port, memory)))
}

fn async_socket(socket: UnixStream) -> io::Result<tokio::net::UnixStream> {
    socket.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(socket)
}
