//! The door of the Sandbox API: the `PodSandboxConfig` of the CRI, as the kubelet sent it. Of its annotations containerd holds back
//! none here, so the node's `config.toml` alone decides which of them a pod may use.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use coreos_kvm_launcher::machine::Network;
use k8s_cri::v1::{NamespaceMode, PodSandboxConfig, PortMapping};
use prost::Message;

use super::{PodSpec, own_annotations};
use crate::{
    containerd::Port,
    error::ShimError,
    limits::Limits,
    podfiles::PodFiles,
    userns::{self, UserNamespace},
};

/// Its name, by which containerd marks it (`runtime.v1` of `cri-api`).
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// What containerd allows in the network namespace of a pod that says nothing of it, unless its own configuration, which nobody here
/// knows, says otherwise: `enable_unprivileged_ports` and `enable_unprivileged_icmp` of its CRI plugin.
const SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// The pod's configuration that comes with a sandbox.
///
/// # Errors
/// When there is none, or it cannot be read.
pub(crate) fn sandbox_config(options: Option<&Any>) -> Result<PodSandboxConfig, ShimError> {
    let Some(any) = options.filter(|any| any.type_url.ends_with(TYPE)) else {
        return Err(ShimError::InvalidArgument(format!(
            "a sandbox is made by the configuration of a pod, {TYPE}, and comes with {}",
            options.map_or("nothing", |any| &any.type_url)
        )));
    };
    PodSandboxConfig::decode(any.value.as_slice())
        .map_err(|error| ShimError::InvalidArgument(format!("the pod's configuration cannot be read: {error}")))
}

impl PodSpec {
    /// The pod whose sandbox is `id`, in the network namespace that the CNI has furnished for it.
    ///
    /// # Errors
    /// When it is to be on the node's own network or in a user namespace that cannot be, or has names of servers that are none.
    pub(crate) fn of_cri(id: &str, config: &PodSandboxConfig, netns: &str) -> Result<Self, ShimError> {
        if netns.is_empty() {
            return Err(super::of_the_node());
        }
        let linux = config.linux.clone().unwrap_or_default();
        let resources = linux.resources.unwrap_or_default();
        let namespaces = linux.security_context.and_then(|context| context.namespace_options);
        let users = namespaces.as_ref().and_then(|options| options.userns_options.as_ref());
        let users = UserNamespace::of_cri(users)?;
        if users.is_some() && namespaces.is_some_and(|options| options.pid() == NamespaceMode::Node) {
            return Err(userns::among_the_nodes_processes());
        }
        let mut sysctls = linux.sysctls;
        for (name, value) in SYSCTLS {
            sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
        Ok(Self {
            id: id.to_owned(),
            hostname: Some(config.hostname.clone()).filter(|name| !name.is_empty()),
            uid: config.metadata.clone().unwrap_or_default().uid,
            annotations: own_annotations(&config.annotations),
            limits: Limits::of_pod(
                resources.cpu_quota,
                resources.cpu_period,
                resources.memory_limit_in_bytes,
            ),
            cgroups_path: cgroups_path(&linux.cgroup_parent, id),
            network: Network::Tap {
                netns: netns.into(),
                redirects: Vec::new(),
            },
            sysctls,
            ports: Some(config.port_mappings.iter().map(port).collect()),
            files: Some(PodFiles::of(config, users)?),
            users,
        })
    }
}

/// Where containerd's own sandboxes are below the pod's cgroup: `getCgroupsPath` in `internal/cri/server` of its tree.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    match parent.trim_end_matches('/') {
        "" => None,
        slice if slice.ends_with(".slice") => {
            let name = slice.rsplit('/').next().unwrap_or(slice);
            Some(format!("{name}:cri-containerd:{id}"))
        }
        path => Some(format!("{path}/{id}")),
    }
}

