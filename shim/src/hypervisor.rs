//! What a pod needs of a virtual machine: a trait, so that the shim's own logic is tried without one.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use coreos_kvm_launcher::{
    agent::AgentClient,
    config::Config,
    machine::Machine,
    vm::{MachineSize, ResizeError, Vm, VmError, VmExit, VmInfo},
};

use crate::{
    bundle,
    error::{ShimError, sentence},
    rootfs::Share,
};

/// Starts machines.
#[async_trait]
pub(crate) trait Hypervisor: Send + Sync {
    /// Answers when the machine's guest is the pod's. Dropped before, it undoes what it has made.
    async fn start(&self, config: &Config, machine: Machine) -> Result<Arc<dyn RunningMachine>, ShimError>;

    /// Removes what there is of a machine, however far its start has come.
    async fn remove(&self, record: &bundle::Record) -> Result<(), ShimError>;
}

/// A machine whose agent answers.
pub(crate) trait RunningMachine: SandboxProcess {
    fn agent(&self) -> &AgentClient;
    /// What there is to say of it.
    fn info(&self) -> VmInfo;
    /// What the guest sees at `coreos_kvm_proto::SHARED_MOUNT`.
    fn share(&self) -> Share;
}

/// What containerd takes for the process of a pod's sandbox: a machine, or what stands for it until it is there.
#[async_trait]
pub(crate) trait SandboxProcess: Send + Sync {
    /// QEMU's process id: to containerd it is that of every process of the pod, for those inside have none on the host.
    fn pid(&self) -> u32;
    /// Waits for the machine's end, however it comes about.
    async fn exited(&self) -> VmExit;
    /// Ends the machine, and frees what it held.
    async fn shutdown(&self, grace: Duration) -> Result<(), ShimError>;
    async fn pause(&self) -> Result<(), ShimError>;
    async fn resume(&self) -> Result<(), ShimError>;
    /// See [`Vm::grow`].
    async fn grow(&self, wanted: MachineSize) -> Result<(), ShimError>;
    /// See [`Vm::shrink`].
    async fn shrink(&self, wanted: MachineSize) -> Result<(), ShimError>;
}

/// QEMU.
pub(crate) struct Qemu;

#[async_trait]
impl Hypervisor for Qemu {
    async fn start(&self, config: &Config, machine: Machine) -> Result<Arc<dyn RunningMachine>, ShimError> {
        match Vm::start(config, machine).await {
            Ok(vm) => Ok(Arc::new(vm)),
            Err(error @ (VmError::Machine(_) | VmError::Provision(_) | VmError::Carriage(_))) => {
                Err(ShimError::invalid(error))
            }
            Err(VmError::Sandbox(error)) => Err(error.into()),
            Err(error) => Err(ShimError::Internal(sentence(&error))),
        }
    }

    async fn remove(&self, record: &bundle::Record) -> Result<(), ShimError> {
        record.end_machine().await
    }
}

impl RunningMachine for Vm {
    fn agent(&self) -> &AgentClient {
        Vm::agent(self)
    }

    fn info(&self) -> VmInfo {
        Vm::info(self)
    }

    fn share(&self) -> Share {
        Share {
            points: self.mount_points_dir(),
            shared: self.shared_dir(),
        }
    }
}

#[async_trait]
impl SandboxProcess for Vm {
    fn pid(&self) -> u32 {
        Vm::pid(self)
    }

    async fn exited(&self) -> VmExit {
        Vm::exited(self).await
    }

    async fn shutdown(&self, grace: Duration) -> Result<(), ShimError> {
        Vm::shutdown(self, grace)
            .await
            .map_err(|error| ShimError::Internal(sentence(&error)))
    }

    async fn pause(&self) -> Result<(), ShimError> {
        Vm::pause(self)
            .await
            .map_err(ShimError::while_doing("halting the machine"))
    }

    async fn resume(&self) -> Result<(), ShimError> {
        Vm::resume(self)
            .await
            .map_err(ShimError::while_doing("letting the machine go on"))
    }

    async fn grow(&self, wanted: MachineSize) -> Result<(), ShimError> {
        Vm::grow(self, wanted).await.map(drop).map_err(|error| match error {
            ResizeError::Processors { .. } | ResizeError::Memory { .. } => ShimError::invalid(error),
            ResizeError::Fixed | ResizeError::NoPlace | ResizeError::Paused => {
                ShimError::FailedPrecondition(sentence(&error))
            }
            error => ShimError::while_doing("giving the machine another size")(error),
        })
    }

    async fn shrink(&self, wanted: MachineSize) -> Result<(), ShimError> {
        let shrunk = Vm::shrink(self, wanted).await;
        shrunk.map(drop).map_err(ShimError::while_doing(
            "taking back from the machine what it does not need",
        ))
    }
}
