//! The door of the Task API: the OCI specification that containerd wrote for the sandbox, with what the CRI plugin says of the pod in
//! its annotations. It is the only one where a container is a pod of its own.

use coreos_kvm_launcher::machine::Network;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

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
///
/// A sandbox with such a one is containerd 1.7's way to a pod in a user namespace: it takes the namespace of the sandbox's process for the
/// pod's, and has the CNI furnish it then (`internal/cri: simplify netns setup with pinned userns`, containerd's pull request 10607). That
/// process is QEMU, in the node's own network.
fn network(spec: &Spec) -> Result<Network, ShimError> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces
        .into_iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match network.map(|namespace| namespace.path()) {
        Some(Some(netns)) => Ok(Network::Tap {
            netns: netns.clone(),
            redirects: Vec::new(),
        }),
        Some(None) if role(spec) == Role::Sandbox => Err(ShimError::InvalidArgument(
            "the pod's machine is to run before its network is there, as containerd 1.7 has it for a pod in a user namespace: \
             take containerd 2.0 or later, or remove `hostUsers: false`"
                .to_owned(),
        )),
        Some(None) => Ok(Network::None),
        None => Err(super::of_the_node()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::podspec::tests::spec;

    #[test]
    fn a_network_that_is_there_only_later_is_refused() {
        let mut text = serde_json::to_value(spec(json!({CONTAINER_TYPE: "sandbox"}))).unwrap();
        text["linux"]["namespaces"] = json!([{"type": "network"}]);
        let of_oci = |text: &serde_json::Value| PodSpec::of_oci("abc", &serde_json::from_value(text.clone()).unwrap());
        let error = of_oci(&text).unwrap_err().to_string();
        assert!(error.contains("containerd 2.0"), "{error}");
        text["annotations"] = json!({});
        assert_eq!(of_oci(&text).unwrap().network, Network::None);
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
