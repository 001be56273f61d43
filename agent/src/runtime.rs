//! How processes come to be in containers.
//!
//! libcontainer makes containers by clone(2) without exec(2) and goes on in the child with ordinary code, which only a process of one
//! thread may do; and it blocks. So the agent has a [`zygote`], forked before there is any thread, which forks once more for every
//! order: the new process has the container's streams as its own, makes the container ([`create`]) or becomes a further process
//! of it ([`join`]), and says through a pipe how that went. A fork of a small process costs a fraction of starting the agent's
//! program anew.

mod adapt;
mod create;
mod hold;
mod join;
mod seccomp;
pub(crate) mod users;
pub(crate) mod zygote;

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

use crate::error::AgentError;
use users::IdMappings;

/// Where containers' bundles and libcontainer's own records are.
pub(crate) const ROOT: &str = "/run/coreos-kvm/containers";

/// File of a bundle with the specification as the host has it.
pub(crate) const SPEC: &str = "spec.json";

/// Longest report, in bytes: what write(2) puts into a pipe in one piece.
const REPORT_MAX: usize = libc::PIPE_BUF;
/// A container's root may have to be read over virtiofs first.
const BOUND: Duration = Duration::from_secs(50);

/// What the zygote is to make.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Order {
    /// The user namespace of the pod's containers: a process in it, which ends with the descriptor that is its own.
    Users(IdMappings),
    /// The first process of a process namespace that containers share; in the user namespace that is a descriptor, if there is one.
    Hold { users: Option<IdMappings> },
    /// The container whose bundle is at `bundle`; in the namespaces that are further descriptors.
    Create {
        id: String,
        bundle: PathBuf,
        /// Relative to the hierarchy's root.
        cgroup: PathBuf,
        console: Option<PathBuf>,
        /// There is a process namespace.
        processes: bool,
        /// After it there is a user namespace.
        users: Option<IdMappings>,
    },
    /// The program of the container's init.
    Start { id: String },
    /// The end of a container, once its init has ended: of its last processes, too.
    Delete { id: String },
    /// A further process of the container whose bundle is at `bundle`, described by the file `process`.
    Join {
        bundle: PathBuf,
        process: PathBuf,
        console: Option<PathBuf>,
        /// Those of the container's user namespace.
        users: Option<IdMappings>,
    },
}

/// What a process joins: held open, so that it is the same thing whatever happens meanwhile.
#[derive(Debug)]
pub(crate) enum Target {
    /// Of an [`Order::Join`].
    Container {
        /// The container's init (pidfd_open(2)).
        init: OwnedFd,
        /// The directory of its cgroup.
        cgroup: OwnedFd,
    },
    /// Of an [`Order::Create`] or [`Order::Hold`].
    Namespaces {
        processes: Option<OwnedFd>,
        users: Option<OwnedFd>,
    },
    /// Of an [`Order::Users`]: an end of a pipe.
    Until(OwnedFd),
}

