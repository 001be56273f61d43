//! The ports of a guest without vsock: connections are multiplexed on a serial port of its ([`coreos_kvm_proto::mux`]), and other
//! processes of the host reach them at a Unix socket, by the words that vhost-device-vsock knows.

use std::{
    os::{fd::AsRawFd, unix::fs::DirBuilderExt},
    path::{Path, PathBuf},
    time::Duration,
};

use coreos_kvm_proto::{
    READY_PORT,
    mux::{Arrival, Incoming, Mux, Side},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{UnixListener, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};

use super::{ReadyListener, VsockDialer, VsockError};
use crate::state::VsockAddress;

/// Whoever connects says at once to which port.
const WORDS: Duration = Duration::from_secs(5);
/// Longest `CONNECT 4294967295\n`, in bytes.
const WORDS_MAX: usize = 32;
/// After a connection that could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// The connections of one guest. Dropping it ends them.
#[derive(Debug)]
pub struct Multiplexed {
    pub address: VsockAddress,
    mux: Mux,
    _tasks: JoinSet<()>,
}

impl Multiplexed {
    /// Begins with the connections on `serial`, the host's end of the guest's port, and lets others connect in the machine's folder
    /// `state`. The guest's own connection, its greeting, goes to the listener.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn start(serial: UnixStream, state: &Path) -> Result<(Self, ReadyListener), VsockError> {
        let (listener, socket) = listen(state)?;
        let (mux, incoming, work) = Mux::new(serial, Side::Host);
        let (greeted, ready) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            match work.await {
                Ok(()) => tracing::debug!("the guest's serial port is closed"),
                Err(error) => {
                    tracing::warn!(%error, "what the guest says on its serial port is not understood any more")
                }
            }
        });
        tasks.spawn(greetings(incoming, greeted));
        tasks.spawn(connect_others(listener, mux.clone()));
        let multiplexed = Self {
            address: VsockAddress::Socket(socket),
            mux,
            _tasks: tasks,
        };
        Ok((multiplexed, ReadyListener::of(ready)))
    }

    /// Connects to the guest without the way over the socket.
    pub fn dialer(&self) -> VsockDialer {
        VsockDialer::multiplexed(self.mux.clone())
    }
}

/// Where the machine's folder has the vsock device's socket otherwise.
fn listen(state: &Path) -> Result<(UnixListener, PathBuf), VsockError> {
    let folder = state.join("vsock");
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(&folder)
        .map_err(VsockError::io("making the directory", &folder))?;
    let socket = folder.join("guest");
    let open = std::fs::File::open(&folder).map_err(VsockError::io("opening", &folder))?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/guest", open.as_raw_fd()))
        .map_err(VsockError::io("listening at", &socket))?;
    Ok((listener, socket))
}

/// Hands the agent's greeting on. Whatever else the guest wants of the host is refused.
async fn greetings(mut incoming: Incoming, greeted: mpsc::Sender<Arrival>) {
    while let Some(arrival) = incoming.next().await {
        if arrival.port == READY_PORT {
            // Once there has been a greeting, nobody waits for another.
            let _ = greeted.try_send(arrival);
        }
    }
}

async fn connect_others(listener: UnixListener, mux: Mux) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => drop(connections.spawn(connect(stream, mux.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "others cannot connect to the guest");
                    // As long as this process has too many descriptors open.
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connect(mut stream: UnixStream, mux: Mux) {
    let Ok(Some(port)) = timeout(WORDS, words(&mut stream)).await else {
        return;
    };
    if let Ok(mut guest) = mux.dial(port).await
        && stream.write_all(format!("OK {port}\n").as_bytes()).await.is_ok()
    {
        let _ = copy_bidirectional(&mut stream, &mut guest).await;
    }
}

async fn words(stream: &mut UnixStream) -> Option<u32> {
    let mut line = Vec::with_capacity(WORDS_MAX);
    while !line.ends_with(b"\n") {
        if line.len() == WORDS_MAX {
            return None;
        }
        line.push(stream.read_u8().await.ok()?);
    }
    let line = std::str::from_utf8(&line).ok()?;
    line.strip_prefix("CONNECT ")?.trim_end().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that echoes at port 8, and greets.
    async fn guest(serial: UnixStream) {
        let (mux, mut incoming, work) = Mux::new(serial, Side::Guest);
        tokio::spawn(work);
        let mut greeting = mux.dial(READY_PORT).await.unwrap();
        let line = format!(
            "{} {} {}\n",
            coreos_kvm_proto::GREETING,
            coreos_kvm_proto::PROTOCOL,
            env!("CARGO_PKG_VERSION")
        );
        let clock = 1_000_000_i64.to_be_bytes();
        greeting.write_all(&[line.as_bytes(), &clock].concat()).await.unwrap();
        greeting.flush().await.unwrap();
        assert_eq!(greeting.read_i64().await.unwrap(), -17);
        assert!(mux.dial(22).await.is_err(), "the host has no such port");
        while let Some(arrival) = incoming.next().await {
            if arrival.port == 8 {
                let stream = arrival.take().await.unwrap();
                tokio::spawn(async move {
                    let (mut reader, mut writer) = tokio::io::split(stream);
                    tokio::io::copy(&mut reader, &mut writer).await.unwrap();
                });
            }
        }
    }

    #[tokio::test]
    async fn the_guest_is_reached_by_this_process_and_by_others() {
        let root = tempfile::tempdir().unwrap();
        let (host, serial) = UnixStream::pair().unwrap();
        tokio::spawn(guest(serial));
        let (multiplexed, ready) = Multiplexed::start(host, root.path()).unwrap();
        let clock = ready.greeted().await.unwrap().clock.unwrap();
        assert_eq!(clock.ns, 1_000_000);
        clock.add(-17).await.unwrap();
        for dialer in [multiplexed.dialer(), VsockDialer::new(multiplexed.address.clone())] {
            let mut stream = dialer.dial(8).await.unwrap();
            stream.write_all(b"there and back").await.unwrap();
            let mut back = [0; 14];
            stream.read_exact(&mut back).await.unwrap();
            assert_eq!(&back, b"there and back");
            let refused = dialer.dial(9).await.unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        }
    }
}
