//! The agent's greeting: the guest dials the host as soon as its agent serves, so that nobody has to ask again and again.

use std::{
    io,
    os::{fd::AsRawFd, unix::fs::chown},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use coreos_kvm_proto::{
    GREETING, GREETING_MAX, NETWORK_DONE, PROTOCOL, READY_PORT, SANDBOX_DONE,
    mux::{Arrival, MuxStream},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
    sync::{Mutex, mpsc},
    time::Instant,
};

use super::{VsockError, open_folder};
use crate::state::VsockAddress;

/// The version that an agent of this build has.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Somebody greeted, but not an agent that this launcher can talk to.
#[derive(Debug, thiserror::Error)]
pub enum GreetingError {
    #[error("waiting for the agent's greeting failed")]
    Io(#[from] io::Error),
    #[error("the guest greeted, but not as an agent does")]
    NoAgent,
    #[error(
        "the agent in the guest has version {version} (protocol {protocol}), but version {VERSION} (protocol {PROTOCOL}) is needed: build the agent's disk \
         anew, or name the right one as `agent_disk` in the configuration"
    )]
    Version { protocol: String, version: String },
}

/// What a guest has done of what it was told to do before it greets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    pub network: bool,
    pub sandbox: bool,
}

/// An agent of this build has greeted.
#[derive(Debug)]
pub struct Greeting {
    pub done: Done,
    /// What the guest's clock is, where it is known how long it takes to hear that.
    pub clock: Option<GuestClock>,
}

/// A guest's wall clock, and the way to tell how wrong it is.
#[derive(Debug)]
pub struct GuestClock {
    /// What the guest says that it was, after `asked` and before it was heard; nanoseconds since the epoch.
    pub ns: i64,
    pub asked: SystemTime,
    pub took: Duration,
    answer: MuxStream,
}

impl GuestClock {
    /// Has the guest add so many nanoseconds to its clock, before it does anything that it is asked for later.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn add(mut self, behind_ns: i64) -> io::Result<()> {
        self.answer.write_i64(behind_ns).await?;
        self.answer.flush().await
    }
}

/// Waits for one guest's greeting. Made before the guest starts, dropped when it has greeted.
#[derive(Debug)]
pub struct ReadyListener(Listener);

#[derive(Debug)]
enum Listener {
    Unix {
        listener: UnixListener,
        path: PathBuf,
    },
    Vsock {
        listener: tokio_vsock::VsockListener,
        cid: u32,
    },
    Multiplexed(Mutex<mpsc::Receiver<Arrival>>),
}

impl ReadyListener {
    /// For a guest whose connections are multiplexed: those for [`READY_PORT`].
    pub(super) fn of(arrivals: mpsc::Receiver<Arrival>) -> Self {
        Self(Listener::Multiplexed(Mutex::new(arrivals)))
    }

    /// Listens for the guest of that vsock address; `uid` is the user of the device's process, who has to reach the socket.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn bind(address: &VsockAddress, uid: Option<u32>) -> Result<Self, VsockError> {
        match address {
            VsockAddress::Cid(cid) => {
                // Ports of the host are shared by all guests of the node, so each machine has one of its own.
                let any = tokio_vsock::VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, libc::VMADDR_PORT_ANY);
                let listener =
                    tokio_vsock::VsockListener::bind(any).map_err(VsockError::io("listening", "vsock".as_ref()))?;
                Ok(Self(Listener::Vsock { listener, cid: *cid }))
            }
            VsockAddress::Socket(socket) => {
                let mut path = socket.clone().into_os_string();
                path.push(format!("_{READY_PORT}"));
                let path = PathBuf::from(path);
                let error = |what| VsockError::io(what, &path);
                let (folder, name) = open_folder(&path).map_err(error("opening the folder of"))?;
                let listener = UnixListener::bind(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
                    .map_err(error("listening at"))?;
                if uid.is_some() {
                    chown(&path, uid, uid).map_err(error("giving away"))?;
                }
                Ok(Self(Listener::Unix { listener, path }))
            }
        }
    }

    /// The vsock port of the host that the agent has to dial.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn port(&self) -> io::Result<u32> {
        match &self.0 {
            Listener::Unix { .. } | Listener::Multiplexed(_) => Ok(READY_PORT),
            Listener::Vsock { listener, .. } => Ok(listener.local_addr()?.port()),
        }
    }

    /// Waits until the agent has greeted. Unbounded: the caller has the machine's boot time-out.
    ///
    /// # Errors
    /// When something greets that is no agent of this version.
    pub async fn greeted(&self) -> Result<Greeting, GreetingError> {
        // Over vsock the guest may have read its clock before the connection is seen here.
        let unclocked = |(done, _)| Greeting { done, clock: None };
        match &self.0 {
            Listener::Unix { listener, .. } => check(&mut listener.accept().await?.0).await.map(unclocked),
            Listener::Multiplexed(arrivals) => {
                let arrival = arrivals.lock().await.recv().await;
                let arrival = arrival.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
                let (asked, begin) = (SystemTime::now(), Instant::now());
                let mut answer = arrival.take().await?;
                let (done, ns) = check(&mut answer).await?;
                let clock = GuestClock {
                    ns,
                    asked,
                    took: begin.elapsed(),
                    answer,
                };
                Ok(Greeting {
                    done,
                    clock: Some(clock),
                })
            }
            Listener::Vsock { listener, cid } => loop {
                let (mut stream, peer) = listener.accept().await?;
                // Any guest of the node can dial this port; only ours counts.
                if peer.cid() == *cid {
                    return check(&mut stream).await.map(unclocked);
                }
            },
        }
    }
}

