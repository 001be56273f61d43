//! The guest's vsock: its device, connections to the guest's ports, and the greeting of its agent.
//!
//! Where the node's kernel has vhost-vsock, the device is the kernel's. Elsewhere it is vhost-device-vsock: a process that turns
//! the guest's connections into Unix sockets. A host program connects to the device's socket, writes `CONNECT <port>\n`
//! and is answered `OK <port>\n`; the guest's connection to port N of the host arrives at the socket of the same name with
//! `_N` behind it. A clone whose memory is shared copy-on-write has neither, and the same ports on a serial port: [`Multiplexed`].

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, chown},
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use coreos_kvm_proto::mux::{Mux, MuxStream};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::UnixStream,
    time::{Instant, sleep, timeout},
};

use crate::{
    program::{self, ProgramError},
    qemu::process::{Confinement, Process, ProcessError},
    state::VsockAddress,
};

mod multiplexed;
mod ready;
mod vhost;

pub use multiplexed::Multiplexed;
pub use ready::{GreetingError, GuestClock, ReadyListener};

/// A guest that runs takes a connection, or refuses it, within moments.
const DIAL: Duration = Duration::from_secs(5);
/// The device process listens some milliseconds after its start.
const DEVICE: Duration = Duration::from_secs(5);
/// Bytes of one connection that the guest may send before it is told that the device process has passed any of them on. With that program's
/// default of 64 KiB, one packet of Linux, each packet waits for word of the one before.
const TX_BUFFER: u32 = 256 << 10;
/// Longest answer to CONNECT, in bytes: `OK 4294967295\n`.
const ANSWER_MAX: usize = 32;

/// The device cannot be provided.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("no free vsock context id was found for the guest in /dev/vhost-vsock")]
    Cid(#[source] io::Error),
    #[error("{what} {} failed", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the vsock device of the guest did not start: {0}")]
    Device(String),
}

impl VsockError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// Which device a node offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VsockKind {
    /// The kernel's, by /dev/vhost-vsock.
    Vhost,
    /// The process vhost-device-vsock.
    VhostUser,
}

/// What this node offers: the kernel's device wherever it can be opened.
pub fn kind() -> VsockKind {
    match vhost::open() {
        Ok(_) => VsockKind::Vhost,
        Err(_) => VsockKind::VhostUser,
    }
}

/// A guest's vsock device, ready to be given to QEMU.
#[derive(Debug)]
pub struct VsockDevice {
    pub address: VsockAddress,
    pub backend: Backend,
}

/// What stands behind the device.
#[derive(Debug)]
pub enum Backend {
    /// An open /dev/vhost-vsock that holds the guest's context id.
    Vhost { device: OwnedFd, cid: u32 },
    /// The process, and a connection to it that QEMU takes over.
    VhostUser { process: Process, connection: OwnedFd },
}

impl VsockDevice {
    /// Prepares the device that this node offers, in the machine's folder `state`. `program` is the configuration's
    /// vhost-device-vsock; its process runs in `confinement`.
    ///
    /// # Errors
    /// When there is neither a kernel device nor the program, or the process does not start.
    pub async fn prepare(program: &Path, state: &Path, confinement: Confinement) -> Result<Self, VsockError> {
        match vhost::open() {
            Ok(device) => {
                let cid = vhost::claim_cid(&device).map_err(VsockError::Cid)?;
                Ok(Self {
                    address: VsockAddress::Cid(cid),
                    backend: Backend::Vhost { device, cid },
                })
            }
            Err(_) => Self::start_process(program, state, confinement).await,
        }
    }

