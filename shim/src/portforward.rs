//! Port-forward: containerd connects to the loopback of the pod's network namespace, and the connection goes on to the guest's.

use std::{path::Path, sync::Arc};

use coreos_kvm_launcher::loopback::{Loopback, LoopbackError};
use coreos_kvm_proto::carry::carry;
use tokio::{net::TcpStream, task::JoinSet, time::Duration};

use crate::hypervisor::RunningMachine;

/// At a time; what goes beyond is closed at once. A clone has one way for all connections, which execs and logs go by as well.
const CONNECTIONS_MAX: usize = 64;
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
            Ok((connection, port)) => {
                tracing::warn!(port, "too many connections to the pod's loopback: one is closed");
                reset(connection);
            }
            Err(error) => {
                tracing::warn!(%error, "a connection to the pod's loopback could not be taken");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

async fn forward(machine: Arc<dyn RunningMachine>, mut connection: TcpStream, port: u16) {
    let carried = async {
        let mut stream = machine.agent().forward(port).await?;
        // What is said in small pieces is to arrive in time.
        let _ = connection.set_nodelay(true);
        carry(&mut connection, &mut stream).await
    };
    if let Err(error) = carried.await {
        tracing::debug!(port, %error, "a connection to the pod's loopback ends early, or leads nowhere");
        reset(connection);
    }
}

/// Has the connection end in a way that is not taken for its good end.
fn reset(connection: TcpStream) {
    // Then it is a plain end.
    let _ = connection.set_zero_linger();
    drop(connection);
}