/// The streams of the process that is made.
#[derive(Debug)]
pub(crate) struct Stdio {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

impl Stdio {
    /// Nothing to read, and nobody to write to.
    pub(crate) fn null() -> io::Result<Self> {
        let null = OwnedFd::from(std::fs::File::options().read(true).write(true).open("/dev/null")?);
        Ok(Self {
            stdin: null.try_clone()?,
            stdout: null.try_clone()?,
            stderr: null,
        })
    }
}

/// Has the order carried out. Answers the pid of the process that it is about.
pub(crate) async fn run(
    zygote: &zygote::Zygote,
    order: &Order,
    stdio: Option<Stdio>,
    target: Option<Target>,
) -> Result<Pid, AgentError> {
    let (report, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(AgentError::failed("making a pipe for the runtime failed"))?;
    let executes = matches!(order, Order::Hold { .. } | Order::Join { .. });
    let mut descriptors = vec![theirs];
    descriptors.extend(
        stdio
            .into_iter()
            .flat_map(|stdio| [stdio.stdin, stdio.stdout, stdio.stderr]),
    );
    match target {
        Some(Target::Container { init, cgroup }) => descriptors.extend([init, cgroup]),
        Some(Target::Namespaces { processes, users }) => descriptors.extend(processes.into_iter().chain(users)),
        Some(Target::Until(end)) => descriptors.push(end),
        None => {}
    }
    zygote
        .send(order, &descriptors)
        .map_err(AgentError::failed("the zygote takes no order"))?;
    drop(descriptors);

    let mut report =
        super::process::receiver(report).map_err(AgentError::failed("reading the runtime's report failed"))?;
    let mut text = Vec::new();
    let read = async {
        // A further process holds the pipe until it executes its program, and a namespace's first until it is what it is to be. A
        // container's init holds it as well, and waits.
        while executes || !is_complete(&text) {
            if text.len() > 4 * REPORT_MAX || report.read_buf(&mut text).await? == 0 {
                break;
            }
        }
        io::Result::Ok(())
    };
    tokio::time::timeout(BOUND, read)
        .await
        .map_err(|_| AgentError::Failed {
            what: "the runtime does not come to an end".to_owned(),
            cause: format!("{} s have passed", BOUND.as_secs()),
        })?
        .map_err(AgentError::failed("reading the runtime's report failed"))?;
    judge(&String::from_utf8_lossy(&text))
}

/// Whether the line that matters is there.
fn is_complete(report: &[u8]) -> bool {
    let mut lines = report.split_inclusive(|byte| *byte == b'\n');
    lines.any(|line| (line.starts_with(b"pid ") || line.starts_with(b"error ")) && line.ends_with(b"\n"))
}

/// A report: a line with the pid, as soon as there is one, and a line with the error, if there is one, in any order; lines of
/// a log with them.
fn judge(report: &str) -> Result<Pid, AgentError> {
    let line = |kind| report.lines().find_map(|line| line.strip_prefix(kind));
    if let Some(error) = line("error ") {
        // libcontainer's errors lose their causes on the way between its processes, but the first one was logged.
        return Err(AgentError::Runtime(match line("log ") {
            Some(cause) => format!("{error} ({cause})"),
            None => error.to_owned(),
        }));
    }
    let pid = line("pid ").and_then(|pid| pid.parse().ok());
    pid.map(Pid::from_raw).ok_or_else(|| AgentError::Failed {
        what: "the runtime ended without a report".to_owned(),
        cause: format!("{report:?}"),
    })
}

/// The line that tells an error.
fn error_line(error: &str) -> String {
    let bytes = &error.as_bytes()[..error.len().min(REPORT_MAX - 16)];
    let text = String::from_utf8_lossy(bytes).replace(['\n', '\0', char::REPLACEMENT_CHARACTER], " ");
    format!("error {}\n", text.trim())
}

/// Where libcontainer keeps its records.
pub(crate) fn records() -> PathBuf {
    Path::new(ROOT).join("records")
}

/// An error with all its causes, each once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Receives the master of the terminal that the runtime sends to its console socket.
pub(crate) struct ConsoleSocket {
    listener: std::os::unix::net::UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub(crate) fn bind(path: PathBuf) -> io::Result<Self> {
        Ok(Self {
            listener: std::os::unix::net::UnixListener::bind(&path)?,
            path,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The runtime has sent it before it reported success, so this does not wait.
    pub(crate) fn receive(&self) -> io::Result<OwnedFd> {
        use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
        self.listener.set_nonblocking(true)?;
        let (stream, _) = self.listener.accept()?;
        let mut name = [0; 256];
        let mut space = nix::cmsg_space!([std::os::fd::RawFd; 1]);
        let mut parts = [io::IoSliceMut::new(&mut name)];
        let message = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(descriptors) = control
                && let Some(&descriptor) = descriptors.first()
            {
                // SAFETY: the kernel has just made it for this process.
                return Ok(unsafe { OwnedFd::from_raw_fd(descriptor) });
            }
        }
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Opens what a further process joins.
pub(crate) fn target(init: Pid, cgroup: &Path) -> Result<Target, AgentError> {
    let gone = AgentError::failed::<io::Error>("the container is gone");
    let open = || {
        let init = rustix::process::Pid::from_raw(init.as_raw()).ok_or(io::ErrorKind::NotFound)?;
        Ok(Target::Container {
            init: rustix::process::pidfd_open(init, rustix::process::PidfdFlags::empty())?,
            cgroup: std::fs::File::open(cgroup)?.into(),
        })
    };
    open().map_err(gone)
}

/// Opens the process namespace of a child of the agent.
pub(crate) fn process_namespace(pid: Pid) -> Result<OwnedFd, AgentError> {
    namespace(pid, "pid").map_err(AgentError::failed("the process namespace is gone"))
}

fn namespace(pid: Pid, name: &str) -> io::Result<OwnedFd> {
    std::fs::File::open(format!("/proc/{pid}/ns/{name}")).map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_tells_the_pid_unless_it_tells_an_error() {
        assert_eq!(judge("pid 12\n").unwrap(), Pid::from_raw(12));
        for both in ["pid 12\nerror no such\n", "error no such\npid 12\n"] {
            assert_eq!(judge(both).unwrap_err().to_string(), "no such");
        }
        let logged = "log failed to mount: EPERM\nlog and so on\nerror no rootfs\n";
        assert_eq!(
            judge(logged).unwrap_err().to_string(),
            "no rootfs (failed to mount: EPERM)"
        );
        assert!(judge("").is_err());
    }

    #[test]
    fn a_report_is_complete_when_its_line_is() {
        let complete =
            ["", "log a\n", "log a\npid 1", "log a\npid 12\n", "error no\n"].map(|text| is_complete(text.as_bytes()));
        assert_eq!(complete, [false, false, false, true, true]);
    }

    #[test]
    fn an_error_is_one_line_that_fits() {
        assert_eq!(error_line("a\nb\0"), "error a b\n");
        assert!(error_line(&"ä".repeat(REPORT_MAX)).len() <= REPORT_MAX);
    }
}
