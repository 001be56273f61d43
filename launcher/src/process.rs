//! A process of a machine, QEMU or a helper: started with nothing but what it needs, behind a wall, watched to its end.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::{
    sys::signal::Signal,
    unistd::{ForkResult, Pid},
};
use tokio::{
    io::{AsyncReadExt, Interest, unix::AsyncFd},
    process::{Child, Command},
    sync::watch,
};

use crate::{console::Tail, state::ProcessId};

/// Bytes of a process's own messages that are kept for an error message.
const MESSAGES: usize = 4096;

/// Held while a process is being started: one by fork(2) until it is there, others until they are another program.
static STARTING: Mutex<()> = Mutex::new(());

/// As long as its answer is held, no process is being started here: none gets what is mapped meanwhile, and not yet kept from it by
/// madvise(2), MADV_DONTFORK.
pub(crate) fn no_process_starts() -> MutexGuard<'static, ()> {
    // It guards no data that could be left half written.
    STARTING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{} cannot be started", path.display())]
    Start {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} ended as soon as it was started", path.display())]
    Gone { path: PathBuf },
}

/// The wall around a process.
#[derive(Debug, Default)]
pub struct Confinement {
    /// Network namespace that it enters.
    pub netns: Option<File>,
    /// `cgroup.procs` files, open for writing, of the cgroups that it enters.
    pub cgroups: Vec<File>,
    /// uid, and gid of the same number; None leaves it this process's.
    pub uid: Option<u32>,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Confinement {
    /// The same wall for another process.
    ///
    /// # Errors
    /// When a descriptor cannot be duplicated.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            netns: self.netns.as_ref().map(File::try_clone).transpose()?,
            cgroups: self.cgroups.iter().map(File::try_clone).collect::<io::Result<_>>()?,
            uid: self.uid,
            groups: self.groups.clone(),
        })
    }
}

/// A running process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    exit: watch::Receiver<Option<ExitStatus>>,
    messages: Tail,
}

impl Process {
    /// Starts `program` with `arguments` and an empty environment, holding exactly the descriptors `inherited` (which the
    /// arguments name by number) beside the standard ones. Has to be called from the thread that lives as long as the
    /// machine: the process dies with that thread, prctl(2), PR_SET_PDEATHSIG.
    ///
    /// # Errors
    /// When it cannot be started, or cannot be confined as asked.
    pub fn start(
        program: &Path,
        arguments: &[OsString],
        inherited: Vec<OwnedFd>,
        confinement: Confinement,
    ) -> Result<Self, ProcessError> {
        let start = |source| ProcessError::Start {
            path: program.to_owned(),
            source,
        };
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let numbers: Vec<RawFd> = inherited.iter().map(AsRawFd::as_raw_fd).collect();
        let parent = nix::unistd::getpid();
        // SAFETY: between fork and exec only system calls are made, on memory that was allocated before; see `confine`.
        unsafe { command.pre_exec(move || confine(&confinement, &numbers, parent)) };
        let spawned = {
            let _alone = no_process_starts();
            command.spawn()
        };
        let mut child = spawned.map_err(start)?;
        drop(inherited);

        let messages = Tail::new(MESSAGES);
        if let Some(stderr) = child.stderr.take() {
            tokio::spawn(collect(stderr, messages.clone()));
        }
        let id = child.id().and_then(ProcessId::of).ok_or_else(|| ProcessError::Gone {
            path: program.to_owned(),
        })?;
        let (ended, exit) = watch::channel(None);
        tokio::spawn(reap(child, ended));
        Ok(Self { id, exit, messages })
    }

