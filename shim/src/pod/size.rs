//! The size of a pod's machine, which follows the limits of its containers.

use std::{collections::BTreeMap, sync::Arc};

use coreos_kvm_launcher::vm::MachineSize;
use oci_spec::runtime::{LinuxResources, Spec};

use super::Pod;
use crate::{error::ShimError, hypervisor::RunningMachine, limits::Limits, podspec::Role};

impl Pod {
    /// Changes a container's limits, and with them the size of the machine; those of a sandbox are the pod's. `resources` is the
    /// OCI specification's `linux.resources` as JSON.
    ///
    /// # Errors
    /// When the machine cannot become so large: the limits then stay.
    pub(crate) async fn update(&self, id: &str, resources: &[u8]) -> Result<(), ShimError> {
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| ShimError::InvalidArgument(format!("the limits cannot be read: {error}")))?;
        let container = self.container(id)?;
        if container.has_stopped() {
            return Err(ShimError::NotFound(format!("the container {id} has ended")));
        }
        let machine = container.sandbox_process();
        let _alone = self.resizing.lock().await;
        let (before, wanted) = (
            self.size_with(&[]),
            self.size_with(&[(id, container.limits().changed(&resources))]),
        );
        // What is allowed is there before, and taken away only when it is not allowed any more.
        let updated = match machine.grow(wanted).await {
            Ok(()) => container.update(&resources).await,
            Err(error) => Err(error),
        };
        let needed = if updated.is_ok() { wanted } else { before };
        if let Err(error) = machine.shrink(needed).await {
            tracing::warn!(container_id = id, %error, "the machine keeps what it does not need any more");
        }
        updated
    }

    /// Has the machine grow to what a new container may use beside the others, where the pod was started with less: its limits may
    /// have changed since, or whoever started it did not know of them.
    pub(super) async fn make_room(&self, id: &str, spec: &Spec, machine: &Arc<dyn RunningMachine>) {
        if self.contents().size_is_named {
            return;
        }
        let _alone = self.resizing.lock().await;
        let wanted = self.size_with(&[(id, Limits::of(spec))]);
        if let Err(error) = machine.grow(wanted).await {
            tracing::warn!(container_id = id, %error, "the container may use more than its machine has");
        }
    }

    /// The size for all containers, those of `changes` with these limits.
    fn size_with(&self, changes: &[(&str, Limits)]) -> MachineSize {
        let contents = self.contents();
        let all: BTreeMap<_, _> = contents
            .containers
            .iter()
            .filter_map(|(id, container)| Some((id.as_str(), container.as_ref()?.limits())))
            .chain(changes.iter().copied())
            .collect();
        let is_sandbox = |id: &&str| {
            let container = contents.containers.get(*id).and_then(Option::as_ref);
            container.is_some_and(|container| container.role() == Role::Sandbox)
        };
        let (pod, members): (Vec<_>, Vec<_>) = all.into_iter().partition(|(id, _)| is_sandbox(id));
        let size = |limits: Vec<(&str, Limits)>| {
            let limits = limits.into_iter().map(|(_, limits)| limits);
            Limits::size(limits, contents.guest_memory_overhead_mib)
        };
        let (pod, sum) = (size(pod), size(members));
        MachineSize {
            vcpus: pod.vcpus.max(sum.vcpus),
            memory_mib: pod.memory_mib.max(sum.memory_mib),
        }
    }
}
