//! One process: a container's init, a further process in a container, or one in the guest itself; with its streams and its end.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use coreos_kvm_proto::agent::{Streams, stream_hello::Kind};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::unix::pipe,
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    error::AgentError,
    output_pipe::OutputPipe,
    reaper::{self, Exit, ExitWatch, Reaper},
    runtime::Stdio,
    terminal::Terminal,
};

/// Where the bytes of one of its streams come from or go to.
pub(crate) enum Endpoint {
    Output(Box<dyn AsyncRead + Send + Unpin>),
    Input(Box<dyn AsyncWrite + Send + Unpin>),
}

#[derive(Default)]
struct Endpoints {
    stdin: Option<Endpoint>,
    stdout: Option<Endpoint>,
    stderr: Option<Endpoint>,
    terminal: Option<Terminal>,
}

enum Life {
    /// There is no process yet.
    Prepared,
    /// It exists; `started` tells an init that waits for its start from one that runs.
    Made { pid: Pid, exit: ExitWatch, started: bool },
}

/// One process.
pub(crate) struct Process {
    wanted: Streams,
    life: Mutex<Life>,
    endpoints: Mutex<Endpoints>,
    /// True as soon as the endpoints are there: those of a terminal come with the process.
    connected: watch::Sender<bool>,
    /// Cancelled when the process is forgotten.
    forgotten: CancellationToken,
}

impl Process {
    pub(crate) fn new(wanted: Streams) -> Self {
        Self {
            wanted,
            life: Mutex::new(Life::Prepared),
            endpoints: Mutex::default(),
            connected: watch::Sender::new(false),
            forgotten: CancellationToken::new(),
        }
    }

    pub(crate) fn has_terminal(&self) -> bool {
        self.wanted.terminal
    }

    /// Makes the pipes of the streams that are wanted; the process's ends are the answer. With a terminal there are none.
    pub(crate) fn make_pipes(&self) -> io::Result<Stdio> {
        let mut stdio = Stdio::null()?;
        if self.wanted.terminal {
            return Ok(stdio);
        }
        let mut endpoints = Endpoints::default();
        if self.wanted.stdin {
            let (theirs, ours) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
            set_nonblocking(&ours)?;
            endpoints.stdin = Some(Endpoint::Input(Box::new(pipe::Sender::from_owned_fd(ours)?)));
            stdio.stdin = theirs;
        }
        let output = || -> io::Result<(Endpoint, OwnedFd)> {
            let (ours, theirs) = OutputPipe::new()?;
            Ok((Endpoint::Output(Box::new(ours)), theirs))
        };
        if self.wanted.stdout {
            let (endpoint, theirs) = output()?;
            (endpoints.stdout, stdio.stdout) = (Some(endpoint), theirs);
        }
        if self.wanted.stderr {
            let (endpoint, theirs) = output()?;
            (endpoints.stderr, stdio.stderr) = (Some(endpoint), theirs);
        }
        self.connect(endpoints);
        Ok(stdio)
    }

    /// Takes the master of the process's terminal.
    pub(crate) fn take_terminal(&self, master: OwnedFd) -> io::Result<()> {
        let terminal = Terminal::new(master)?;
        self.connect(Endpoints {
            stdin: self.wanted.stdin.then(|| Endpoint::Input(Box::new(terminal.clone()))),
            stdout: Some(Endpoint::Output(Box::new(terminal.clone()))),
            stderr: None,
            terminal: Some(terminal),
        });
        Ok(())
    }

    fn connect(&self, endpoints: Endpoints) {
        *lock(&self.endpoints) = endpoints;
        self.connected.send_replace(true);
    }

    /// Waits for the stream's endpoint and takes it. None if it is not wanted, somebody has it already, or the process is
    /// forgotten meanwhile.
    pub(crate) async fn endpoint(&self, kind: Kind) -> Option<Endpoint> {
        let mut connected = self.connected.subscribe();
        tokio::select! {
            result = connected.wait_for(|connected| *connected) => drop(result.ok()?),
            () = self.forgotten.cancelled() => return None,
        }
        let mut endpoints = lock(&self.endpoints);
        match kind {
            Kind::STDIN => endpoints.stdin.take(),
            Kind::STDOUT => endpoints.stdout.take(),
            Kind::STDERR => endpoints.stderr.take(),
        }
    }

