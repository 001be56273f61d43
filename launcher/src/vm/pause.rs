//! Halting a machine, and letting it go on.
//!
//! QEMU halts a guest when it is told to, and its devices with it. A vsock device that is a process of its own does not bear that: whatever
//! comes from the host while its rings are stopped, be it the end of a connection, ends its worker (`VringEpollHandler::run` in
//! vhost-user-backend's event_loop.rs), and with it all connections there are and will be. There QEMU as a whole is stopped instead: the rings
//! stay as they are, and what the host says waits in the guest's memory.

use std::{io, sync::atomic::Ordering};

use nix::sys::signal::Signal;

use super::Vm;
use crate::{qemu::qmp::QmpError, state::VsockAddress};

/// The machine does not do it.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error("sending {signal} to QEMU failed")]
    Signal { signal: Signal, source: io::Error },
    #[error("QEMU has ended")]
    Ended,
}

impl Vm {
    /// Halts the guest's processors.
    ///
    /// # Errors
    /// When QEMU does not do it.
    pub async fn pause(&self) -> Result<(), PauseError> {
        if self.has_a_vsock_process() {
            self.signal(Signal::SIGSTOP)?;
        } else {
            self.qmp.stop().await?;
        }
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Lets them go on. The guest's clock is set soon after, where it has stood still.
    ///
    /// # Errors
    /// When QEMU does not do it.
    pub async fn resume(&self) -> Result<(), PauseError> {
        if self.has_a_vsock_process() {
            self.signal(Signal::SIGCONT)?;
        } else {
            self.qmp.cont().await?;
        }
        self.paused.store(false, Ordering::Relaxed);
        self.resumed.notify_one();
        Ok(())
    }

    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    fn has_a_vsock_process(&self) -> bool {
        matches!(self.record.vsock, Some(VsockAddress::Socket(_)))
    }

    fn signal(&self, signal: Signal) -> Result<(), PauseError> {
        match self.qemu.id().signal(signal) {
            Ok(true) => Ok(()),
            Ok(false) => Err(PauseError::Ended),
            Err(source) => Err(PauseError::Signal { signal, source }),
        }
    }
}