    async fn start_process(program: &Path, state: &Path, confinement: Confinement) -> Result<Self, VsockError> {
        let program = program::find("vhost-device-vsock", "vhost_device_vsock", program)?;
        let folder = state.join("vsock");
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(VsockError::io("making the directory", &folder))?;
        if let Some(uid) = confinement.uid {
            chown(&folder, Some(uid), Some(uid)).map_err(VsockError::io("giving away", &folder))?;
        }
        // The folders above are closed to the process, so it is given this one open; that also keeps its paths short, for
        // a socket's has at most 107 bytes: unix(7).
        let handle = OwnedFd::from(std::fs::File::open(&folder).map_err(VsockError::io("opening", &folder))?);
        let inside = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let arguments = [
            "--socket".to_owned(),
            format!("{inside}/device"),
            "--uds-path".to_owned(),
            format!("{inside}/guest"),
            "--tx-buffer-size".to_owned(),
            TX_BUFFER.to_string(),
        ];
        let process = Process::start(&program, &arguments.map(Into::into), vec![handle], confinement)?;

        let connection = connect_device(&folder.join("device"), &process).await?;
        Ok(Self {
            address: VsockAddress::Socket(folder.join("guest")),
            backend: Backend::VhostUser {
                process,
                connection: connection.into(),
            },
        })
    }

    /// A dialer for the guest.
    pub fn dialer(&self) -> VsockDialer {
        VsockDialer::new(self.address.clone())
    }
}

/// Connects as soon as the process listens.
async fn connect_device(socket: &Path, process: &Process) -> Result<std::os::unix::net::UnixStream, VsockError> {
    let deadline = Instant::now() + DEVICE;
    loop {
        match connect_at(socket) {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() > deadline => {
                return Err(VsockError::Device(format!("it does not listen: {error}")));
            }
            Err(_) => {}
        }
        tokio::select! {
            status = process.exited() => {
                return Err(VsockError::Device(format!("{status}; it said: {}", process.messages(5).join(" | "))));
            }
            () = sleep(Duration::from_millis(1)) => {}
        }
    }
}

/// Connects to a Unix socket by its folder's descriptor, so that the folder's path may be as long as it likes.
fn connect_at(socket: &Path) -> io::Result<std::os::unix::net::UnixStream> {
    let (folder, name) = open_folder(socket)?;
    std::os::unix::net::UnixStream::connect(format!("/proc/self/fd/{}/{name}", folder.as_raw_fd()))
}

fn open_folder(socket: &Path) -> io::Result<(std::fs::File, String)> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    Ok((std::fs::File::open(folder)?, name.to_string_lossy().into_owned()))
}

/// Connects to ports of one guest.
#[derive(Debug, Clone)]
pub struct VsockDialer {
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    Address(VsockAddress),
    Multiplexed(Mux),
}

impl VsockDialer {
    pub fn new(address: VsockAddress) -> Self {
        Self {
            way: Way::Address(address),
        }
    }

    fn multiplexed(mux: Mux) -> Self {
        Self {
            way: Way::Multiplexed(mux),
        }
    }

    /// Connections are the host's kernel's, and none of another process.
    pub fn is_of_kernel(&self) -> bool {
        matches!(self.way, Way::Address(VsockAddress::Cid(_)))
    }

    /// Connects to `port` of the guest.
    ///
    /// # Errors
    /// When nobody listens there, the guest is gone, or it does not answer within 5 s.
    pub async fn dial(&self, port: u32) -> io::Result<VsockStream> {
        let dial = async {
            match &self.way {
                Way::Multiplexed(mux) => Ok(VsockStream(Stream::Multiplexed(mux.dial(port).await?))),
                Way::Address(VsockAddress::Cid(cid)) => {
                    let address = tokio_vsock::VsockAddr::new(*cid, port);
                    Ok(VsockStream(Stream::Vsock(
                        tokio_vsock::VsockStream::connect(address).await?,
                    )))
                }
                Way::Address(VsockAddress::Socket(path)) => dial_device(path, port).await,
            }
        };
        timeout(DIAL, dial).await.map_err(|_| {
            io::Error::new(
                io::ErrorKind::TimedOut,
                format!("the guest does not answer at vsock port {port}"),
            )
        })?
    }
}

