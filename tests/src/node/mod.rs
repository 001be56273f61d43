//! A node: one containerd of a chosen version, with network, mounts and processes of its own.
//!
//! The node's processes see a private /run, so containerd, the shims and this runtime use the places they use anywhere.
//! From outside the same files are below [`Place::run`].

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::artifacts::{self, Containerd};
use crate::image;

mod config;
pub mod init;
mod place;

pub use config::{Handler, Sandboxer};
pub use place::Place;

/// The CRI's endpoint inside a node, as crictl and critest take it.
pub const ENDPOINT: &str = "unix:///run/containerd/containerd.sock";

/// How long the init of a node may take to get ready or to remove everything.
const INIT_BOUND: Duration = Duration::from_secs(40);
/// How long a containerd may take to answer, or to end.
const CONTAINERD_BOUND: Duration = Duration::from_secs(30);

/// Removed when dropped.
#[derive(Debug)]
pub struct Node {
    place: Place,
    version: Containerd,
    /// `unshare`, which ends with the init.
    unshare: Child,
    init: Pid,
    containerd: Option<Child>,
}

impl Node {
    /// Starts a node, imports the images, and waits until containerd answers. Without handlers it has runc alone.
    pub fn start(name: &str, version: Containerd, handlers: &[Handler]) -> Result<Self> {
        let place = Place::new(name);
        let (unshare, init) = start_init(&place)?;
        let mut node = Self {
            place,
            version,
            unshare,
            init,
            containerd: None,
        };
        config::write(&node.place, version, handlers)?;
        node.start_containerd()?;
        node.import_images()?;
        Ok(node)
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    pub fn version(&self) -> Containerd {
        self.version
    }

    /// Process id of the node's init, outside of the node.
    pub fn init(&self) -> Pid {
        self.init
    }

    /// Process id of containerd, outside of the node.
    pub fn containerd(&self) -> Result<Option<Pid>> {
        let Some(nsenter) = &self.containerd else {
            return Ok(None);
        };
        // nsenter waits for containerd, its only child.
        let children = children_of(Pid::from_raw(i32::try_from(nsenter.id())?))?;
        Ok(children.first().copied())
    }

    /// containerd's log; it stays when the node is gone.
    pub fn log(&self) -> PathBuf {
        artifacts::logs().join(format!("containerd-{}.log", self.place.name()))
    }

    /// A command that runs inside the node, with the node's containerd programs first in its PATH.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        enter(&self.place, self.init, program.as_ref())
    }

    /// Runs `ctr` and answers its output; an exit other than 0 is an error with what it said.
    pub fn ctr<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
        let output = self.command("ctr").args(arguments).output().context("running ctr")?;
        ensure!(
            output.status.success(),
            "ctr: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(output)
    }

