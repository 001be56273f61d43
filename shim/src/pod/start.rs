//! The start of a pod's machine, and its end when the pod is not to be.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use coreos_kvm_launcher::{config::Config, machine::Network, state::ProcessId};
use tokio_util::sync::CancellationToken;

use super::{Pod, WantedSandbox};
use crate::{
    bundle, containerd,
    error::{ShimError, sentence},
    facts::Facts,
    hypervisor::RunningMachine,
    logging,
    podspec::PodSpec,
    portforward,
    volume::EmptyDirs,
};

impl Pod {
    /// Starts the pod's machine, unless nobody waits for it any more: a start that is dropped undoes itself.
    pub(super) async fn booted(
        &self,
        wanted: &WantedSandbox,
        given_up: &CancellationToken,
    ) -> Result<Arc<dyn RunningMachine>, ShimError> {
        tokio::select! {
            biased;
            () = self.closing.cancelled() => {
                Err(ShimError::FailedPrecondition("the pod is being removed".to_owned()))
            }
            () = given_up.cancelled() => {
                Err(ShimError::Internal("containerd has given up the machine's start".to_owned()))
            }
            machine = self.boot(wanted) => machine,
        }
    }

    /// Starts the pod's machine.
    async fn boot(&self, wanted: &WantedSandbox) -> Result<Arc<dyn RunningMachine>, ShimError> {
        {
            let contents = self.contents();
            // Another container that is being created may be starting the machine.
            if contents.machine.is_some() || contents.containers.len() > 1 {
                return Err(ShimError::AlreadyExists("the pod has a machine already".to_owned()));
            }
        }
        let (pod, bundle) = (&wanted.pod, Path::new(&wanted.bundle));
        let config = wanted.config.as_ref().or(self.config.as_ref());
        let config = Config::load_or_default(config.map(PathBuf::as_path)).map_err(ShimError::invalid)?;
        logging::set_level(config.log_level);
        let machine = pod.machine(&config)?;
        let netns = match &machine.network {
            Network::Tap { netns, .. } => Some(netns.clone()),
            _ => None,
        };
        let files = pod.files.as_ref().map(|files| files.write(&bundle::work(bundle)));
        let files = files.transpose()?;
        let record = bundle::Record {
            machine: machine.id.to_string(),
            state_dir: config.state_dir.clone(),
            shim: ProcessId::of(std::process::id()),
        };
        record.write(bundle)?;

        self.contents().booting = Some(record);
        let (machine, ports) = tokio::join!(self.hypervisor.start(&config, machine), self.ports(pod));
        let machine = machine.inspect_err(|_| self.contents().booting = None)?;
        if let Some(netns) = netns
            && let Err(error) = portforward::start(machine.clone(), &netns).await
        {
            // All else works.
            tracing::warn!(
                sandbox_id = pod.id,
                error = sentence(&error),
                "port-forward will not work"
            );
        }
        tracing::info!(
            sandbox_id = pod.id,
            qemu = machine.pid(),
            ports,
            "the pod's machine is up"
        );
        let mut contents = self.contents();
        (contents.machine, contents.booting) = (Some(machine.clone()), None);
        contents.guest_memory_overhead_mib = config.guest_memory_overhead_mib;
        contents.size_is_named = pod.names_size();
        contents.files = files;
        contents.users = pod.users;
        if let Some(own) = EmptyDirs::of(&config.kubelet_dir, &pod.uid) {
            self.volumes.own(own);
        }
        Ok(machine)
    }

    /// The pod's ports, for the log. In a machine that has the pod's addresses every port is the pod's, and those that the
    /// node forwards are the CNI's: nothing has to be done for them, so not knowing them is no failure.
    async fn ports(&self, pod: &PodSpec) -> String {
        let asked = match (&pod.ports, &self.containerd) {
            (Some(ports), _) => Ok(ports.clone()),
            (None, Some(containerd)) => containerd.ports(&pod.id).await,
            (None, None) => Ok(Vec::new()),
        };
        match asked {
            Ok(ports) => containerd::list(&ports),
            Err(error) => {
                tracing::warn!(sandbox_id = pod.id, %error, "containerd does not tell the pod's ports");
                String::new()
            }
        }
    }

    /// Has containerd know what the machine is, for whoever looks at the sandbox. Nobody waits for it.
    pub(super) fn tell(&self, id: &str, machine: &Arc<dyn RunningMachine>) {
        let (containerd, id) = (self.containerd.clone(), id.to_owned());
        let annotations = Facts::of(&machine.info()).annotations();
        if let Some(containerd) = containerd {
            tokio::spawn(async move {
                if let Err(error) = containerd.annotate(&id, &annotations).await {
                    let error = sentence(&error);
                    tracing::warn!(
                        sandbox_id = id,
                        error,
                        "`crictl inspectp` will not tell what the machine is"
                    );
                }
            });
        }
    }

    pub(super) async fn give_up(&self, machine: &Arc<dyn RunningMachine>) {
        self.contents().machine = None;
        if let Err(error) = machine.shutdown(Duration::ZERO).await {
            tracing::error!(%error, "the machine of a pod that is not to be could not be removed");
        }
    }
}