    /// Starts a process that does `work` and ends: with 0, or with the error number of its failure. `work` runs where only system
    /// calls are allowed, on memory that was allocated before: it allocates nothing and takes no lock. The process dies with the
    /// calling thread, as those of [`Process::start`].
    ///
    /// # Errors
    /// When it cannot be started. That it cannot be confined as asked is a failure of its work.
    pub(crate) fn fork(
        mut work: impl FnMut() -> io::Result<()>,
        confinement: &Confinement,
    ) -> Result<Self, ProcessError> {
        let start = |source| ProcessError::Start {
            path: "a process of the launcher's own".into(),
            source,
        };
        let parent = nix::unistd::getpid();
        let alone = no_process_starts();
        // SAFETY: the child makes system calls on memory that was allocated before, see above, and ends.
        let child = match unsafe { nix::unistd::fork() }.map_err(|error| start(error.into()))? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                let failure = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
                let done = confine(confinement, &[], parent).and_then(|()| work());
                // SAFETY: ends the process without running what the parent has registered for its own end.
                unsafe { libc::_exit(done.map_or_else(failure, |()| 0)) }
            }
        };
        drop(alone);
        let watched = watched(child).map_err(|error| {
            let _ = nix::sys::signal::kill(child, Signal::SIGKILL);
            start(error)
        });
        let (id, pidfd) = watched?;
        let (ended, exit) = watch::channel(None);
        tokio::spawn(async move {
            // Readable when it has ended: pidfd_open(2).
            let _ = pidfd.readable().await;
            let mut status = 0;
            // SAFETY: waitpid(2) writes to a number of this function's. The process has ended, so that this does not wait.
            let status = match unsafe { libc::waitpid(child.as_raw(), &raw mut status, 0) } {
                -1 => Signal::SIGKILL as i32,
                _ => status,
            };
            ended.send_replace(Some(ExitStatus::from_raw(status)));
        });
        Ok(Self {
            id,
            exit,
            messages: Tail::new(MESSAGES),
        })
    }

    /// Which process it is.
    pub fn id(&self) -> ProcessId {
        self.id
    }

    /// Waits for its end; any number of callers may, at any time.
    pub async fn exited(&self) -> ExitStatus {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(status) => status.unwrap_or_default(),
            // The reaper says its word before it ends, unless the runtime is being torn down.
            Err(_) => ExitStatus::from_raw(Signal::SIGKILL as i32),
        }
    }

    /// Kills it and waits until it is gone.
    pub async fn kill(&self) {
        self.send_kill();
        self.exited().await;
    }

    /// The last of what it said on stderr.
    pub fn messages(&self, count: usize) -> Vec<String> {
        self.messages.last_lines(count)
    }

    fn send_kill(&self) {
        if let Err(error) = self.id.signal(Signal::SIGKILL) {
            tracing::warn!(%error, pid = self.id.pid, "a process cannot be killed");
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit.borrow().is_none() {
            self.send_kill();
        }
    }
}

/// A child, to be waited for.
fn watched(child: Pid) -> io::Result<(ProcessId, AsyncFd<OwnedFd>)> {
    let pid = rustix::process::Pid::from_raw(child.as_raw()).ok_or(io::ErrorKind::NotFound)?;
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK)?;
    let id = ProcessId::of(child.as_raw().unsigned_abs()).ok_or(io::ErrorKind::NotFound)?;
    // SAFETY: the descriptor is the result's alone, and open as long as it is.
    Ok((id, unsafe {
        AsyncFd::register_with_interest(pidfd, Interest::READABLE)
    }?))
}

/// The one who waits for the process.
async fn reap(mut child: Child, ended: watch::Sender<Option<ExitStatus>>) {
    let status = child.wait().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "a process's end cannot be waited for");
        ExitStatus::from_raw(Signal::SIGKILL as i32)
    });
    ended.send_replace(Some(status));
}

/// Reads until the process has closed its stderr, which it does at its end.
async fn collect(mut stderr: tokio::process::ChildStderr, messages: Tail) {
    let mut buffer = [0; 1024];
    while let Ok(count @ 1..) = stderr.read(&mut buffer).await {
        messages.push(&buffer[..count]);
        for line in crate::console::harmless(&String::from_utf8_lossy(&buffer[..count])).lines() {
            tracing::debug!(line, "a process says");
        }
    }
}