    pub(crate) fn forgotten(&self) -> &CancellationToken {
        &self.forgotten
    }

    /// The process has come into being, after `since`.
    pub(crate) fn made(&self, pid: Pid, reaper: &Reaper, since: Instant, started: bool) {
        *lock(&self.life) = Life::Made {
            pid,
            exit: reaper.watch(pid, since),
            started,
        };
    }

    /// An init that waited now runs.
    pub(crate) fn started(&self) {
        if let Life::Made { started, .. } = &mut *lock(&self.life) {
            *started = true;
        }
    }

    /// Its pid, None as long as there is no process.
    pub(crate) fn pid(&self) -> Option<Pid> {
        match &*lock(&self.life) {
            Life::Prepared => None,
            Life::Made { pid, .. } => Some(*pid),
        }
    }

    /// It runs what it is to run.
    pub(crate) fn is_running(&self) -> bool {
        matches!(&*lock(&self.life), Life::Made { exit, started: true, .. } if exit.borrow().is_none())
    }

    pub(crate) fn has_started(&self) -> bool {
        matches!(&*lock(&self.life), Life::Made { started: true, .. })
    }

    /// How it ended, None before.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match &*lock(&self.life) {
            Life::Prepared => None,
            Life::Made { exit, .. } => *exit.borrow(),
        }
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Result<Exit, AgentError> {
        let exit = match &*lock(&self.life) {
            Life::Prepared => {
                return Err(AgentError::FailedPrecondition(
                    "the process has not been started".to_owned(),
                ));
            }
            Life::Made { exit, .. } => exit.clone(),
        };
        Ok(reaper::exited(exit).await)
    }

    pub(crate) fn signal(&self, signal: u32) -> Result<(), AgentError> {
        let gone = || AgentError::NotFound("the process has ended already".to_owned());
        let number =
            i32::try_from(signal).map_err(|_| AgentError::InvalidArgument(format!("{signal} is no signal")))?;
        let signal = if number == 0 {
            None
        } else {
            Some(Signal::try_from(number).map_err(|_| AgentError::InvalidArgument(format!("{number} is no signal")))?)
        };
        match &*lock(&self.life) {
            Life::Prepared => Err(AgentError::FailedPrecondition(
                "the process has not been started".to_owned(),
            )),
            Life::Made { exit, .. } if exit.borrow().is_some() => Err(gone()),
            // As long as its end is not known here, nobody has waited for it, and its pid is its own.
            Life::Made { pid, .. } => match kill(*pid, signal) {
                Err(nix::Error::ESRCH) => Err(gone()),
                result => result.map_err(AgentError::failed("the signal could not be sent")),
            },
        }
    }

    pub(crate) fn resize(&self, columns: u32, rows: u32) -> Result<(), AgentError> {
        let size = |number: u32| {
            u16::try_from(number).map_err(|_| AgentError::InvalidArgument(format!("{number} is no size of a terminal")))
        };
        let (columns, rows) = (size(columns)?, size(rows)?);
        match &lock(&self.endpoints).terminal {
            Some(terminal) => terminal
                .resize(columns, rows)
                .map_err(AgentError::failed("resizing the terminal failed")),
            None => Err(AgentError::FailedPrecondition(
                "the process has no terminal yet, or none at all".to_owned(),
            )),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change leaves what is locked whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn set_nonblocking(descriptor: &impl AsFd) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor.as_fd(), FcntlArg::F_GETFL)?);
    fcntl(descriptor.as_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

/// The reading end of a pipe, for tokio.
pub(crate) fn receiver(descriptor: OwnedFd) -> io::Result<pipe::Receiver> {
    set_nonblocking(&descriptor)?;
    pipe::Receiver::from_owned_fd(descriptor)
}
