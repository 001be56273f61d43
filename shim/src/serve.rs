//! The shim's main part: serves containerd's Task API and its Sandbox API for one pod, from its first container to its last.

use std::{
    env, io,
    os::{fd::AsFd, unix::net::UnixListener as StdListener},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use anyhow::Context as _;
use containerd_shim::{Flags, socket_address};
use coreos_kvm_launcher::mountinfo;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{dup2_stdin, setsid},
};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{UnixListener, unix::OwnedReadHalf},
    signal::unix::{SignalKind, signal},
    time::timeout,
};
use tokio_util::task::{TaskTracker, task_tracker::TaskTrackerToken};
use ttrpc::r#async::{Server, transport::Listener};

use crate::{
    bootstrap::socket_path,
    containerd::Containerd,
    events::{self, Events},
    hypervisor::Qemu,
    logging, options,
    pod::Pod,
    sandbox::SandboxService,
    service::Service,
};

/// containerd's ttrpc socket, for events.
const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// Longest time for the last events and answers to reach containerd.
const FAREWELL: Duration = Duration::from_secs(5);
/// Longest time from the pod's end until containerd, which has asked for it, hangs up.
const HEARD: Duration = Duration::from_secs(1);
/// What a guest is given to power off when the node goes down.
const GRACE: Duration = Duration::from_secs(10);

/// Serves on the socket that is this process's stdin until the pod is gone.
pub(crate) fn serve(flags: &Flags) -> anyhow::Result<()> {
    let bundle = env::current_dir().context("the bundle, the current directory, is gone")?;
    logging::init(&bundle, flags.debug);
    let served = run(flags, &bundle);
    if let Err(error) = &served {
        tracing::error!(error = format!("{error:#}"), "the shim ends");
    }
    served
}

fn run(flags: &Flags, bundle: &Path) -> anyhow::Result<()> {
    let socket = take_stdin().context("taking over the socket")?;
    // A session of its own: whatever is sent to containerd's terminal or process group is not for the pod.
    setsid().context("making a session")?;
    env::set_current_dir("/").context("leaving the bundle")?;
    have_own_mounts(bundle).context("having mounts of its own")?;
    // The machine's processes end with the thread that started them, which therefore is this one.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Only files and mounts are left to other threads.
        .max_blocking_threads(4)
        .build()
        .context("starting the runtime")?;
    runtime.block_on(served(flags, bundle, socket))
}

/// What is mounted for the pod's machine is nobody else's: no unmount on the host finds it busy, and it goes with the last of the pod's
/// processes, whatever becomes of them. What the host mounts and unmounts still arrives; where it would not, these mounts are on the host.
fn have_own_mounts(bundle: &Path) -> anyhow::Result<()> {
    // Where volumes and root file systems come to be, unless an admin has moved them.
    let places = ["/", "/var/lib/kubelet", "/var/lib/containerd"].map(Path::new);
    if !mountinfo::are_shared(&[&places[..], &[bundle]].concat())? {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    Ok(())
}

async fn served(flags: &Flags, bundle: &Path, socket: StdListener) -> anyhow::Result<()> {
    let address = env::var(TTRPC_ADDRESS).unwrap_or_else(|_| format!("{}.ttrpc", flags.address));
    let (events, queue) = Events::queue(&flags.namespace);
    let forwarding = events::forward(address, queue);
    let containerd = Containerd {
        address: flags.address.clone(),
        namespace: flags.namespace.clone(),
    };
    let config = env::var_os(options::CONFIG).map(PathBuf::from);
    let pod = Arc::new(Pod::new(Box::new(Qemu), Some(containerd), events, config));

    socket.set_nonblocking(true).context("preparing the socket")?;
    let listener = UnixListener::from_std(socket).context("preparing the socket")?;
    let connections = TaskTracker::new();
    let accepted = (listener, connections.clone());
    let incoming = futures::stream::unfold(accepted, |(listener, connections)| async move {
        let connection = listener.accept().await.map(|(stream, _)| {
            let (half, writer) = stream.into_split();
            let open = connections.token();
            tokio::io::join(Reader { half, _open: open }, writer)
        });
        Some((connection, (listener, connections)))
    });
    let mut server = Server::new()
        .add_listener(Listener::new(incoming))
        .register_service(Service::new(pod.clone()).both_versions())
        .register_service(SandboxService::new(pod.clone()).named());
    server.start().await.context("serving")?;
    tracing::info!(id = flags.id, version = env!("CARGO_PKG_VERSION"), "the shim serves");

    let mut terminate = signal(SignalKind::terminate()).context("waiting for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("waiting for signals")?;
    let grace = tokio::select! {
        () = pod.closed() => Duration::ZERO,
        () = pod.forgotten(bundle) => Duration::ZERO,
        _ = terminate.recv() => GRACE,
        _ = interrupt.recv() => GRACE,
    };
    pod.end(grace).await;

    // The answer to who asked for the end is still on its way: a connection that ends along with it is a failed call to containerd's
    // client. Then the last events are.
    connections.close();
    let _ = timeout(HEARD, connections.wait()).await;
    let _ = timeout(FAREWELL, server.shutdown()).await;
    drop((server, pod));
    let _ = timeout(FAREWELL, forwarding).await;
    let socket = socket_path(&socket_address(&flags.address, &flags.namespace, &flags.id));
    if let Err(error) = std::fs::remove_file(&socket) {
        tracing::debug!(%error, socket = %socket.display(), "the socket stays");
    }
    tracing::info!(id = flags.id, "the shim ends");
    Ok(())
}

/// What comes by a connection, which counts as open as long as this is there.
struct Reader {
    half: OwnedReadHalf,
    _open: TaskTrackerToken,
}

impl AsyncRead for Reader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().half).poll_read(context, buffer)
    }
}

fn take_stdin() -> io::Result<StdListener> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let null = std::fs::File::open("/dev/null")?;
    dup2_stdin(&null)?;
    Ok(socket.into())
}