impl Drop for ReadyListener {
    fn drop(&mut self) {
        if let Listener::Unix { path, .. } = &self.0 {
            // Gone with the machine's folder at the latest.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Reads one line of at most [`GREETING_MAX`] bytes and compares what it says with what is needed. Answers what the guest has
/// done, and its clock.
async fn check(stream: &mut (impl AsyncRead + Unpin)) -> Result<(Done, i64), GreetingError> {
    let mut line = Vec::with_capacity(GREETING_MAX);
    while !line.ends_with(b"\n") {
        match stream.read_u8().await {
            Ok(byte) if line.len() < GREETING_MAX => line.push(byte),
            _ => return Err(GreetingError::NoAgent),
        }
    }
    let line = String::from_utf8(line).map_err(|_| GreetingError::NoAgent)?;
    let printable = line.trim_end().chars().all(|c| c.is_ascii_graphic() || c == ' ');
    let (protocol, version, rest) = match line.split_ascii_whitespace().collect::<Vec<_>>()[..] {
        [GREETING, protocol, version, ref rest @ ..] if printable => (protocol, version, rest.to_owned()),
        _ => return Err(GreetingError::NoAgent),
    };
    if protocol != PROTOCOL.to_string() || version != VERSION {
        return Err(GreetingError::Version {
            protocol: protocol.to_owned(),
            version: version.to_owned(),
        });
    }
    let mut done = Done::default();
    for what in rest {
        match what {
            NETWORK_DONE => done.network = true,
            SANDBOX_DONE => done.sandbox = true,
            _ => return Err(GreetingError::NoAgent),
        }
    }
    let clock = stream.read_i64().await.map_err(|_| GreetingError::NoAgent)?;
    Ok((done, clock))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("", false, false)]
    #[case(" network", true, false)]
    #[case(" network sandbox", true, true)]
    #[tokio::test]
    async fn an_agent_of_this_version_is_greeted(#[case] rest: &str, #[case] network: bool, #[case] sandbox: bool) {
        let mut said = format!("{GREETING} {PROTOCOL} {VERSION}{rest}\n").into_bytes();
        said.extend_from_slice(&1_795_775_195_011_657_438_i64.to_be_bytes());
        let greeted = check(&mut said.as_slice()).await.unwrap();
        assert_eq!(greeted, (Done { network, sandbox }, 1_795_775_195_011_657_438));
    }

    #[rstest::rstest]
    #[case("coreos-kvm-agent 1 9.9.9\n", "version 9.9.9 (protocol 1)")]
    #[case("coreos-kvm-agent 77 0.1.0\n", "protocol 77")]
    #[case("coreos-kvm-agent 1\n", "not as an agent")]
    #[case("coreos-kvm-agent 1 \u{1b}[2J\n", "not as an agent")]
    #[case("coreos-kvm-agent 1 0.1.0", "not as an agent")]
    #[tokio::test]
    async fn anything_else_is_refused_and_said(#[case] line: &str, #[case] expected: &str) {
        let error = check(&mut line.as_bytes()).await.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    #[tokio::test]
    async fn a_greeting_without_end_is_refused() {
        assert!(check(&mut tokio::io::repeat(b'x')).await.is_err());
    }
}