/// A connection that is closed before the guest has answered ends the device's worker, once the guest does (`VSOCK_OP_RESPONSE` in
/// vhost-device-vsock's vsock_conn.rs), and with it all others. So one that is given up stays open until then, or until the device's end.
async fn dial_device(path: &Path, port: u32) -> io::Result<VsockStream> {
    let connection = connect_at(path)?;
    connection.set_nonblocking(true)?;
    let mut stream = UnixStream::from_std(connection)?;
    let dialed = tokio::spawn(async move {
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        answered(&mut stream, port).await?;
        Ok(VsockStream::from(stream))
    });
    dialed.await.map_err(io::Error::other)?
}

/// Takes the device's word that there is a connection.
async fn answered(stream: &mut UnixStream, port: u32) -> io::Result<()> {
    // Byte by byte: what follows the answer belongs to the caller.
    let mut answer = Vec::with_capacity(ANSWER_MAX);
    while !answer.ends_with(b"\n") {
        if answer.len() == ANSWER_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the vsock device's answer does not end",
            ));
        }
        match stream.read_u8().await {
            Ok(byte) => answer.push(byte),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionRefused,
                    format!("nobody listens at vsock port {port} of the guest"),
                ));
            }
            Err(error) => return Err(error),
        }
    }
    if answer.starts_with(b"OK ") {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the vsock device does not answer OK",
        ))
    }
}

/// A connection with the guest.
#[derive(Debug)]
pub struct VsockStream(Stream);

#[derive(Debug)]
enum Stream {
    Unix(UnixStream),
    Vsock(tokio_vsock::VsockStream),
    Multiplexed(MuxStream),
}

impl From<UnixStream> for VsockStream {
    fn from(stream: UnixStream) -> Self {
        Self(Stream::Unix(stream))
    }
}

impl AsyncRead for VsockStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Vsock(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Multiplexed(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for VsockStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().0 {
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Vsock(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Multiplexed(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Vsock(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Multiplexed(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().0 {
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Vsock(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Multiplexed(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A device that answers one connection with `answer`.
    fn device(answer: &'static [u8]) -> (tempfile::TempDir, VsockDialer) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("guest");
        let listener = UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = [0; 13];
            stream.read_exact(&mut asked).await.unwrap();
            assert_eq!(&asked, b"CONNECT 1024\n");
            stream.write_all(answer).await.unwrap();
        });
        (root, VsockDialer::new(VsockAddress::Socket(path)))
    }

    #[tokio::test]
    async fn what_follows_the_answer_is_the_callers() {
        let (_root, dialer) = device(b"OK 1024\nhello");
        let mut text = String::new();
        dialer
            .dial(1024)
            .await
            .unwrap()
            .read_to_string(&mut text)
            .await
            .unwrap();
        assert_eq!(text, "hello");
    }

    #[tokio::test]
    async fn a_connection_that_is_given_up_stays_open_until_it_is_answered() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("guest");
        let listener = UnixListener::bind(&path).unwrap();
        let dialer = VsockDialer::new(VsockAddress::Socket(path));
        let given_up = timeout(Duration::from_millis(1), dialer.dial(1024)).await;
        assert!(given_up.is_err());
        let (mut device, _) = listener.accept().await.unwrap();
        device.read_exact(&mut [0; 13]).await.unwrap();
        let silence = timeout(Duration::from_millis(50), device.read_u8()).await;
        assert!(silence.is_err(), "it is closed: {silence:?}");
        device.write_all(b"OK 1024\n").await.unwrap();
        let closed = timeout(DIAL, device.read_u8()).await.unwrap();
        assert_eq!(closed.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_port_without_a_listener_refuses() {
        let (_root, dialer) = device(b"");
        assert_eq!(
            dialer.dial(1024).await.unwrap_err().kind(),
            io::ErrorKind::ConnectionRefused
        );
    }

    #[tokio::test]
    async fn an_answer_without_end_is_refused() {
        let (_root, dialer) = device(&[b'x'; 100]);
        assert_eq!(dialer.dial(1024).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
