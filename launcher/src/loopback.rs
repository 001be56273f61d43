//! The pod's loopback on the host: whoever connects to a port of it, as `kubectl port-forward` does, means the guest's.
//!
//! The guest owns the pod's addresses, so nobody else uses the network stack of the pod's namespace. One socket there takes the
//! connections to every port of its loopback: a BPF program of type sk_lookup, attached to the namespace, gives them to it
//! (Documentation/bpf/prog_sk_lookup.rst, since Linux 5.9). Which port was meant is the accepted connection's own.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use nix::sched::{CloneFlags, setns};

mod bpf;

/// Connections to the pod's loopback cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LoopbackError {
    #[error("entering the pod's network namespace {} failed", path.display())]
    Namespace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("listening in the pod's network namespace failed")]
    Listen(#[source] io::Error),
    #[error(
        "the kernel does not give the pod's loopback away: BPF programs of the type sk_lookup are needed (Linux 5.9)"
    )]
    Bpf(#[source] io::Error),
    #[error("the thread that works in the pod's network namespace failed")]
    Thread,
}

/// Takes every connection to loopback in a network namespace, as long as it is there.
#[derive(Debug)]
pub struct Loopback {
    listener: tokio::net::TcpListener,
    /// Ends with its descriptor.
    _attached: OwnedFd,
}

impl Loopback {
    /// Begins to take the connections in `netns`.
    ///
    /// # Errors
    /// When the namespace is gone, or the kernel cannot do that.
    pub async fn take(netns: &Path) -> Result<Self, LoopbackError> {
        let path = netns.to_owned();
        let (answer, answered) = tokio::sync::oneshot::channel();
        // Of its own, for it stays in the namespace.
        std::thread::Builder::new()
            .name("netns".to_owned())
            .spawn(move || answer.send(take(&path)))
            .map_err(|_| LoopbackError::Thread)?;
        let (listener, attached) = answered.await.map_err(|_| LoopbackError::Thread)??;
        Ok(Self {
            listener: tokio::net::TcpListener::from_std(listener).map_err(LoopbackError::Listen)?,
            _attached: attached,
        })
    }

    /// The next connection, and the port that it is for.
    ///
    /// # Errors
    /// Of accept(2).
    pub async fn accept(&self) -> io::Result<(tokio::net::TcpStream, u16)> {
        let (connection, _) = self.listener.accept().await?;
        let port = connection.local_addr()?.port();
        Ok((connection, port))
    }
}

fn take(path: &Path) -> Result<(TcpListener, OwnedFd), LoopbackError> {
    let namespace = |source| LoopbackError::Namespace {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(namespace)?;
    setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|error| namespace(error.into()))?;
    // It takes both families. The port that it is at itself does not matter.
    let any = [
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        // Of a kernel without IPv6.
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
    ];
    let listener = TcpListener::bind(any.as_slice()).map_err(LoopbackError::Listen)?;
    listener.set_nonblocking(true).map_err(LoopbackError::Listen)?;
    let attached = bpf::give_loopback_to(listener.as_fd(), file.as_fd()).map_err(LoopbackError::Bpf)?;
    Ok((listener, attached))
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, net::TcpStream, time::Duration};

    use nix::sched::unshare;
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// As root in a network namespace of its own, whose loopback is up.
    #[tokio::test]
    async fn every_port_of_loopback_is_taken() {
        let (ready, path) = std::sync::mpsc::channel();
        let (taken, go_on) = std::sync::mpsc::channel::<()>();
        let client = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace can be made by root alone");
            let status = std::process::Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status();
            assert!(status.unwrap().success());
            ready
                .send(format!("/proc/self/task/{}/ns/net", nix::unistd::gettid()))
                .unwrap();
            go_on.recv().unwrap();
            let ask = |address: &str| {
                let address = address.parse().unwrap();
                let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
                let mut said = String::new();
                connection.read_to_string(&mut said)?;
                io::Result::Ok(said)
            };
            ["127.0.0.1:80", "127.0.0.1:54321", "[::1]:22"].map(|address| ask(address).unwrap())
        });
        let path = PathBuf::from(path.recv().unwrap());
        let loopback = Loopback::take(&path).await.unwrap();
        taken.send(()).unwrap();
        for _ in 0..3 {
            let (mut connection, port) = loopback.accept().await.unwrap();
            connection.write_all(port.to_string().as_bytes()).await.unwrap();
        }
        assert_eq!(client.join().unwrap(), ["80", "54321", "22"]);
    }
}
