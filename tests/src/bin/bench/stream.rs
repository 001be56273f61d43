//! How fast a container's output comes, against bytes that a program of the same guest writes to vsock by itself.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use coreos_kvm_launcher::state::{Record, VsockAddress};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::node::Handler;
use kubeception_tests::pod::{Container, Pod};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use super::shim::Shim;
use super::{Bench, COPIED};
use crate::table::{Samples, Table};

const MIB: usize = 1 << 20;
/// Bytes of one stream.
const SIZE: usize = 64 * MIB;
/// What is written at once: what a pipe holds.
const CHUNK: usize = 64 * 1024;
/// How long a stream may be silent: a program that is started in an emulated guest takes some seconds.
const SILENCE: Duration = Duration::from_secs(60);
/// Port of the host at which the raw stream is taken; no other program of the node has it in a node of its own.
const PORT: u32 = 9999;
/// Where a container finds this program.
const PROGRAMS: &str = "/bench";

/// Where a stream goes.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub(crate) enum Target {
    /// To the host's vsock
    Host,
    /// To stdout
    Output,
}

/// Writes a stream, as a program in a guest.
pub(crate) fn send(target: Target) -> Result<()> {
    let mut stream: Box<dyn Write> = match target {
        Target::Host => {
            let host = VsockAddr::new(VMADDR_CID_HOST, PORT);
            Box::new(VsockStream::connect(&host).context("connecting to the host")?)
        }
        // Without the buffer that std has for it.
        Target::Output => Box::new(File::from(std::io::stdout().as_fd().try_clone_to_owned()?)),
    };
    let chunk = vec![0; CHUNK];
    for _ in 0..SIZE / CHUNK {
        stream.write_all(&chunk)?;
    }
    Ok(())
}

impl Bench<'_> {
    /// On a clone by copy, which has a vsock device.
    pub(super) fn streams(&self, table: &mut Table) -> Result<()> {
        let program = std::env::current_exe()?;
        let (Some(folder), Some(name)) = (program.parent(), program.file_name()) else {
            bail!("this program is in no folder");
        };
        let program = format!("{PROGRAMS}/{}", name.to_string_lossy());
        // The program and the agent take no turns then.
        let pod = Pod::new(self.node.place(), "streams").annotation("coreos-kvm.io/vcpus", "2");
        let id = self.cri.run_pod(&pod, COPIED)?;
        let idle = Container::new("idle", BUSYBOX)
            .command(&["sleep", "2147483647"])
            .host_path(folder, PROGRAMS, true);
        let container = self.cri.run(&id, &idle, &pod)?;
        let shim = Shim::connect(self.node, &id)?;
        let listener = self.listener(&id)?;
        let fifo = self.node.place().base().join("stream");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).context("making a FIFO")?;
        // For both, so that it has a reader before anybody writes.
        let mut output = File::options().read(true).write(true).open(&fifo)?;
        let (mut outputs, mut raws) = (Samples::default(), Samples::default());
        for run in 1..=self.arguments.runs {
            eprintln!("streams {run} of {}", self.arguments.runs);
            let exec = format!("raw-{run}");
            shim.exec(&container, &exec, &[&program, "--send", "host"], &fifo)?;
            raws.add(rate(&mut *listener.accept()?)?);
            shim.finish(&container, &exec)?;

            let exec = format!("output-{run}");
            shim.exec(&container, &exec, &[&program, "--send", "output"], &fifo)?;
            outputs.add(rate(&mut output)?);
            shim.finish(&container, &exec)?;
        }
        fs::remove_file(&fifo)?;
        table.at_least(
            "stream_over_raw",
            "a container's output at its FIFO, over a raw vsock stream",
            (&outputs, &raws),
            0.8,
        );
        table.samples(
            "stream_mib_s",
            "a container's output at its FIFO",
            "MiB/s",
            &outputs,
            None,
        );
        table.samples(
            "raw_mib_s",
            "a raw vsock stream of the same guest",
            "MiB/s",
            &raws,
            None,
        );
        self.cri.stop_pod(&id)?;
        self.cri.remove_pod(&id)
    }

    /// Takes what the guest of that pod sends to [`PORT`].
    fn listener(&self, sandbox: &str) -> Result<Listener> {
        let mut command = self.node.command("coreos-kvm");
        let config = Handler::variant(COPIED).config_path(self.node.place());
        let output = command.arg("--config").arg(config).args(["ps", "--json"]).output()?;
        let machines: Vec<Record> = serde_json::from_slice(&output.stdout).context("reading the list of machines")?;
        let machine = machines.into_iter().find(|machine| machine.id == sandbox);
        let machine = machine.context("the pod has no machine")?;
        Ok(match machine.vsock.context("the machine has no vsock device")? {
            VsockAddress::Cid(_) => Listener::Kernel(VsockListener::bind(&VsockAddr::new(VMADDR_CID_ANY, PORT))?),
            VsockAddress::Socket(socket) => {
                let below_run = socket
                    .strip_prefix("/run")
                    .context("the vsock device is not below /run")?;
                let device = self.node.place().run().join(below_run);
                let (Some(folder), Some(name)) = (device.parent(), device.file_name()) else {
                    bail!("{} is no socket", device.display());
                };
                // By the folder's descriptor, for a path may be too long for a socket: unix(7).
                let folder = File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
                let path = format!("/proc/self/fd/{}/{}_{PORT}", folder.as_raw_fd(), name.to_string_lossy());
                let listener = UnixListener::bind(&path).with_context(|| format!("listening at {path}"))?;
                chown(&path, machine.uid, machine.uid)?;
                Listener::Process(listener)
            }
        })
    }
}

/// Where the guest's connections with the host arrive.
enum Listener {
    Kernel(VsockListener),
    Process(UnixListener),
}

impl Listener {
    fn accept(&self) -> Result<Box<dyn Stream>> {
        match self {
            Self::Kernel(listener) => speaks(listener).context("waiting for the guest's connection")?,
            Self::Process(listener) => speaks(listener).context("waiting for the guest's connection")?,
        }
        Ok(match self {
            Self::Kernel(listener) => Box::new(listener.accept()?.0),
            Self::Process(listener) => Box::new(listener.accept()?.0),
        })
    }
}

/// What bytes arrive on.
trait Stream: Read + AsFd {}
impl<T: Read + AsFd> Stream for T {}

/// Waits until something has arrived.
fn speaks(stream: &(impl AsFd + ?Sized)) -> Result<()> {
    let mut polled = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    let ready = poll(&mut polled, PollTimeout::try_from(SILENCE)?)?;
    ensure!(ready > 0, "nothing came for {} s", SILENCE.as_secs());
    Ok(())
}

/// Reads a whole stream: MiB per second, from its first bytes to its last.
fn rate(stream: &mut dyn Stream) -> Result<f64> {
    let mut buffer = vec![0; CHUNK];
    speaks(stream)?;
    let mut rest = SIZE - stream.read(&mut buffer)?;
    let (begun, measured) = (Instant::now(), rest);
    while rest > 0 {
        speaks(stream).with_context(|| format!("{rest} bytes of the stream are missing"))?;
        let count = stream.read(&mut buffer)?;
        ensure!(count > 0, "the stream ends {rest} bytes early");
        rest = rest.checked_sub(count).context("the stream is too long")?;
    }
    Ok(measured as f64 / MIB as f64 / begun.elapsed().as_secs_f64())
}
