//! Port-forward: containerd connects to the loopback of the pod's network namespace, and the connection goes on to the guest's.

use std::{io, path::Path, sync::Arc};

use coreos_kvm_launcher::loopback::{Loopback, LoopbackError};
use coreos_kvm_proto::carry::carry;
use nix::sys::socket::{setsockopt, sockopt::Linger};
use tokio::{net::TcpStream, task::JoinSet, time::Duration};

use crate::hypervisor::RunningMachine;

/// At a time; what goes beyond is closed at once.
const CONNECTIONS_MAX: usize = 256;
/// Pause after a connection that could not be taken: most often this process has too many files open.
const AGAIN: Duration = Duration::from_millis(100);

/// Carries the connections until the machine ends.
///
/// # Errors
/// When the kernel does not give this process the connections of the namespace's loopback.
pub(crate) async fn start(machine: Arc<dyn RunningMachine>, netns: &Path) -> Result<(), LoopbackError> {
    let loopback = Loopback::take(netns).await?;
    tokio::spawn(async move {
        tokio::select! {
            _ = machine.exited() => {}
            () = serve(&machine, &loopback) => {}
        }
    });
    Ok(())
}

async fn serve(machine: &Arc<dyn RunningMachine>, loopback: &Loopback) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = loopback.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((connection, port)) if connections.len() < CONNECTIONS_MAX => {
                connections.spawn(forward(machine.clone(), connection, port));
            }
            Ok((_, port)) => tracing::warn!(port, "too many connections to the pod's loopback: one is closed"),
            Err(error) => {
                tracing::warn!(%error, "a connection to the pod's loopback could not be taken");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn forward(machine: Arc<dyn RunningMachine>, connection: TcpStream, port: u16) {
    let stream = match machine.agent().forward(port).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(port, %error, "a connection to the pod's loopback leads nowhere");
            return reset(&connection).unwrap_or_default();
        }
    };
    // What is said in small pieces is to arrive in time.
    let _ = connection.set_nodelay(true);
    if let Err(error) = carry(connection, stream).await {
        tracing::debug!(port, %error, "a forwarded connection ended early");
    }
}

/// Has the connection end in a way that is no answer: socket(7), SO_LINGER.
fn reset(connection: &TcpStream) -> io::Result<()> {
    let linger = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    Ok(setsockopt(connection, Linger, &linger)?)
}
