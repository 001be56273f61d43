//! The serial port by which output comes when there is much of it, and who has it ([`coreos_kvm_proto::output_port`]).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use coreos_kvm_proto::{OUTPUT_SERIAL_PORT, frame, output_port::Word};
use futures::FutureExt as _;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Notify,
    task::JoinHandle,
};

use crate::serial;

/// A stream that has the port keeps it so long without a use for it, when another one has.
const IDLE: Duration = Duration::from_millis(100);

/// The port.
#[derive(Default)]
pub(crate) struct OutputPort {
    state: Mutex<State>,
    /// Another stream has a use for it.
    wanted: Notify,
}

#[derive(Default)]
enum State {
    /// Nobody has had a use for it.
    #[default]
    Unopened,
    Free(Port),
    /// A stream has it, or nobody can have it any more.
    Taken,
}

/// The port, open. The runtime does not watch it as it does other descriptors: the driver says after each of its buffers that there is room, and
/// whoever waits for a program's next bytes would be woken for that.
struct Port {
    descriptor: Arc<OwnedFd>,
    /// Waits for room on a thread of its own.
    room: Option<JoinHandle<io::Result<()>>>,
}

/// The port as long as one stream has it.
pub(crate) struct Held {
    /// None when it has failed.
    port: Option<Port>,
    home: Arc<OutputPort>,
}

impl OutputPort {
    /// Has a stream turn to the port, unless another one has it.
    ///
    /// # Errors
    /// When the host wants no more of the stream, or its connection has ended.
    pub(crate) async fn turn(
        self: &Arc<Self>,
        connection: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<Option<Held>> {
        let Some(held) = self.take() else {
            self.wanted.notify_one();
            return Ok(None);
        };
        frame::write_turn(connection).await?;
        match Word::hear(connection).await? {
            Word::Go => Ok(Some(held)),
            Word::Stop => {
                held.turn_back(connection).await?;
                Err(unwanted())
            }
            Word::Done => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn take(self: &Arc<Self>) -> Option<Held> {
        let mut state = self.state();
        let port = match std::mem::replace(&mut *state, State::Taken) {
            State::Free(port) => port,
            State::Unopened => match serial::open_port(OUTPUT_SERIAL_PORT) {
                Ok(port) => Port::new(port),
                Err(error) => {
                    tracing::warn!(%error, "the port for much output cannot be opened: all of it comes on connections");
                    return None;
                }
            },
            State::Taken => return None,
        };
        Some(Held {
            port: Some(port),
            home: self.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn of(port: impl Into<OwnedFd>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State::Free(Port::new(port.into()))),
            wanted: Notify::new(),
        })
    }
}

impl Held {
    /// Sends a frame, as [`frame::write`] does on a connection.
    ///
    /// # Errors
    /// Of the port, which is of no use then; when the host wants no more.
    pub(crate) async fn send(&mut self, frame: &mut [u8], connection: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        self.write(async |port| frame::write(port, frame).await).await?;
        // Before its turn is over there is nothing else that the host can have to say.
        Word::hear(connection)
            .now_or_never()
            .map_or(Ok(()), |_| Err(unwanted()))
    }

    /// Waits until the port is of more use to another stream.
    ///
    /// # Errors
    /// When the host wants no more of this one.
    pub(crate) async fn call_back(&self, connection: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        let wanted = async {
            self.home.wanted.notified().await;
            tokio::time::sleep(IDLE).await;
        };
        tokio::select! {
            () = wanted => Ok(()),
            _ = Word::hear(connection) => Err(unwanted()),
        }
    }

    /// Has the stream turn back to its connection. Whoever comes next has the port when the host has read all that is on it.
    ///
    /// # Errors
    /// Of the port; when the connection has ended.
    pub(crate) async fn turn_back(mut self, connection: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        self.write(async |port| frame::write_turn(port).await).await?;
        while Word::hear(connection).await? != Word::Done {}
        Ok(())
    }

    /// After a failure nobody knows what of it the host has, and what would be part of it: the port is of no use any more.
    async fn write(&mut self, write: impl AsyncFnOnce(&mut Port) -> io::Result<()>) -> io::Result<()> {
        let port = self.port.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let written = write(port).await;
        if let Err(error) = &written {
            tracing::warn!(%error, "the port for much output fails: all of it comes on connections");
            self.port = None;
        }
        written
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(port) = self.port.take() {
            *self.home.state() = State::Free(port);
        }
    }
}

impl Port {
    fn new(descriptor: OwnedFd) -> Self {
        Self {
            descriptor: Arc::new(descriptor),
            room: None,
        }
    }
}

impl AsyncWrite for Port {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            if let Some(room) = &mut self.room {
                let waited = ready!(Pin::new(room).poll(cx));
                self.room = None;
                waited.map_err(io::Error::other)??;
            }
            match nix::unistd::write(&*self.descriptor, bytes) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    let descriptor = self.descriptor.clone();
                    self.room = Some(tokio::task::spawn_blocking(move || wait_for_room(&descriptor)));
                }
                written => return Poll::Ready(written.map_err(io::Error::from)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn wait_for_room(port: &OwnedFd) -> io::Result<()> {
    let mut polled = [PollFd::new(port.as_fd(), PollFlags::POLLOUT)];
    // A process may end at any time, and say so to this thread.
    while poll(&mut polled, PollTimeout::NONE) == Err(Errno::EINTR) {}
    match polled[0].revents() {
        Some(events) if events.contains(PollFlags::POLLOUT) => Ok(()),
        _ => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

fn unwanted() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the host wants no more of it")
}