/// Runs in the child between fork and exec: only system calls, no allocation, no locks.
fn confine(confinement: &Confinement, inherited: &[RawFd], parent: Pid) -> io::Result<()> {
    let check = |result: libc::c_long| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };

    // Whatever else is open in this process, whoever opened it, ends at exec.
    // SAFETY: close_range(2) with a flag that closes nothing yet.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    for descriptor in inherited {
        // SAFETY: fcntl(2) on a number; the parent holds the descriptor open while it spawns.
        check(unsafe { libc::fcntl(*descriptor, libc::F_SETFD, 0) }.into())?;
    }
    // Out of the parent's terminal and process group: an interrupt at the keyboard is for the parent alone.
    // SAFETY: setsid(2) takes nothing; a new child is no leader of a group.
    check(unsafe { libc::setsid() }.into())?;
    for mut procs in &confinement.cgroups {
        io::Write::write_all(&mut procs, b"0")?;
    }
    if let Some(netns) = &confinement.netns {
        // SAFETY: setns(2) moves this single-threaded process.
        check(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) }.into())?;
    }
    // A core would hold the guest's memory.
    let no_core = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: setrlimit(2) reads the structure, which lives longer than the call.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &no_core) }.into())?;
    if let Some(uid) = confinement.uid {
        // System calls, for the C library's functions of these names would look for other threads to change as well.
        // SAFETY: setgroups(2) reads so many numbers, which live longer than the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_setgroups,
                confinement.groups.len(),
                confinement.groups.as_ptr(),
            )
        })?;
        // SAFETY: setresgid(2) and setresuid(2) take numbers.
        check(unsafe { libc::syscall(libc::SYS_setresgid, uid, uid, uid) })?;
        // SAFETY: as above.
        check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    }
    // SAFETY: prctl(2) with numbers alone.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into())?;
    // After the change of uid, which clears it.
    // SAFETY: as above.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }.into())?;
    // A parent that died before that line will send no signal.
    if nix::unistd::getppid() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn shell(text: &str, inherited: Vec<OwnedFd>, confinement: Confinement) -> Process {
        let arguments = ["-c".into(), text.into()];
        Process::start(Path::new("/bin/sh"), &arguments, inherited, confinement).unwrap()
    }

    #[tokio::test]
    async fn what_it_said_last_is_at_hand_after_its_end() {
        let process = shell("echo the disk is gone >&2; exit 3", Vec::new(), Confinement::default());
        assert_eq!(process.exited().await.code(), Some(3));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while process.messages(1).is_empty() && tokio::time::Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        assert_eq!(process.messages(1), ["the disk is gone"]);
    }

    #[tokio::test]
    async fn it_holds_the_descriptors_it_is_given_and_no_others() {
        let given: OwnedFd = File::open("/dev/null").unwrap().into();
        let number = given.as_raw_fd();
        // One that a careless library left open for children.
        let stray: OwnedFd = File::open("/dev/zero").unwrap().into();
        // SAFETY: fcntl(2) on an open descriptor.
        assert_eq!(unsafe { libc::fcntl(stray.as_raw_fd(), libc::F_SETFD, 0) }, 0);
        let text = format!(
            "[ -e /proc/self/fd/{number} ] || exit 1; [ ! -e /proc/self/fd/{} ]",
            stray.as_raw_fd()
        );
        let process = shell(&text, vec![given], Confinement::default());
        assert_eq!(process.exited().await.code(), Some(0));
    }

    #[tokio::test]
    async fn it_has_the_rights_of_its_own_user_and_can_gain_none() {
        let confinement = Confinement {
            uid: Some(2_000_123),
            groups: vec![2_000_124],
            ..Default::default()
        };
        let text = "[ $(id -u) = 2000123 ] && [ $(id -g) = 2000123 ] && [ \"$(id -G)\" = '2000123 2000124' ] && \
                    grep -q '^NoNewPrivs:.1' /proc/self/status && grep -q '^CapEff:.0000000000000000' /proc/self/status";
        let process = shell(text, Vec::new(), confinement);
        assert_eq!(process.exited().await.code(), Some(0));
    }

    #[tokio::test]
    async fn work_is_done_behind_the_wall_and_its_failure_is_a_number() {
        let confinement = Confinement {
            uid: Some(2_000_123),
            ..Default::default()
        };
        let uid = || {
            // SAFETY: takes nothing.
            let uid = unsafe { libc::getuid() };
            if uid == 2_000_123 {
                Ok(())
            } else {
                Err(io::Error::from_raw_os_error(libc::EPERM))
            }
        };
        let done = Process::fork(uid, &confinement).unwrap().exited().await;
        assert_eq!(done.code(), Some(0));
        let failed = Process::fork(|| Err(io::Error::from_raw_os_error(libc::EBADMSG)), &confinement).unwrap();
        assert_eq!(failed.exited().await.code(), Some(libc::EBADMSG));
    }

    #[tokio::test]
    async fn dropping_it_kills_it() {
        let process = shell("exec sleep 60", Vec::new(), Confinement::default());
        let id = process.id();
        drop(process);
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        while id.is_alive() && tokio::time::Instant::now() < deadline {
            tokio::task::yield_now().await;
        }
        assert!(!id.is_alive());
    }
}
