//! The process that forks the agent's other processes. It is forked itself before the agent has threads or a runtime, so what
//! it forks may go on with ordinary code. What it forks are the agent's children (CLONE_PARENT), whose ends the agent's reaper sees.

use std::{
    io::{self, IoSlice, IoSliceMut, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::{
        prctl,
        signal::{SigHandler, Signal, signal},
        socket::{
            AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
            socketpair,
        },
    },
    unistd::{ForkResult, Pid, fork},
};

use super::{
    Order, REPORT_MAX,
    create::{self, Entered},
    error_line, hold, join,
};

/// Longest order, in bytes: names and a few paths.
const ORDER_MAX: usize = 4096;
/// Report, streams, and init and cgroup or two namespaces.
const DESCRIPTORS_MAX: usize = 6;

/// The agent's end.
#[derive(Debug)]
pub(crate) struct Zygote {
    pid: Pid,
    socket: OwnedFd,
}

/// Starts the zygote.
///
/// # Safety
/// The process must have one thread.
pub(crate) unsafe fn start() -> io::Result<Zygote> {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: there is one thread, by the caller's word.
    match unsafe { fork() }? {
        ForkResult::Parent { child: pid } => Ok(Zygote { pid, socket: ours }),
        ForkResult::Child => {
            drop(ours);
            std::process::exit(match serve(theirs) {
                Ok(()) => 0,
                Err(_) => 1,
            })
        }
    }
}

impl Zygote {
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends an order with the descriptors that belong to it.
    pub(crate) fn send(&self, order: &Order, descriptors: &[OwnedFd]) -> io::Result<()> {
        let text = serde_json::to_vec(order)?;
        if text.len() > ORDER_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&text)],
            &rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }
}

/// The zygote's life: until the agent's end is closed.
fn serve(socket: OwnedFd) -> io::Result<()> {
    // Without the agent there is nobody to serve.
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let own = std::fs::File::open("/proc/self/ns/pid")?;
    // What is made here is to have the usual disposition, which Rust's own start has changed.
    // SAFETY: no handler is set.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    while let Some((order, descriptors)) = receive(&socket)? {
        let [report, rest @ ..] = descriptors.as_slice() else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let report = std::fs::File::from(report.try_clone()?);
        let told = match (&order, rest) {
            (
                Order::Join {
                    bundle,
                    process,
                    console,
                    users,
                },
                [stdin, stdout, stderr, init, cgroup],
            ) => {
                let join = || {
                    let console = console.as_deref();
                    error_line(&join::join(init.as_fd(), bundle, process, console, *users))
                };
                // Only children get into the PID namespace that was entered last.
                setns(init, CloneFlags::CLONE_NEWPID)
                    .map_err(io::Error::from)
                    .and_then(|()| {
                        let made = branch(Some(cgroup.as_fd()), &report, &[stdin, stdout, stderr], join);
                        setns(&own, CloneFlags::CLONE_NEWPID)?;
                        made
                    })
                    .and_then(|pid| (&report).write_all(format!("pid {pid}\n").as_bytes()))
            }
            (
                Order::Create {
                    id,
                    bundle,
                    cgroup,
                    console,
                    processes,
                    users,
                },
                [stdin, stdout, stderr, namespaces @ ..],
            ) => {
                let mut namespaces = namespaces.iter().map(AsFd::as_fd).peekable();
                let entered = Entered {
                    processes: namespaces.next_if(|_| *processes),
                    users: namespaces.next().zip(*users),
                };
                let make = || {
                    let console = console.as_deref();
                    line(create::create(&report, id, bundle, cgroup, console, &entered))
                };
                branch(None, &report, &[stdin, stdout, stderr], make).map(drop)
            }
            (Order::Users(mappings), [until]) => {
                let wait = || {
                    // Until its other end is closed.
                    let _ = nix::unistd::read(until, &mut [0]);
                    String::new()
                };
                branch_with(CLONE_NEWUSER, None, &report, &[], wait)
                    .and_then(|pid| mappings.write(pid).map(|()| pid))
                    .and_then(|pid| (&report).write_all(format!("pid {pid}\n").as_bytes()))
            }
            (Order::Hold { users: Some(mappings) }, [namespace]) => {
                let hold = || hold::hold_among(namespace.as_fd(), *mappings, &report);
                branch(None, &report, &[], hold).map(drop)
            }
            (Order::Hold { users: None }, []) => unshare(CloneFlags::CLONE_NEWPID)
                .map_err(io::Error::from)
                .and_then(|()| {
                    let made = branch(None, &report, &[], || error_line(&hold::hold_for_all()));
                    setns(&own, CloneFlags::CLONE_NEWPID)?;
                    made
                })
                .and_then(|pid| (&report).write_all(format!("pid {pid}\n").as_bytes())),
            (Order::Start { id }, []) => branch(None, &report, &[], || line(create::start(id))).map(drop),
            (Order::Delete { id }, []) => branch(None, &report, &[], || line(create::delete(id))).map(drop),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        if let Err(error) = told {
            // An agent that does not listen any more is not told.
            let _ = (&report).write_all(error_line(&format!("forking a process failed: {error}")).as_bytes());
        }
    }
    Ok(())
}

