//! libcontainer, in a short-lived process of its own.
//!
//! libcontainer makes containers by clone(2) without exec(2) and goes on in the child with ordinary code, which only a process of one
//! thread may do; and it blocks. So the agent starts itself again as a helper, which has the container's streams as its own,
//! makes the container or the further process, says on descriptor 3 how it went, and ends.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use libcontainer::{container::builder::ContainerBuilder, syscall::syscall::SyscallType};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;

use crate::error::AgentError;

/// The first argument of a helper.
pub(crate) const WORD: &str = "runtime";

/// Where containers' bundles and libcontainer's own records are.
pub(crate) const ROOT: &str = "/run/coreos-kvm/containers";

/// Descriptor of the helper on which it says how it went.
const REPORT: i32 = 3;
/// Longest report, in bytes.
const REPORT_MAX: u64 = 16 * 1024;
/// A container's root may have to be read over virtiofs first.
const BOUND: Duration = Duration::from_secs(50);

/// What a helper is to make.
pub(crate) enum Work<'a> {
    /// The container whose bundle is at `bundle`.
    Create { id: &'a str, bundle: &'a Path },
    /// A further process, described by the file `process`.
    Exec { id: &'a str, process: &'a Path },
}

/// The streams of the process that is made.
pub(crate) struct Stdio3 {
    pub stdin: Stdio,
    pub stdout: Stdio,
    pub stderr: Stdio,
}

/// Runs a helper. Answers the pid of the process that it made; `console` is the socket that takes its terminal.
pub(crate) async fn run(work: Work<'_>, stdio: Stdio3, console: Option<&Path>) -> Result<Pid, AgentError> {
    let (report, helper_report) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(AgentError::failed("making a pipe for the runtime failed"))?;
    let mut command = Command::new("/proc/self/exe");
    let (verb, id, path): (_, _, &Path) = match work {
        Work::Create { id, bundle } => ("create", id, bundle),
        Work::Exec { id, process } => ("exec", id, process),
    };
    let console = console.map_or(OsStr::new(""), Path::as_os_str);
    command.args([WORD, verb, id]).arg(path).arg(console).current_dir("/");
    command.stdin(stdio.stdin).stdout(stdio.stdout).stderr(stdio.stderr);
    let number = helper_report.as_raw_fd();
    // SAFETY: only dup2(2) or fcntl(2) on an open descriptor between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let result = if number == REPORT {
                libc::fcntl(REPORT, libc::F_SETFD, 0)
            } else {
                libc::dup2(number, REPORT)
            };
            if result < 0 {
                Err(io::Error::last_os_error())
            } else {
                Ok(())
            }
        });
    }
    // Its end is the reaper's business; its report's end is its own.
    command
        .spawn()
        .map_err(AgentError::failed("starting the runtime failed"))?;
    drop((command, helper_report));

    let report = super::process::receiver(report).map_err(AgentError::failed("reading the runtime's report failed"))?;
    let mut text = String::new();
    tokio::time::timeout(BOUND, report.take(REPORT_MAX).read_to_string(&mut text))
        .await
        .map_err(|_| AgentError::Failed {
            what: "the runtime does not come to an end".to_owned(),
            cause: format!("{} s have passed", BOUND.as_secs()),
        })?
        .map_err(AgentError::failed("reading the runtime's report failed"))?;
    match text.split_once(' ') {
        Some(("pid", pid)) => match pid.trim().parse() {
            Ok(pid) => Ok(Pid::from_raw(pid)),
            Err(_) => Err(AgentError::Failed {
                what: "the runtime's report is garbled".to_owned(),
                cause: text,
            }),
        },
        Some(("error", cause)) => Err(AgentError::Failed {
            what: format!("the runtime could not {verb}"),
            cause: cause.trim().to_owned(),
        }),
        _ => Err(AgentError::Failed {
            what: "the runtime ended without a report".to_owned(),
            cause: text,
        }),
    }
}

/// The helper's whole life. Answers its exit code.
pub(crate) fn helper() -> i32 {
    // SAFETY: the agent opened it for this process, which has not used it yet.
    let mut report = unsafe { File::from_raw_fd(REPORT) };
    // The new process must not hold it: its end is the end of the report.
    // SAFETY: fcntl(2) on a descriptor that was just taken over.
    unsafe { libc::fcntl(REPORT, libc::F_SETFD, libc::FD_CLOEXEC) };
    let arguments: Vec<String> = std::env::args().skip(2).collect();
    let (text, code) = match make(&arguments) {
        Ok(pid) => (format!("pid {pid}"), 0),
        Err(error) => (format!("error {error}"), 1),
    };
    // Nobody is left to tell if this fails: the agent then sees an end without a report.
    let _ = report.write_all(text.as_bytes());
    code
}

fn make(arguments: &[String]) -> Result<i32, String> {
    let [verb, id, path, console] = arguments else {
        return Err("the runtime takes four arguments".to_owned());
    };
    let console = (!console.is_empty()).then(|| PathBuf::from(console));
    let builder = ContainerBuilder::new(id.clone(), SyscallType::default())
        .with_root_path(records())
        .and_then(ContainerBuilder::validate_id)
        .map_err(|error| chain(&error))?
        .with_console_socket(console);
    match verb.as_str() {
        "create" => {
            let container = builder.as_init(path).with_systemd(false).with_detach(true).build();
            let container = container.map_err(|error| chain(&error))?;
            container
                .pid()
                .map(|pid| pid.as_raw())
                .ok_or_else(|| "the container has no process".to_owned())
        }
        "exec" => {
            let pid = builder.as_tenant().with_process(Some(path)).with_detach(true).build();
            pid.map(|pid| pid.as_raw()).map_err(|error| chain(&error))
        }
        _ => Err(format!("the runtime does not know {verb:?}")),
    }
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
