//! The measure of all clones: QEMU by hand, restored from a template whose memory it maps copy-on-write, and given the same devices,
//! with nothing around it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use coreos_kvm_launcher::netdev;
use coreos_kvm_launcher::template::{
    Store, Template,
    memory::{self, Filler},
};
use coreos_kvm_proto::agent::Awakening;
use coreos_kvm_proto::mux::{Mux, Side};
use coreos_kvm_proto::{GREETING, READY_PORT, SEED_LENGTH, output_window};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::unistd::Pid;
use protobuf::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncBufReadExt as _;
use tokio::runtime::{Builder, Runtime};

use super::{Ended, Options, options, own_value};
use crate::artifacts;

/// What the bare clone's ids are; nobody else has them.
const BOOT_ID: [u8; 16] = *b"\xba\xbe\xba\xbe\xba\xbe\x4a\xbe\x8a\xbe\xba\xbe\xba\xbe\xba\xbe";
const MACHINE_ID: [u8; 16] = *b"\xca\xfe\xca\xfe\xca\xfe\x4a\xfe\x8a\xfe\xca\xfe\xca\xfe\xca\xfe";

/// A clone's QEMU, with what it is restored from.
#[derive(Debug)]
pub struct BareClone {
    program: String,
    arguments: Options,
    /// The state of the template's devices.
    state: Vec<u8>,
    /// A network of which nothing is asked.
    tap: OwnedFd,
    folder: TempDir,
}

impl BareClone {
    /// Copies the machine of a running QEMU, a clone of the template that was used last.
    pub fn like(qemu: Pid) -> Result<Self> {
        let template = store()?
            .entries()?
            .into_iter()
            .next()
            .context("there is no template")?
            .key;
        // In memory, as the memory of clones is.
        let folder = tempfile::tempdir_in("/dev/shm").context("making a folder")?;
        let path = |file: &str| folder.path().join(file).display().to_string();
        let state = fill(store()?.open_named(&template)?, File::create_new(path("memory"))?)?;
        let (program, all) = options(qemu)?;
        let mut arguments = Vec::new();
        for (option, value) in all {
            match (option.as_str(), value.as_deref().unwrap_or_default()) {
                ("-add-fd" | "-chardev" | "-netdev", _) => {}
                ("-object", value) if value.starts_with("memory-backend-file,id=window") => {
                    let memory = format!("memory-backend-memfd,id=window,size={},share=on", output_window::SIZE);
                    arguments.push((option, Some(memory)));
                }
                ("-object", value) if value.starts_with("memory-backend-file") => {
                    ensure!(value.ends_with("share=off"), "the machine is no clone by copy-on-write");
                    let size = value.split(',').find(|part| part.starts_with("size="));
                    let size = size.context("the memory has no size")?;
                    let memory = format!(
                        "memory-backend-file,id=memory,{size},mem-path={},share=off",
                        path("memory")
                    );
                    arguments.push((option, Some(memory)));
                }
                _ => arguments.push((option, own_value(value.as_deref(), qemu, folder.path())?)),
            }
        }
        for name in ["qmp", "agent"] {
            let chardev = format!("socket,id={name},path={},server=on,wait=off", path(name));
            arguments.push(("-chardev".to_owned(), Some(chardev)));
        }
        let tap = runtime()?.block_on(netdev::unconnected())?;
        let console = format!("file,id=console,path={}", path("console"));
        // Nothing has much to say.
        for chardev in [console, "null,id=output".to_owned()] {
            arguments.push(("-chardev".to_owned(), Some(chardev)));
        }
        Ok(Self {
            program,
            arguments,
            state,
            tap,
            folder,
        })
    }

    /// Starts it and answers how long it took from nothing to the agent's greeting.
    pub fn start(&self, bound: Duration) -> Result<Duration> {
        let path = |file: &str| self.folder.path().join(file);
        for file in ["qmp", "agent", "state"] {
            let _ = fs::remove_file(path(file));
        }
        let shared = path("share");
        fs::create_dir_all(&shared)?;

        let begun = Instant::now();
        let deadline = begun + bound;
        let (ours, theirs) = UnixStream::pair()?;
        let [ours, theirs] = [OwnedFd::from(ours), OwnedFd::from(theirs)].map(inheritable);
        let (ours, theirs, tap) = (ours?, theirs?, inheritable(self.tap.try_clone()?)?);
        let mut server = Command::new(artifacts::program("coreos-kvm-share")?);
        server
            .arg(format!("--fd={}", theirs.as_raw_fd()))
            .arg("--shared-dir")
            .arg(shared);
        let _server = Ended::spawn(&mut server)?;
        let mut qemu = Command::new(&self.program);
        for (option, value) in &self.arguments {
            qemu.arg(option).args(value);
        }
        qemu.args(["-chardev", &format!("socket,id=share,fd={}", ours.as_raw_fd())]);
        let vhost = netdev::vhost().map(inheritable).transpose()?;
        let by_kernel = vhost
            .as_ref()
            .map(|vhost| format!(",vhost=on,vhostfd={}", vhost.as_raw_fd()));
        let network = format!("tap,id=net0,fd={}{}", tap.as_raw_fd(), by_kernel.unwrap_or_default());
        qemu.args(["-netdev", &network]);
        let _qemu = Ended::spawn(&mut qemu)?;
        drop((ours, theirs, tap, vhost));

        wait_until(deadline, || UnixStream::connect(path("qmp")).is_ok())?;
        let mut monitor = Monitor::open(UnixStream::connect(path("qmp"))?, deadline)?;
        monitor.tell("qmp_capabilities", json!({}))?;
        let capabilities = ["events", "x-ignore-shared"].map(|name| json!({"capability": name, "state": true}));
        monitor.tell("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        let mut port = UnixStream::connect(path("agent"))?;
        let uri = format!("unix:{}", path("state").display());
        monitor.tell("migrate-incoming", json!({"uri": uri}))?;
        UnixStream::connect(path("state"))?.write_all(&self.state)?;
        monitor.hear(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "completed")?;
        monitor.tell("cont", json!({}))?;
        wake(&mut port)?;
        greeting(port, deadline).with_context(|| {
            let console = fs::read(path("console")).unwrap_or_default();
            format!("the console says {:?}", String::from_utf8_lossy(&console))
        })?;
        Ok(begun.elapsed())
    }
}

fn runtime() -> Result<Runtime> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

/// What a process that is started keeps open.
fn inheritable(descriptor: OwnedFd) -> Result<OwnedFd> {
    fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::empty())).context("keeping a descriptor open")?;
    Ok(descriptor)
}