/// The report of a container's pid.
fn line(outcome: Result<i32, String>) -> String {
    match outcome {
        Ok(pid) => format!("pid {pid}\n"),
        Err(error) => error_line(&error),
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<(Order, Vec<OwnedFd>)>> {
    let mut text = [0; ORDER_MAX];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS_MAX]);
    let mut parts = [IoSliceMut::new(&mut text)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made them for this process.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    let length = message.bytes;
    if length == 0 {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&text[..length])?, descriptors)))
}

/// Forks a process into `cgroup`; it does `work` with these streams, reports what that returns and ends. Answers its pid.
pub(super) fn branch(
    cgroup: Option<BorrowedFd<'_>>,
    report: &std::fs::File,
    stdio: &[&OwnedFd],
    work: impl FnOnce() -> String,
) -> io::Result<libc::pid_t> {
    branch_with(0, cgroup, report, stdio, work)
}

/// The same, in the new namespaces that the flags of clone(2) name.
fn branch_with(
    namespaces: u64,
    cgroup: Option<BorrowedFd<'_>>,
    report: &std::fs::File,
    stdio: &[&OwnedFd],
    work: impl FnOnce() -> String,
) -> io::Result<libc::pid_t> {
    let into_cgroup = if cgroup.is_some() { CLONE_INTO_CGROUP } else { 0 };
    let arguments = CloneArguments {
        flags: namespaces | into_cgroup | CLONE_PARENT,
        cgroup: cgroup
            .and_then(|cgroup| u64::try_from(cgroup.as_raw_fd()).ok())
            .unwrap_or_default(),
        ..Default::default()
    };
    // SAFETY: clone3(2) without CLONE_VM is a fork, and this process has one thread. The structure outlives the call.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<CloneArguments>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            for (stream, number) in stdio.iter().zip(0..) {
                // SAFETY: dup2(2) onto the standard streams, which nobody here owns.
                if unsafe { libc::dup2(stream.as_raw_fd(), number) } < 0 {
                    std::process::exit(1);
                }
            }
            let told = work();
            // Nobody is left to tell if this fails: the agent then sees an end without a report.
            let _ = (&*report).write_all(&told.as_bytes()[..told.len().min(REPORT_MAX)]);
            std::process::exit(127)
        }
        pid => i32::try_from(pid).map_err(io::Error::other),
    }
}

/// `struct clone_args` of clone3(2), as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    /// Given by CLONE_PARENT.
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_PARENT: u64 = 0x8000;
const CLONE_NEWUSER: u64 = 0x1000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
