//! The first process of a node: everything the node consists of lives in its PID, mount, network and IPC namespaces, so that the
//! end of this process is the end of all of it.
//!
//! It is started as `unshare --pid --mount --net --ipc --fork … EXE node-init NAME`, prepares the namespaces, answers one line on
//! stdout, and from then on reaps orphans until its stdin ends (whoever made the node has gone) or it gets SIGTERM. Then it
//! kills every other process, unmounts, and removes the node's files and cgroups.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getpid, read};

use super::place::Place;

/// First argument that makes a program of this crate the init of a node.
pub const ARGUMENT: &str = "node-init";
/// What stands on stdout when the namespaces are ready.
pub const READY: &str = "ready";
/// A byte on stdin that makes the node outlive whoever made it.
pub const KEEP: u8 = b'k';

/// Becomes the init of a node if the program was started as one, and then never returns.
///
/// To be called first in `main`, before any thread is started.
pub fn become_init_if_asked() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() != Some(ARGUMENT) {
        return;
    }
    let name = arguments.next().unwrap_or_default();
    match run(&Place::new(&name)) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("node {name}: {error:#}");
            std::process::exit(1);
        }
    }
}

fn run(place: &Place) -> Result<()> {
    ensure!(
        getpid() == Pid::from_raw(1),
        "'{ARGUMENT}' is for a PID namespace of its own"
    );
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGCHLD);
    signals.thread_block().context("blocking signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;

    let _lock = lock(place)?;
    // What a killed predecessor left; its processes and mounts went with its namespaces.
    remove_files(place)?;
    remove_cgroups(place, Duration::from_secs(5))?;
    set_up(place).with_context(|| format!("preparing {}", place.base().display()))?;
    writeln!(io::stdout(), "{READY}").context("answering that the node is ready")?;

    wait_for_the_end(&signals)?;

    // Everything is tried, then the first error is told.
    let outcomes = [
        kill_all(),
        unmount_all(place),
        remove_files(place),
        remove_cgroups(place, Duration::from_secs(10)),
        remove_lock(place),
    ];
    outcomes.into_iter().collect()
}

fn lock(place: &Place) -> Result<Flock<fs::File>> {
    let path = place.lock();
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    loop {
        // What it has, a running node's process id, stays.
        let file = fs::File::options().create(true).append(true).open(&path);
        let file = file.with_context(|| format!("opening {}", path.display()))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "a node {} is there already; 'sudo ./devtool demo --end' ends one that was kept",
                place.name()
            ),
            Err((_, errno)) => return Err(errno).with_context(|| format!("locking {}", path.display())),
        };
        // A predecessor that ended meanwhile has removed the file: what is locked then is no longer what others see.
        if fs::metadata(&path).is_ok_and(|there| lock.metadata().is_ok_and(|locked| locked.ino() == there.ino())) {
            return Ok(lock);
        }
    }
}

fn remove_lock(place: &Place) -> Result<()> {
    fs::remove_file(place.lock()).context("removing the lock file")?;
    if let Some(parent) = place.lock().parent() {
        // As long as there are other nodes it stays.
        let _ = fs::remove_dir(parent);
    }
    Ok(())
}

/// Mounts of its own, shared among those of the node as systemd has them: /proc of the new PID namespace, and a private /run, where containerd and shims have fixed places.
fn set_up(place: &Place) -> Result<()> {
    let none = None::<&str>;
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, "/", none, MsFlags::MS_REC | propagation, none).context("setting the mounts' propagation")?;
    }
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none).context("mounting /proc")?;
    for folder in place.folders() {
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    }
    mount(Some(&place.run()), "/run", none, MsFlags::MS_BIND, none).context("mounting /run")?;
    let status = std::process::Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status()
        .context("running ip")?;
    ensure!(status.success(), "'ip link set lo up' failed: {status}");
    Ok(())
}

fn wait_for_the_end(signals: &SignalFd) -> Result<()> {
    let stdin = io::stdin();
    let mut kept = false;
    loop {
        let mut waited = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if !kept {
            waited.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut waited, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("waiting"),
        }
        if !kept && waited.get(1).is_some_and(|fd| fd.any() == Some(true)) {
            match read_byte(stdin.as_fd())? {
                Some(KEEP) => kept = true,
                Some(_) => {}
                None => return Ok(()),
            }
        }
        while let Some(signal) = signals.read_signal().context("reading signals")? {
            if signal.ssi_signo == Signal::SIGTERM as u32 {
                return Ok(());
            }
        }
        reap();
    }
}

fn read_byte(fd: BorrowedFd<'_>) -> Result<Option<u8>> {
    let mut byte = [0];
    match read(fd, &mut byte).context("reading stdin")? {
        0 => Ok(None),
        _ => Ok(Some(byte[0])),
    }
}

/// Takes the exits of all children that ended.
fn reap() -> bool {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
}

fn kill_all() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        // As the init of a PID namespace, -1 reaches every other process in it and none outside.
        let killed = kill(Pid::from_raw(-1), Signal::SIGKILL);
        let children = reap();
        match killed {
            Ok(()) => {}
            Err(Errno::ESRCH) if !children => return Ok(()),
            Err(Errno::ESRCH) => {}
            Err(errno) => return Err(errno).context("killing the node's processes"),
        }
        ensure!(
            Instant::now() < deadline,
            "processes of the node outlived SIGKILL for 10 s"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn unmount_all(place: &Place) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading the mounts")?;
    let below = |path: &str| path == "/run" || path.starts_with("/run/") || Path::new(path).starts_with(place.base());
    // The last mounted goes first.
    for path in mounts
        .lines()
        .rev()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|path| below(path))
    {
        // A path with spaces is escaped here; nothing of a node has one.
        match umount2(path, MntFlags::MNT_DETACH) {
            // Gone with the mount it was on.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(errno) => return Err(errno).with_context(|| format!("unmounting {path}")),
        }
    }
    Ok(())
}

fn remove_files(place: &Place) -> Result<()> {
    match fs::remove_dir_all(place.base()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", place.base().display()))
        }
        _ => Ok(()),
    }
}

/// Removes the node's cgroups, with what still runs in them ended before, in every hierarchy.
fn remove_cgroups(place: &Place, bound: Duration) -> Result<()> {
    let deadline = Instant::now() + bound;
    for cgroup in place.cgroups() {
        while let Err(error) = remove_cgroup(&cgroup) {
            if Instant::now() >= deadline {
                return Err(error).with_context(|| format!("removing {}", cgroup.display()));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    Ok(())
}

fn remove_cgroup(cgroup: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(cgroup) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}