    /// Runs a closure in the node's network, on a thread of its own.
    pub fn in_network<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.init)).context("opening the node's network")?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || -> Result<T> {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).context("entering the node's network")?;
                Ok(run())
            });
            match thread.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Ends containerd as a package update does, and starts it again. Pods are expected to go on.
    pub fn restart_containerd(&mut self) -> Result<()> {
        self.end_containerd(Signal::SIGTERM)?;
        self.start_containerd()
    }

    /// Kills containerd, which then has no time for anything, and starts it again. Pods are expected to go on.
    pub fn crash_containerd(&mut self) -> Result<()> {
        self.end_containerd(Signal::SIGKILL)?;
        self.start_containerd()
    }

    /// Lets the node outlive this process; [`Node::end`] ends it.
    pub fn keep(mut self) -> Result<()> {
        let mut stdin = self
            .unshare
            .stdin
            .take()
            .context("the node's init has lost its stdin")?;
        stdin
            .write_all(&[init::KEEP])
            .context("telling the node's init to stay")?;
        // Its Drop would end the node.
        std::mem::forget(self);
        Ok(())
    }

    /// Ends a node of another process, and removes what a killed one left. Answers whether there was one.
    pub fn end(name: &str) -> Result<bool> {
        let place = Place::new(name);
        let there = place.lock().exists();
        if there {
            end(&place).with_context(|| format!("ending node {name}"))?;
        }
        Ok(there)
    }

    /// Becomes a shell on a running node.
    pub fn shell(name: &str) -> Result<std::convert::Infallible> {
        let place = Place::new(name);
        let init = running_init(&place).with_context(|| format!("there is no node {name}"))?;
        let error = enter(&place, init, "bash")
            .env("CONTAINER_RUNTIME_ENDPOINT", ENDPOINT)
            .stdin(Stdio::inherit())
            .exec();
        Err(error).context("running nsenter")
    }

    /// Ends every node on this machine, whoever made it, and removes what killed ones left.
    pub fn end_all() -> Result<Vec<String>> {
        let mut ended = Vec::new();
        for place in Place::all() {
            end(&place).with_context(|| format!("ending node {}", place.name()))?;
            ended.push(place.name().to_owned());
        }
        Ok(ended)
    }

    fn start_containerd(&mut self) -> Result<()> {
        let log_path = self.log();
        fs::create_dir_all(artifacts::logs()).context("making the folder of logs")?;
        let log = File::options().create(true).append(true).open(&log_path);
        let log = log.with_context(|| format!("opening {}", log_path.display()))?;
        let mut command = self.command("containerd");
        command
            .arg("--config")
            .arg(self.place.containerd_config())
            .stdout(log.try_clone()?)
            .stderr(log);
        // A terminal's interrupt is for whoever made the node, who then ends it in good order.
        command.process_group(0);
        let mut child = command.spawn().context("starting containerd")?;

        let deadline = Instant::now() + CONTAINERD_BOUND;
        while !self.answers() {
            if let Some(status) = child.try_wait().context("waiting for containerd")? {
                bail!("containerd ended at once ({status}); see {}", log_path.display());
            }
            ensure!(
                Instant::now() < deadline,
                "containerd does not answer; see {}",
                log_path.display()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        self.containerd = Some(child);
        Ok(())
    }

    fn answers(&self) -> bool {
        UnixStream::connect(self.place.socket()).is_ok() && self.ctr(["version"]).is_ok()
    }

    fn end_containerd(&mut self, by: Signal) -> Result<()> {
        if let Some(containerd) = self.containerd()? {
            kill(containerd, by).context("ending containerd")?;
        }
        let Some(mut nsenter) = self.containerd.take() else {
            return Ok(());
        };
        wait_bounded(&mut nsenter, CONTAINERD_BOUND).context("waiting for containerd's end")
    }

    fn import_images(&self) -> Result<()> {
        let archive = self.place.base().join("images.tar");
        image::write_archive(&archive)?;
        self.ctr([
            OsStr::new("--namespace=k8s.io"),
            "images".as_ref(),
            "import".as_ref(),
            archive.as_os_str(),
        ])
        .context("importing the test images")?;
        fs::remove_file(&archive)?;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        drop(self.unshare.stdin.take());
        if let Some(mut nsenter) = self.containerd.take() {
            // It ends with the process it waits for, which the init kills.
            if let Err(error) = wait_bounded(&mut nsenter, INIT_BOUND) {
                eprintln!("node {}: containerd: {error:#}", self.place.name());
            }
        }
        if let Err(error) = wait_bounded(&mut self.unshare, INIT_BOUND) {
            eprintln!("node {}: {error:#}", self.place.name());
        }
    }
}

/// A command in the namespaces of a node's init.
fn enter(place: &Place, init: Pid, program: impl AsRef<OsStr>) -> Command {
    let path = format!(
        "{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        place.programs().display()
    );
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--target={init}"))
        .args(["--pid", "--mount", "--net", "--ipc", "--"])
        .arg(program)
        .env("PATH", path)
        .env("CONTAINERD_ADDRESS", "/run/containerd/containerd.sock")
        .env("CONTAINERD_NAMESPACE", "k8s.io")
        .stdin(Stdio::null());
    command
}

fn start_init(place: &Place) -> Result<(Child, Pid)> {
    let program = std::env::current_exe().context("looking up this program")?;
    // A file, for a node that is kept must not hold the stderr of whoever started it.
    let log = artifacts::logs().join(format!("node-{}.log", place.name()));
    fs::create_dir_all(artifacts::logs()).context("making the folder of the logs")?;
    let stderr = File::create(&log).with_context(|| format!("making {}", log.display()))?;
    let mut unshare = Command::new("unshare")
        .args(["--pid", "--mount", "--net", "--ipc", "--fork", "--kill-child", "--"])
        .arg(program)
        .args([init::ARGUMENT, place.name()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(stderr)
        .process_group(0)
        .spawn()
        .context("starting unshare")?;
    let ready = read_ready(&mut unshare);
    let init = children_of(Pid::from_raw(i32::try_from(unshare.id())?))?
        .first()
        .copied();
    match (ready, init) {
        (Ok(()), Some(init)) => {
            fs::write(place.lock(), init.to_string()).context("noting the node's init")?;
            Ok((unshare, init))
        }
        (ready, _) => {
            drop(unshare.stdin.take());
            let ended = wait_bounded(&mut unshare, INIT_BOUND);
            let said = fs::read_to_string(&log).unwrap_or_default();
            ready
                .and(ended)
                .and_then(|()| bail!("the init of node {} ended at once", place.name()))
                .with_context(|| said.trim().to_owned())
        }
    }
}

fn read_ready(unshare: &mut Child) -> Result<()> {
    let stdout = unshare.stdout.take().context("unshare has no stdout")?;
    let mut line = String::new();
    // Bounded: the init either gets ready or ends, its own waits have bounds.
    BufReader::new(stdout)
        .read_line(&mut line)
        .context("waiting for the node's init")?;
    ensure!(line.trim() == init::READY, "the node's namespaces could not be made");
    Ok(())
}

/// Children of a process that has one thread.
fn children_of(pid: Pid) -> Result<Vec<Pid>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(children
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .map(Pid::from_raw)
        .collect())
}

fn wait_bounded(child: &mut Child, bound: Duration) -> Result<()> {
    let deadline = Instant::now() + bound;
    loop {
        if child.try_wait().context("waiting for a process")?.is_some() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            child.kill().context("killing a process")?;
            child.wait().context("waiting for a killed process")?;
            bail!(
                "a process had to be killed, it was still there after {} s",
                bound.as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Ends one node by its lock file: asks the init that it names, then starts a new one over what is left and ends that in
/// good order.
fn end(place: &Place) -> Result<()> {
    if let Some(init) = running_init(place) {
        kill(init, Signal::SIGTERM).context("ending the node's init")?;
        let deadline = Instant::now() + INIT_BOUND;
        while running_init(place) == Some(init) {
            ensure!(
                Instant::now() < deadline,
                "the node's init (process {init}) does not end"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    } else {
        let (mut unshare, _) = start_init(place)?;
        drop(unshare.stdin.take());
        wait_bounded(&mut unshare, INIT_BOUND)?;
    }
    Ok(())
}

fn running_init(place: &Place) -> Option<Pid> {
    let pid: i32 = fs::read_to_string(place.lock()).ok()?.trim().parse().ok()?;
    let command = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).ok()?;
    let expected = format!("\0{}\0{}\0", init::ARGUMENT, place.name());
    command.ends_with(expected.as_bytes()).then(|| Pid::from_raw(pid))
}
