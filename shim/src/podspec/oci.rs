//! The door of the Task API: the OCI specification that containerd wrote for the sandbox, with what the CRI plugin says of the pod in
//! its annotations. It is the only one where a container is a pod of its own.

use coreos_kvm_launcher::machine::Network;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::{PodSpec, own_annotations};
use crate::{error::ShimError, limits::Limits, userns::UserNamespace};

/// What the CRI plugin writes; `pkg/cri/annotations` in containerd's tree.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
pub(super) const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
pub(super) const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
pub(super) const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
pub(super) const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The CRI's sandbox: the machine itself. Its image and its process are not run.
    Sandbox,
    /// A container of a pod whose machine runs already.
    Member,
    /// A container that nobody calls part of a pod, as `ctr run` makes them: a pod of its own.
    Alone,
}

/// What the specification says of the container's pod.
pub(crate) fn role(spec: &Spec) -> Role {
    match annotation(spec, CONTAINER_TYPE) {
        Some("sandbox") => Role::Sandbox,
        Some("container") => Role::Member,
        _ => Role::Alone,
    }
}

/// The id of the container's pod, if there is one.
pub(crate) fn sandbox_id(spec: &Spec) -> Option<&str> {
    annotation(spec, SANDBOX_ID)
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str)
}

impl PodSpec {
    /// The pod whose sandbox, or only container, is `id`.
    ///
    /// # Errors
    /// When it is to be on the node's own network, or in a user namespace that cannot be.
    pub(crate) fn of_oci(id: &str, spec: &Spec) -> Result<Self, ShimError> {
        let linux = spec.linux().as_ref();
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_ref());
        // What the kubelet has not set is zero, or not there.
        let limit = |name| annotation(spec, name).and_then(|limit| limit.parse().ok()).unwrap_or(0);
        Ok(Self {
            id: id.to_owned(),
            hostname: spec.hostname().clone(),
            uid: annotation(spec, SANDBOX_UID).unwrap_or_default().to_owned(),
            annotations: own_annotations(spec.annotations().iter().flatten()),
            limits: Limits::of_pod(
                limit(SANDBOX_CPU_QUOTA),
                limit(SANDBOX_CPU_PERIOD),
                limit(SANDBOX_MEMORY),
            ),
            cgroups_path: cgroups_path.map(|path| path.to_string_lossy().into_owned()),
            network: network(spec)?,
            sysctls: linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default(),
            users: UserNamespace::of_oci(spec)?,
            ports: None,
            files: None,
        })
    }
}

/// The network namespace that the CNI has furnished for the pod; a namespace without a path is a new and empty one.
fn network(spec: &Spec) -> Result<Network, ShimError> {
    match network_namespace(spec).map(LinuxNamespace::path) {
        Some(Some(netns)) => Ok(Network::Tap {
            netns: netns.clone(),
            redirects: Vec::new(),
        }),
        Some(None) => Ok(Network::None),
        None => Err(super::of_the_node()),
    }
}

/// A sandbox's network namespace is to be that of its process, and the CNI furnishes it before the sandbox starts.
pub(crate) fn has_network_later(spec: &Spec) -> bool {
    network_namespace(spec).is_some_and(|namespace| namespace.path().is_none())
}

fn network_namespace(spec: &Spec) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces
        .iter()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::podspec::tests::spec;

    #[test]
    fn a_network_is_there_or_comes_later() {
        let mut text = serde_json::to_value(spec(json!({CONTAINER_TYPE: "sandbox"}))).unwrap();
        let mut of_oci = |namespace| {
            text["linux"]["namespaces"] = json!([namespace]);
            let spec = serde_json::from_value(text.clone()).unwrap();
            (has_network_later(&spec), PodSpec::of_oci("abc", &spec).unwrap().network)
        };
        assert_eq!(of_oci(json!({"type": "network"})), (true, Network::None));
        let (later, network) = of_oci(json!({"type": "network", "path": "/run/netns/a"}));
        assert!(!later && matches!(network, Network::Tap { .. }));
    }

    #[test]
    fn the_nodes_network_is_refused() {
        let mut spec = spec(json!({}));
        let mut linux = spec.linux().clone().unwrap();
        linux.set_namespaces(None);
        spec.set_linux(Some(linux));
        let error = PodSpec::of_oci("abc", &spec).unwrap_err().to_string();
        assert!(error.contains("hostNetwork"), "{error}");
    }
}