/// Numbers that are no ports are none.
fn port(mapping: &PortMapping) -> Port {
    let number = |number: i32| number.try_into().unwrap_or(0);
    Port {
        protocol: mapping.protocol.try_into().unwrap_or(u32::MAX),
        container_port: number(mapping.container_port),
        host_port: number(mapping.host_port),
        host_ip: mapping.host_ip.clone(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use k8s_cri::v1::{
        DnsConfig, IdMapping, LinuxContainerResources, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
        NamespaceOption, PodSandboxMetadata,
    };
    use rstest::rstest;
    use serde_json::json;

    use super::{
        super::oci::{SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_MEMORY, SANDBOX_UID},
        *,
    };
    use crate::{containerd, podspec::tests::spec};

    const NETNS: &str = "/var/run/netns/cni-1";

    /// A configuration as a kubelet sends it, of the pod that [`spec`] has.
    pub(crate) fn config() -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "web-0".to_owned(),
                uid: "a-uid".to_owned(),
                ..Default::default()
            }),
            hostname: "web-0".to_owned(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kubepods/pod1".to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_is_the_same_by_either_door() {
        let mut config = config();
        config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 250_000,
            memory_limit_in_bytes: 128 << 20,
            ..Default::default()
        });
        config.annotations = [
            ("coreos-kvm.io/config-inline", "{}"),
            ("coreos-kvm.io/vcpus", "2"),
            ("example.com/other", "not for this runtime"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let mut by_cri = PodSpec::of_cri("abc", &config, NETNS).unwrap();
        let by_oci = PodSpec::of_oci(
            "abc",
            &spec(json!({
                SANDBOX_UID: "a-uid",
                SANDBOX_CPU_PERIOD: "100000",
                SANDBOX_CPU_QUOTA: "250000",
                SANDBOX_MEMORY: (128 << 20).to_string(),
                "coreos-kvm.io/config-inline": "{}",
                "coreos-kvm.io/vcpus": "2",
                "example.com/other": "not for this runtime",
            })),
        )
        .unwrap();
        // What containerd does by the other door, or is asked for.
        assert_eq!(by_cri.ports.take(), Some(Vec::new()));
        assert!(by_cri.files.take().is_some());
        assert_eq!(
            by_cri.sysctls.remove("net.ipv4.ping_group_range").unwrap(),
            "0 2147483647"
        );
        assert_eq!(by_cri, by_oci);
    }

    #[test]
    fn what_the_pod_calls_its_own_annotations_does_not_make_it_another() {
        let mut config = config();
        config.annotations = [(SANDBOX_UID, "another's"), (SANDBOX_MEMORY, "1073741824")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let pod = PodSpec::of_cri("abc", &config, NETNS).unwrap();
        assert_eq!((pod.uid.as_str(), pod.limits), ("a-uid", Limits::default()));
        assert!(pod.annotations.is_empty());
    }

    #[test]
    fn a_pod_may_be_in_a_user_namespace_and_then_not_among_the_nodes_processes() {
        let mut config = config();
        let line = |host_id| {
            vec![IdMapping {
                host_id,
                container_id: 0,
                length: 65536,
            }]
        };
        let mut options = NamespaceOption {
            pid: NamespaceMode::Container.into(),
            userns_options: Some(k8s_cri::v1::UserNamespace {
                mode: NamespaceMode::Pod.into(),
                uids: line(65536),
                gids: line(131_072),
            }),
            ..Default::default()
        };
        let mut pod = |options: &NamespaceOption| {
            config.linux.as_mut().unwrap().security_context = Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options.clone()),
                ..Default::default()
            });
            PodSpec::of_cri("abc", &config, NETNS)
        };
        assert_eq!(pod(&options).unwrap().users, Some(crate::userns::tests::USERS));
        options.pid = NamespaceMode::Node.into();
        let error = pod(&options).unwrap_err().to_string();
        assert!(error.contains("remove hostPID"), "{error}");
    }

    #[test]
    fn what_the_pod_says_of_its_network_stays() {
        let mut config = config();
        let sysctls = &mut config.linux.as_mut().unwrap().sysctls;
        sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned());
        let pod = PodSpec::of_cri("abc", &config, NETNS).unwrap();
        assert_eq!(pod.identity().sysctls["net.ipv4.ip_unprivileged_port_start"], "80");
        let mapping = |protocol, container_port, host_port| PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip: String::new(),
        };
        config.port_mappings = vec![mapping(0, 8080, 18080), mapping(1, 53, 0), mapping(-1, -1, 70_000)];
        let ports = PodSpec::of_cri("abc", &config, NETNS).unwrap().ports.unwrap();
        assert_eq!(containerd::list(&ports), "18080->8080/tcp, 53/udp, 0/?");
    }

    #[rstest]
    #[case("", None)]
    #[case("/kubepods/pod1/", Some("/kubepods/pod1/abc"))]
    #[case(
        "/kubepods.slice/kubepods-pod1.slice",
        Some("kubepods-pod1.slice:cri-containerd:abc")
    )]
    fn the_machine_is_in_the_pods_cgroup(#[case] parent: &str, #[case] path: Option<&str>) {
        assert_eq!(cgroups_path(parent, "abc").as_deref(), path);
    }

    #[test]
    fn what_is_no_pod_is_refused() {
        let any = |name: &str, value: &[u8]| Any {
            type_url: name.to_owned(),
            value: value.to_owned(),
            ..Default::default()
        };
        let refused = |options: Option<&Any>| sandbox_config(options).unwrap_err().to_string();
        assert!(refused(None).contains("comes with nothing"));
        assert!(refused(Some(&any("runtimeoptions.v1.Options", b""))).contains("runtimeoptions.v1.Options"));
        assert!(refused(Some(&any(TYPE, b"\xff"))).contains("cannot be read"));
        let value = config().encode_to_vec();
        assert_eq!(sandbox_config(Some(&any(TYPE, &value))).unwrap(), config());

        let error = PodSpec::of_cri("abc", &config(), "").unwrap_err().to_string();
        assert!(error.contains("hostNetwork"), "{error}");
        let mut config = config();
        config.dns_config = Some(DnsConfig {
            servers: vec!["10.0.0.1\noptions rotate".to_owned()],
            ..Default::default()
        });
        let error = PodSpec::of_cri("abc", &config, NETNS).unwrap_err().to_string();
        assert!(error.contains("10.0.0.1"), "{error}");
    }
}
