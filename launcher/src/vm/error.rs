//! Why a machine did not come up.

use std::{io, path::PathBuf, time::Duration};

use tokio::task::JoinError;

use super::DestroyError;
use crate::{
    accel::AccelError,
    agent::AgentError,
    carriage::CarriageError,
    cgroup::CgroupError,
    disk::DiskError,
    forward::ForwardError,
    machine::MachineError,
    netdev::NetdevError,
    process::ProcessError,
    provision::ProvisionError,
    qemu::{program::QemuError, qmp::QmpError},
    share_server::ShareError,
    state::StateError,
    template::TemplateError,
    user::UserError,
    virtiofs::VirtioFsError,
    vsock::{GreetingError, VsockError},
};

/// A machine did not come up. What was made for it is gone again.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Provision(#[from] ProvisionError),
    #[error(transparent)]
    Carriage(#[from] CarriageError),
    #[error(transparent)]
    Forward(#[from] ForwardError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Acceleration(#[from] AccelError),
    #[error(transparent)]
    Qemu(#[from] QemuError),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Network(#[from] NetdevError),
    #[error(transparent)]
    Vsock(#[from] VsockError),
    #[error(transparent)]
    VirtioFs(#[from] VirtioFsError),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Greeting(#[from] GreetingError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// What its pod wants cannot be; a clone is not to blame.
    #[error(transparent)]
    Sandbox(AgentError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("no template can be made of this machine: {0}")]
    NoTemplate(String),
    #[error("the template's guest said something else than that it can be saved: {0}")]
    NoSleep(String),
    #[error("{what} failed")]
    Io {
        what: String,
        #[source]
        source: io::Error,
    },
    #[error("the agent's disk {} is missing; `devtool build` makes it, `agent_disk` in the configuration names it", path.display())]
    AgentDisk { path: PathBuf },
    #[error("QEMU may not use KVM: {0}")]
    Kvm(String),
    #[error("the guest did not come up within {} s; its console's last lines: {console}", timeout.as_secs())]
    Timeout { timeout: Duration, console: String },
    #[error("the guest ended before its agent answered: {reason}; its console's last lines: {console}")]
    Ended { reason: String, console: String },
    #[error("the start was given up")]
    Cancelled,
    #[error(transparent)]
    Destroy(#[from] DestroyError),
}

impl VmError {
    /// A guest that cannot be made its pod's. One that does not answer may be a clone that is no good.
    pub(super) fn of_sandbox(error: AgentError) -> Self {
        if error.is_silence() {
            Self::Agent(error)
        } else {
            Self::Sandbox(error)
        }
    }

    /// Whether it may be the clone's, and the machine come up when it boots. What else there is, such as a missing program or a full
    /// disk, would be in the way of a boot as well.
    pub(super) fn may_be_the_clones(&self) -> bool {
        matches!(
            self,
            Self::Template(_)
                | Self::NoTemplate(_)
                | Self::Share(_)
                | Self::Process(_)
                | Self::Qmp(_)
                | Self::Ended { .. }
                | Self::Timeout { .. }
                | Self::Greeting(_)
                | Self::Agent(_)
        )
    }

    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(super) fn task(error: JoinError) -> Self {
        Self::io("the machine's start")(io::Error::other(error))
    }
}
