//! Ports of the guest's virtio-serial device: byte streams to the host that need no memory shared with it
//! (Documentation/ABI of drivers/char/virtio_console.c; virtio 1.2, section 5.3).

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

/// Where the kernel lists the ports, each with its name.
const PORTS: &str = "/sys/class/virtio-ports";
/// The host names the ports some moments after the driver has been loaded.
const APPEAR: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(10);

/// Opens the port that the host calls `name`; non-blocking, and for this process alone: a port is open once.
///
/// # Errors
/// When there is no such port, or somebody else has it open.
pub(crate) fn open_port(name: &str) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + APPEAR;
    let device = loop {
        match find(Path::new(PORTS), name) {
            Some(device) => break device,
            None if Instant::now() < deadline => std::thread::sleep(LOOK),
            None => {
                return Err(io::Error::new(
                    io::ErrorKind::NotFound,
                    format!("the machine has no serial port {name}"),
                ));
            }
        }
    };
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    Ok(open(&device, flags, Mode::empty())?)
}

fn find(ports: &Path, name: &str) -> Option<PathBuf> {
    let ports = fs::read_dir(ports).ok()?;
    let mut ports = ports.flatten().map(|port| port.path());
    let port = ports.find(|port| fs::read_to_string(port.join("name")).is_ok_and(|said| said.trim() == name))?;
    Some(Path::new("/dev").join(port.file_name()?))
}

/// An open port, to be read and written by tasks.
#[derive(Debug)]
pub(crate) struct SerialPort(AsyncFd<OwnedFd>);

impl SerialPort {
    /// # Errors
    /// Of [`open_port`].
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        Self::of(open_port(name)?)
    }

    pub(crate) fn of(port: OwnedFd) -> io::Result<Self> {
        // SAFETY: the descriptor is this structure's alone, and open as long as it is.
        Ok(Self(unsafe { AsyncFd::register(port) }?))
    }
}

impl AsyncRead for SerialPort {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.0.poll_read_ready(cx))?;
            let free = buffer.initialize_unfilled();
            if let Ok(count) = ready.try_io(|port| Ok(nix::unistd::read(port, free)?)) {
                buffer.advance(count?);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for SerialPort {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(count) = ready.try_io(|port| Ok(nix::unistd::write(port, bytes)?)) {
                return Poll::Ready(count);
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

impl AsRawFd for SerialPort {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_by_its_name() {
        let ports = tempfile::tempdir().unwrap();
        for (port, name) in [("vport0p1", "other\n"), ("vport0p2", "wanted\n")] {
            fs::create_dir(ports.path().join(port)).unwrap();
            fs::write(ports.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find(ports.path(), "wanted"), Some("/dev/vport0p2".into()));
        assert_eq!(find(ports.path(), "missing"), None);
        assert_eq!(find(Path::new("/nowhere"), "wanted"), None);
    }
}
