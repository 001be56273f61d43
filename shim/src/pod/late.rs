//! The machine of a sandbox that has its network only between its creation and its start, and so starts with it.
//!
//! That is containerd 1.7's way to a pod in a user namespace: it takes the network namespace of the sandbox's process for the pod's, has
//! the CNI furnish it, and notes it in the sandbox's specification (`internal/cri: simplify netns setup with pinned userns`, containerd's
//! pull request 10607).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use coreos_kvm_launcher::vm::{MachineSize, VmExit};
use nix::sched::CloneFlags;
use tokio::sync::SetOnce;
use tokio_util::sync::CancellationToken;

use super::{Pod, WantedSandbox};
use crate::{
    container::Container,
    error::ShimError,
    hypervisor::{RunningMachine, SandboxProcess},
    idler::Idler,
    options,
    podspec::{self, PodSpec},
};

/// A machine that is to be. Until it is, a process that does nothing holds the pod's network namespace.
pub(super) struct LateMachine {
    idler: Mutex<Option<Idler>>,
    /// Of that process.
    pid: u32,
    machine: SetOnce<Arc<dyn RunningMachine>>,
    /// It is not to be any more.
    given_up: CancellationToken,
    /// Held while it is being started.
    starting: tokio::sync::Mutex<()>,
    bundle: String,
    options: Options,
}

/// Those that came with the sandbox's creation.
type Options = protobuf::MessageField<protobuf::well_known_types::any::Any>;

impl LateMachine {
    /// # Errors
    /// When the node has no room for a further process or network namespace.
    pub(super) fn new(bundle: &str, options: Options) -> Result<Self, ShimError> {
        let idler = Idler::start(CloneFlags::CLONE_NEWNET);
        let idler = idler.map_err(ShimError::while_doing("making the pod's network namespace"))?;
        Ok(Self {
            pid: idler.pid(),
            idler: Mutex::new(Some(idler)),
            machine: SetOnce::new(),
            given_up: CancellationToken::new(),
            starting: tokio::sync::Mutex::default(),
            bundle: bundle.to_owned(),
            options,
        })
    }

    fn running(&self) -> Result<&Arc<dyn RunningMachine>, ShimError> {
        let machine = self.machine.get();
        machine.ok_or_else(|| ShimError::FailedPrecondition("the pod's machine does not run yet".to_owned()))
    }

    /// Nothing is to come any more of a machine that is not there yet. Answers when nothing is left of its start either.
    pub(super) async fn give_up(&self) {
        if self.machine.get().is_none() {
            self.given_up.cancel();
        }
        let _over = self.starting.lock().await;
        self.let_go();
    }

    /// Ends the process; the namespace stays if somebody else holds it.
    fn let_go(&self) {
        drop(self.idler.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

#[async_trait]
impl SandboxProcess for LateMachine {
    fn pid(&self) -> u32 {
        self.machine.get().map_or(self.pid, |machine| machine.pid())
    }

    async fn exited(&self) -> VmExit {
        tokio::select! {
            machine = self.machine.wait() => machine.exited().await,
            () = self.given_up.cancelled() => VmExit {
                reason: "it was given up before it was started".to_owned(),
                orderly: false,
                console: Vec::new(),
            },
        }
    }

    async fn shutdown(&self, grace: Duration) -> Result<(), ShimError> {
        self.give_up().await;
        match self.machine.get() {
            Some(machine) => machine.shutdown(grace).await,
            None => Ok(()),
        }
    }

    async fn pause(&self) -> Result<(), ShimError> {
        self.running()?.pause().await
    }

    async fn resume(&self) -> Result<(), ShimError> {
        self.running()?.resume().await
    }

    async fn grow(&self, wanted: MachineSize) -> Result<(), ShimError> {
        self.running()?.grow(wanted).await
    }

    async fn shrink(&self, wanted: MachineSize) -> Result<(), ShimError> {
        self.running()?.shrink(wanted).await
    }
}

impl Pod {
    /// Takes it for the pod's machine.
    pub(super) fn expect(&self, late: &Arc<LateMachine>) -> Result<(), ShimError> {
        let mut contents = self.contents();
        if contents.machine.is_some() || contents.late.is_some() || contents.containers.len() > 1 {
            return Err(ShimError::AlreadyExists("the pod has a machine already".to_owned()));
        }
        contents.late = Some(late.clone());
        Ok(())
    }

    /// Starts a container's init, or a further process in it; answers its pid. With a sandbox starts its machine, if that is late.
    ///
    /// # Errors
    /// When it cannot be, or has ended already.
    pub(crate) async fn start(&self, container: &Arc<Container>, exec_id: &str) -> Result<u32, ShimError> {
        let late = self.contents().late.clone();
        if let Some(late) = late
            && exec_id.is_empty()
            && !container.has_begun()
            && container.is_sandbox()
        {
            self.start_late(&late, container.id()).await?;
        }
        container.start(exec_id).await?;
        Ok(container.pid())
    }

    async fn start_late(&self, late: &LateMachine, id: &str) -> Result<(), ShimError> {
        let _alone = late.starting.lock().await;
        if late.machine.get().is_some() {
            return Ok(());
        }
        let containerd = self.containerd.as_ref().ok_or_else(|| {
            ShimError::FailedPrecondition("the pod's network is not known without containerd".to_owned())
        })?;
        let spec = containerd.spec(id).await?;
        if podspec::has_network_later(&spec) {
            return Err(ShimError::FailedPrecondition(
                "containerd has not noted the pod's network namespace".to_owned(),
            ));
        }
        let wanted = WantedSandbox {
            pod: PodSpec::of_oci(id, &spec)?,
            bundle: late.bundle.clone(),
            config: options::config_path(late.options.as_ref())?,
        };
        let machine = match self.booted(&wanted, &late.given_up).await {
            Ok(machine) => machine,
            Err(error) => {
                // A start that was given up undoes itself meanwhile.
                let booting = self.contents().booting.take();
                if let Some(record) = booting
                    && let Err(error) = self.hypervisor.remove(&record).await
                {
                    tracing::error!(%error, "something of the machine is left");
                }
                return Err(error);
            }
        };
        self.tell(id, &machine);
        // Whoever waits for the machine's end waits for that of this one from now on.
        let _ = late.machine.set(machine);
        // containerd holds the namespace.
        late.let_go();
        Ok(())
    }
}
