//! The wall around the process: what virtiofsd does with `--sandbox=namespace --seccomp=kill`, by virtiofsd's own means.
//!
//! The process that was started stays outside and waits; it passes on the exit code of the one that serves, which is the first
//! in a namespace of processes of its own, has the shared directory as its root, no network, the capabilities that files of
//! any owner need, and no system call that virtiofsd does not need.

use std::{
    io::{self, Read},
    mem,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::Path,
    process, thread,
    time::Duration,
};

use capng::{Action, Set, Type};
use vhost::vhost_user::Listener;
use virtiofsd::{
    limits,
    passthrough::{CachePolicy, Config, InodeFileHandlesMode},
    sandbox::{self, Sandbox, SandboxMode},
    seccomp::{self, SeccompAction, enable_seccomp},
};

/// What virtiofsd keeps for files of any owner and mode; the last one opens a file by its handle, so that no descriptor is held
/// for each file that the guest remembers.
const CAPABILITIES: [&str; 9] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "SETGID",
    "SETUID",
    "MKNOD",
    "SETFCAP",
    "DAC_READ_SEARCH",
];
/// Descriptors that are not the guest's to use up: sandbox, socket, one for each mount, and those that are open for a moment.
const RESERVED_DESCRIPTORS: u64 = 600;
/// Stack of the thread that waits for the outer process's end. It makes one system call.
const STACK: usize = 64 << 10;

/// The process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfinementError {
    #[error("{0} is no directory")]
    NoDirectory(String),
    #[error("raising the limit of open files failed: {0}")]
    Limit(String),
    #[error("the limit of open files is {0}: too low to serve anything")]
    LimitTooLow(u64),
    #[error("making the pipe that tells of the outer process's end failed")]
    Pipe(#[source] io::Error),
    #[error("making the sandbox failed")]
    Sandbox(#[source] sandbox::Error),
    #[error("confining the system calls failed")]
    SystemCalls(#[source] seccomp::Error),
    #[error("dropping the capabilities failed")]
    Capabilities(#[source] capng::Error),
    #[error("starting the thread that waits for the outer process's end failed")]
    Thread(#[source] io::Error),
}

/// Goes behind the wall. Returns in the process that serves alone; the one that called it waits for that, and ends with it.
/// What is returned beside the socket is virtiofsd's configuration for `directory`.
///
/// # Errors
/// When the wall cannot be made; nothing is to be served then.
pub(crate) fn enter(socket: OwnedFd, directory: &str) -> Result<(OwnedFd, Config), ConfinementError> {
    if !Path::new(directory).is_dir() {
        return Err(ConfinementError::NoDirectory(directory.to_owned()));
    }
    let descriptors = limits::setup_rlimit_nofile(None).map_err(ConfinementError::Limit)?;
    let guest_fd_limit = descriptors
        .checked_sub(RESERVED_DESCRIPTORS)
        .ok_or(ConfinementError::LimitTooLow(descriptors))?;
    let (outer_end, held_outside) = io::pipe().map_err(ConfinementError::Pipe)?;

    let mut sandbox = Sandbox::new(directory.to_owned(), SandboxMode::Namespace, Vec::new(), Vec::new());
    // The sandbox closes a listener in the outer process; of the socket's two ends it does not care which kind they are.
    let socket = sandbox
        .enter(Listener::from(UnixListener::from(socket)))
        .map_err(ConfinementError::Sandbox)?;
    drop(held_outside);
    let number = socket.as_raw_fd();
    mem::forget(socket);
    // SAFETY: the descriptor is open, and its owner was forgotten in the line above.
    let socket = unsafe { OwnedFd::from_raw_fd(number) };

    enable_seccomp(SeccompAction::Kill, false).map_err(ConfinementError::SystemCalls)?;
    drop_capabilities().map_err(ConfinementError::Capabilities)?;
    end_with(outer_end).map_err(ConfinementError::Thread)?;

    let second = Duration::from_secs(1);
    let config = Config {
        // As `--cache=auto` has them.
        cache_policy: CachePolicy::Auto,
        entry_timeout: second,
        attr_timeout: second,
        readdirplus: true,
        xattr: true,
        // The kernel's /dev/fuse knows nothing of submounts: see inode_numbers.
        announce_submounts: false,
        inode_file_handles: InodeFileHandlesMode::Prefer,
        root_dir: sandbox.get_root_dir(),
        proc_sfd_rawfd: sandbox.get_proc_self_fd(),
        proc_mountinfo_rawfd: sandbox.get_mountinfo_fd(),
        guest_fd_limit,
        ..Config::default()
    };
    Ok((socket, config))
}

/// Leaves the process no capabilities but [`CAPABILITIES`], and no way to others.
fn drop_capabilities() -> capng::Result<()> {
    capng::clear(Set::BOTH);
    capng::updatev(Action::ADD, Type::PERMITTED | Type::EFFECTIVE, CAPABILITIES.to_vec())?;
    capng::apply(Set::BOTH)
}

/// Ends this process when the outer one has ended, which alone holds the other end of the pipe, and alone is known to whoever
/// kills it. A signal for the parent's death (prctl(2), PR_SET_PDEATHSIG) would not do: the kernel takes it back when the
/// process acts as another user, as it does for each file that the guest creates.
fn end_with(mut outer_end: io::PipeReader) -> io::Result<()> {
    thread::Builder::new()
        .name("outer".to_owned())
        .stack_size(STACK)
        .spawn(move || {
            // Nothing is ever written: it fails when there is nobody left who could. Signals do not end it.
            let _ = outer_end.read_exact(&mut [0]);
            process::exit(1)
        })
        .map(drop)
}
