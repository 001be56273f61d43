//! The measure of all boots: QEMU by hand, with the guest, the configuration and the agent of a pod's machine, and nothing
//! around it: no containerd, no network, no shared files.

use std::fs;
use std::io::Read as _;
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use coreos_kvm_proto::{GREETING, GREETING_MAX, READY_PORT};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::artifacts;

mod clone;

pub use clone::BareClone;

/// QEMU's arguments, copied from a running machine, with files in place of its open descriptors.
#[derive(Debug)]
pub struct Bare {
    program: String,
    arguments: Options,
    folder: TempDir,
}

impl Bare {
    /// Copies the machine of a running QEMU.
    pub fn like(qemu: Pid) -> Result<Self> {
        let folder = tempfile::tempdir().context("making a folder")?;
        let (program, all) = options(qemu)?;
        let mut arguments = Vec::new();
        for (option, value) in all {
            if is_of_a_bare_machine(&option, value.as_deref().unwrap_or_default()) {
                let value = own_value(value.as_deref(), qemu, folder.path())?;
                arguments.push((option, value));
            }
        }
        let path = |file: &str| folder.path().join(file).display().to_string();
        arguments.push((
            "-chardev".to_owned(),
            Some(format!("file,id=console,path={}", path("console"))),
        ));
        arguments.push((
            "-chardev".to_owned(),
            Some(format!("socket,id=vsock,path={}", path("vsock-device"))),
        ));
        if !arguments
            .iter()
            .any(|(_, value)| value.as_deref().is_some_and(|value| value.contains("chardev=vsock")))
        {
            // The machine had the kernel's device.
            let device = "vhost-user-vsock-pci,chardev=vsock".to_owned();
            arguments.push(("-device".to_owned(), Some(device)));
        }
        Ok(Self {
            program,
            arguments,
            folder,
        })
    }

    /// Boots it and answers how long it took from nothing to the agent's greeting.
    pub fn boot(&self, bound: Duration) -> Result<Duration> {
        let socket = self.folder.path().join("vsock");
        let greeting_socket = format!("{}_{READY_PORT}", socket.display());
        let _ = fs::remove_file(&greeting_socket);
        let listener = UnixListener::bind(&greeting_socket).context("listening for the agent")?;

        let begun = Instant::now();
        let device = self.folder.path().join("vsock-device");
        let mut vsock = Command::new(artifacts::tool("vhost-device-vsock")?);
        vsock
            .args(["--guest-cid", "3", "--socket"])
            .arg(&device)
            .arg("--uds-path")
            .arg(&socket);
        let _vsock = Ended::spawn(&mut vsock)?;
        let deadline = begun + bound;
        while !device.exists() {
            ensure!(Instant::now() < deadline, "vhost-device-vsock does not start");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut qemu = Command::new(&self.program);
        for (option, value) in &self.arguments {
            qemu.arg(option).args(value);
        }
        let mut qemu = Ended::spawn(&mut qemu)?;

        greeted(&listener, deadline, || match qemu.0.try_wait()? {
            Some(status) => bail!("the bare machine ended: {status}"),
            None => Ok(()),
        })?;
        Ok(begun.elapsed())
    }
}

/// Options of QEMU with their values.
type Options = Vec<(String, Option<String>)>;

/// QEMU's program, and its options.
fn options(qemu: Pid) -> Result<(String, Options)> {
    let command = fs::read(format!("/proc/{qemu}/cmdline")).context("reading QEMU's arguments")?;
    let command = String::from_utf8(command).context("QEMU's arguments")?;
    let mut words = command.trim_end_matches('\0').split('\0').map(str::to_owned).peekable();
    let program = words.next().context("QEMU has no arguments")?;
    let mut options = Vec::new();
    while let Some(option) = words.next() {
        options.push((option, words.next_if(|word| !word.starts_with('-'))));
    }
    Ok((program, options))
}

/// The value of an option for a QEMU by hand; None for one that has none.
fn own_value(value: Option<&str>, qemu: Pid, folder: &Path) -> Result<Option<String>> {
    value.map(|value| with_files(value, qemu, folder)).transpose()
}

/// Waits for the agent's greeting; `look` fails when there will be none.
fn greeted(listener: &UnixListener, deadline: Instant, mut look: impl FnMut() -> Result<()>) -> Result<()> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false)?;
                let left = deadline.saturating_duration_since(Instant::now());
                stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
                let mut greeting = [0; GREETING_MAX];
                let length = stream.read(&mut greeting).context("reading the agent's greeting")?;
                ensure!(
                    greeting[..length].starts_with(GREETING.as_bytes()),
                    "that was no greeting of the agent"
                );
                return Ok(());
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                ensure!(Instant::now() < deadline, "the bare machine does not come up in time");
                look()?;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("waiting for the agent"),
        }
    }
}

/// A process that is killed when dropped.
struct Ended(Child);

impl Ended {
    fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_owned();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("running {}", name.display()))?))
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn is_of_a_bare_machine(option: &str, value: &str) -> bool {
    let of_the_pod = ["chardev=qmp", "chardev=shared", "virtio-net-pci", "vhost-vsock-pci"];
    match option {
        "-add-fd" | "-chardev" | "-netdev" => false,
        _ => !of_the_pod.iter().any(|part| value.contains(part)),
    }
}

/// Replaces the names of descriptors of the other process by names of files.
fn with_files(value: &str, qemu: Pid, folder: &Path) -> Result<String> {
    let mut result = value.to_owned();
    // Of a set's descriptor QEMU has made a copy under another number: the disk is told by its name.
    if let Some((range, _)) = numbered(&result, "/dev/fdset/") {
        let file = match () {
            () if value.contains(r#""node-name":"root""#) => artifacts::guests()?.join("reference/root.erofs"),
            () if value.contains(r#""node-name":"agent""#) => artifacts::agent_disk()?,
            () => bail!("a disk that is not known: {value}"),
        };
        result.replace_range(range, &file.display().to_string());
    }
    while let Some((range, number)) = numbered(&result, "/proc/self/fd/") {
        let descriptor = format!("/proc/{qemu}/fd/{number}");
        let file = match fs::canonicalize(&descriptor) {
            Ok(file) if file.is_file() => file,
            // Without a name: a file in memory.
            _ => {
                let copy = folder.join(format!("descriptor-{number}"));
                let content = fs::read(&descriptor).with_context(|| format!("reading {descriptor}"))?;
                fs::write(&copy, content)?;
                copy
            }
        };
        result.replace_range(range, &file.display().to_string());
    }
    Ok(result)
}

/// Where `prefix` and the number behind it stand, and the number.
fn numbered(text: &str, prefix: &str) -> Option<(Range<usize>, String)> {
    let start = text.find(prefix)?;
    let digits: String = text[start + prefix.len()..]
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    Some((start..start + prefix.len() + digits.len(), digits))
}
