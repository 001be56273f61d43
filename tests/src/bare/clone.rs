//! The measure of all clones: QEMU by hand, restored by copy from a template and given the same devices, with nothing around it.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use coreos_kvm_launcher::template::{Store, Template, memory::Filler};
use coreos_kvm_proto::agent::Awakening;
use coreos_kvm_proto::{READY_PORT, SEED_LENGTH, SHARED_TAG};
use nix::unistd::Pid;
use protobuf::Message as _;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Ended, Options, greeted, options, own_value};
use crate::artifacts;

/// What the bare clone's ids are; nobody else has them.
const BOOT_ID: [u8; 16] = *b"\xba\xbe\xba\xbe\xba\xbe\x4a\xbe\x8a\xbe\xba\xbe\xba\xbe\xba\xbe";
const MACHINE_ID: [u8; 16] = *b"\xca\xfe\xca\xfe\xca\xfe\x4a\xfe\x8a\xfe\xca\xfe\xca\xfe\xca\xfe";

/// A clone's QEMU, with what it is restored from.
#[derive(Debug)]
pub struct BareClone {
    program: String,
    arguments: Options,
    /// Key of the template.
    template: String,
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
        let (program, all) = options(qemu)?;
        let mut arguments = Vec::new();
        for (option, value) in all {
            match (option.as_str(), value.as_deref().unwrap_or_default()) {
                ("-add-fd" | "-chardev" | "-netdev", _) => {}
                ("-object", value) if value.starts_with("memory-backend-file") => {
                    let size = value.split(',').find(|part| part.starts_with("size="));
                    let size = size.context("the memory has no size")?;
                    let memory = format!(
                        "memory-backend-file,id=memory,{size},mem-path={},share=on",
                        path("memory")
                    );
                    arguments.push((option, Some(memory)));
                }
                _ => arguments.push((option, own_value(value.as_deref(), qemu, folder.path())?)),
            }
        }
        for (name, rest) in [
            ("qmp", ",server=on,wait=off"),
            ("wake", ",server=on,wait=off"),
            ("vsock", ""),
            ("shared", ""),
        ] {
            let chardev = format!("socket,id={name},path={}{rest}", path(name));
            arguments.push(("-chardev".to_owned(), Some(chardev)));
        }
        let console = format!("file,id=console,path={}", path("console"));
        arguments.push(("-chardev".to_owned(), Some(console)));
        // A network of which nothing is asked.
        arguments.push(("-netdev".to_owned(), Some("hubport,id=net0,hubid=0".to_owned())));
        Ok(Self {
            program,
            arguments,
            template,
            folder,
        })
    }

    /// Starts it and answers how long it took from nothing to the agent's greeting.
    pub fn start(&self, bound: Duration) -> Result<Duration> {
        let path = |file: &str| self.folder.path().join(file);
        for file in ["memory", "qmp", "wake", "vsock", "shared", "vsock-host", "state"] {
            let _ = fs::remove_file(path(file));
        }
        let greeting = path(&format!("vsock-host_{READY_PORT}"));
        let _ = fs::remove_file(&greeting);
        let listener = UnixListener::bind(&greeting).context("listening for the agent")?;

        let begun = Instant::now();
        let deadline = begun + bound;
        let mut vsock = Command::new(artifacts::tool("vhost-device-vsock")?);
        vsock.args(["--guest-cid", "3", "--socket"]).arg(path("vsock"));
        let _vsock = Ended::spawn(vsock.arg("--uds-path").arg(path("vsock-host")))?;
        let mut virtiofs = Command::new(artifacts::tool("virtiofsd")?);
        virtiofs.arg("--socket-path").arg(path("shared"));
        let shared = self.folder.path().join("share");
        fs::create_dir_all(&shared)?;
        let _virtiofs = Ended::spawn(virtiofs.arg("--shared-dir").arg(shared).arg("--log-level=error"))?;

        let template = store()?.open_named(&self.template)?;
        let memory = File::create_new(path("memory")).context("making the memory")?;
        memory.set_len(template.manifest.memory_mib << 20)?;
        let (state, filled) = fill(template, memory);
        for socket in ["vsock", "shared"] {
            wait_until(deadline, || path(socket).exists())?;
        }
        let mut qemu = Command::new(&self.program);
        for (option, value) in &self.arguments {
            qemu.arg(option).args(value);
        }
        let _qemu = Ended::spawn(&mut qemu)?;

        wait_until(deadline, || UnixStream::connect(path("qmp")).is_ok())?;
        let mut monitor = Monitor::open(UnixStream::connect(path("qmp"))?, deadline)?;
        monitor.tell("qmp_capabilities", json!({}))?;
        let capabilities = ["events", "x-ignore-shared"].map(|name| json!({"capability": name, "state": true}));
        monitor.tell("migrate-set-capabilities", json!({"capabilities": capabilities}))?;
        ensure!(
            filled.join().is_ok_and(|filled| filled.is_ok()),
            "the memory is not filled"
        );
        let uri = format!("unix:{}", path("state").display());
        monitor.tell("migrate-incoming", json!({"uri": uri}))?;
        UnixStream::connect(path("state"))?.write_all(&state)?;
        monitor.hear(|event| event["event"] == "MIGRATION" && event["data"]["status"] == "completed")?;
        for (function, device) in [
            (
                2,
                json!({"driver": "virtio-net-pci", "netdev": "net0", "romfile": "", "disable-legacy": "on"}),
            ),
            (
                1,
                json!({"driver": "vhost-user-fs-pci", "chardev": "shared", "tag": SHARED_TAG}),
            ),
            (0, json!({"driver": "vhost-user-vsock-pci", "chardev": "vsock"})),
        ] {
            let mut device = device;
            device["bus"] = json!("late");
            device["addr"] = json!(format!("0.{function}"));
            device["multifunction"] = json!(true);
            monitor.tell("device_add", device)?;
        }
        monitor.tell("cont", json!({}))?;
        // The guest reads byte by byte, and what it has not read goes with the connection.
        let mut port = UnixStream::connect(path("wake"))?;
        wake(&mut port)?;
        greeted(&listener, deadline, || Ok(())).with_context(|| {
            let console = fs::read(path("console")).unwrap_or_default();
            format!("the console says {:?}", String::from_utf8_lossy(&console))
        })?;
        Ok(begun.elapsed())
    }
}

/// The templates of the tests' nodes.
fn store() -> Result<Store> {
    Ok(Store::open(&artifacts::templates(), u64::MAX)?)
}

/// Copies the template's memory while the caller goes on; answers the state of its devices.
fn fill(template: Template, memory: File) -> (Vec<u8>, JoinHandle<std::io::Result<()>>) {
    let Template {
        manifest,
        map,
        data,
        state,
        ..
    } = template;
    let boot_ids = manifest.boot_id_at.iter().map(|place| (*place, BOOT_ID));
    let machine_ids = manifest.machine_id_at.iter().map(|place| (*place, MACHINE_ID));
    let changes = boot_ids.chain(machine_ids).collect();
    let filling = std::thread::spawn(move || Filler::new(map, data, memory, changes).fill());
    (state, filling)
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