/// Waits for the agent's greeting among the connections on its port.
fn greeting(port: UnixStream, deadline: Instant) -> Result<()> {
    let greeted = async {
        port.set_nonblocking(true)?;
        let (_mux, mut incoming, work) = Mux::new(tokio::net::UnixStream::from_std(port)?, Side::Host);
        tokio::spawn(work);
        let arrival = incoming.next().await.context("the guest has closed its port")?;
        ensure!(arrival.port == READY_PORT, "the guest dials port {}", arrival.port);
        let mut line = String::new();
        let mut greeting = tokio::io::BufReader::new(arrival.take().await?);
        greeting.read_line(&mut line).await?;
        ensure!(
            line.starts_with(GREETING),
            "that was no greeting of the agent: {line:?}"
        );
        Ok(())
    };
    let left = deadline.saturating_duration_since(Instant::now());
    runtime()?.block_on(async { tokio::time::timeout(left, greeted).await })?
}

/// The templates of the tests' nodes.
fn store() -> Result<Store> {
    Ok(Store::open(&artifacts::templates(), u64::MAX)?)
}

/// Copies the template's memory; answers the state of its devices.
fn fill(template: Template, memory: File) -> Result<Vec<u8>> {
    let Template {
        manifest,
        map,
        data,
        state,
        ..
    } = template;
    memory.set_len(manifest.memory_mib << 20)?;
    Filler::new(map, data, memory.try_clone()?).fill()?;
    let boot_ids = manifest.boot_id_at.iter().map(|place| (*place, BOOT_ID.to_vec()));
    let machine_ids = manifest.machine_id_at.iter().map(|place| (*place, MACHINE_ID.to_vec()));
    memory::change(&memory, &boot_ids.chain(machine_ids).collect::<Vec<_>>())?;
    Ok(state)
}

/// Tells the guest who it is.
fn wake(port: &mut UnixStream) -> Result<()> {
    let mut seed = vec![0; SEED_LENGTH];
    std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut seed)?;
    let message = Awakening {
        seed,
        boot_id: BOOT_ID.to_vec(),
        machine_id: MACHINE_ID.to_vec(),
        ready_port: READY_PORT,
        serial: true,
        card: true,
        wall_clock_ns: i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos())?,
        ..Default::default()
    };
    let message = message.write_to_bytes()?;
    port.write_all(&u32::try_from(message.len())?.to_be_bytes())?;
    port.write_all(&message)?;
    Ok(())
}

fn wait_until(deadline: Instant, condition: impl Fn() -> bool) -> Result<()> {
    while !condition() {
        ensure!(Instant::now() < deadline, "the bare clone's parts do not start");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// QEMU's control connection, one line a message.
struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    fn open(stream: UnixStream, deadline: Instant) -> Result<Self> {
        let left = deadline.saturating_duration_since(Instant::now());
        stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut monitor = Self {
            lines: BufReader::new(stream),
        };
        monitor.hear(|line| line.get("QMP").is_some())?;
        Ok(monitor)
    }

    fn tell(&mut self, command: &str, arguments: Value) -> Result<()> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.lines.get_mut().write_all(line.as_bytes())?;
        let said = self.hear(|line| line.get("return").is_some() || line.get("error").is_some())?;
        match said.get("error") {
            Some(error) => bail!("QEMU refused {command}: {error}"),
            None => Ok(()),
        }
    }

    fn hear(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        loop {
            let mut line = String::new();
            ensure!(self.lines.read_line(&mut line)? > 0, "QEMU has closed its monitor");
            let said: Value = serde_json::from_str(&line)?;
            if wanted(&said) {
                return Ok(said);
            }
        }
    }
}
