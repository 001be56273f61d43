//! A pod as the kubelet and its author describe it. By whichever door it comes, it is one description, which becomes that of a
//! machine, checked against what the admin allows. The doors: [`oci`] with the Task API, [`cri`] with the Sandbox API.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
};

use coreos_kvm_launcher::{
    cgroup,
    config::{ANNOTATIONS, Config, Templates},
    guest::Guest,
    machine::{Configuration, Growth, Machine, Network},
};
use coreos_kvm_proto::{SHARED_TAG, agent::ConfigureSandboxRequest};

use crate::{
    containerd::Port,
    error::ShimError,
    limits::{self, Limits},
    podfiles::PodFiles,
    userns::UserNamespace,
    volume::VolumeFile,
};

mod cri;
mod oci;

pub(crate) use cri::sandbox_config;
pub(crate) use oci::{Role, has_network_later, role, sandbox_id};

/// What the root of a pod in a user namespace of its own lacks over the network, which is the guest's: ports below 1024, and echo
/// requests (ip(7), icmp(7)). Whoever may have neither is named by the pod's own sysctls.
const SYSCTLS_OF_USERS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

/// Prefix of the annotations by which a pod describes its machine.
const PREFIX: &str = "coreos-kvm.io/";

/// A pod, before anything of it is checked against the node's configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PodSpec {
    /// That of its sandbox, or of its only container.
    pub(crate) id: String,
    hostname: Option<String>,
    /// Kubernetes' own, by which the kubelet keeps the pod's volumes; empty where there is none.
    pub(crate) uid: String,
    /// Its annotations that begin with [`PREFIX`], by what follows it.
    annotations: BTreeMap<String, String>,
    /// What its containers may use together.
    limits: Limits,
    /// As `linux.cgroupsPath` of the OCI runtime specification.
    cgroups_path: Option<String>,
    network: Network,
    sysctls: HashMap<String, String>,
    /// That of all its containers; None: the guest's.
    pub(crate) users: Option<UserNamespace>,
    /// None where containerd has to be asked.
    pub(crate) ports: Option<Vec<Port>>,
    /// None where containerd makes them.
    pub(crate) files: Option<PodFiles>,
}

impl PodSpec {
    /// Whether the pod says itself how large its machine is.
    pub(crate) fn names_size(&self) -> bool {
        ["memory", "vcpus"]
            .iter()
            .any(|name| self.annotations.contains_key(*name))
    }

    /// The pod's machine.
    ///
    /// # Errors
    /// Of what the pod's author wrote, or what a machine cannot do; with the way out.
    pub(crate) fn machine(&self, config: &Config) -> Result<Machine, ShimError> {
        let wishes = Wishes::read(self, config)?;
        // A configuration may do what a clone must not have done before; only its author knows.
        let cloneable = wishes.template.unwrap_or(wishes.configuration.is_none()) && config.templates != Templates::Off;
        let cgroup = self.cgroups_path.as_deref().map(cgroup::directory);
        let cgroup = cgroup.transpose().map_err(ShimError::invalid)?;
        let vcpus = match wishes.vcpus {
            Some(vcpus) => vcpus,
            None => self.vcpus(config)?,
        };
        Ok(Machine {
            id: self.id.parse().map_err(ShimError::invalid)?,
            guest: Guest::load(&config.guests_dir, wishes.guest.unwrap_or(&config.guest))
                .map_err(ShimError::invalid)?,
            vcpus,
            memory_mib: match wishes.memory_mib {
                Some(memory) => memory,
                None => {
                    let needed = self.memory_mib(config)?;
                    // A guest that does more than run containers, which have their limits, is to have no more than it is accounted for.
                    match cloneable && wishes.configuration.is_none() {
                        true => limits::class_mib(needed, config.max_memory_mib),
                        false => needed,
                    }
                }
            },
            growth: Some(Growth::within(vcpus, config.max_vcpus, config.max_memory_mib)),
            acceleration: config.acceleration,
            configuration: wishes.configuration,
            hostname: self.hostname.clone(),
            kernel_args: wishes.kernel_args,
            network: self.network.clone(),
            sandbox: Some(self.identity()),
            disk: None,
            cgroup: Some(cgroup.unwrap_or_else(|| PathBuf::from("coreos-kvm").join(&self.id))),
            boot_timeout: config.boot_timeout,
            cloneable,
        })
    }

    /// What makes the guest this pod's.
    fn identity(&self) -> ConfigureSandboxRequest {
        let mut sysctls = self.sysctls.clone();
        if self.users.is_some() {
            for (name, value) in SYSCTLS_OF_USERS {
                sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
            }
        }
        ConfigureSandboxRequest {
            sandbox_id: self.id.clone(),
            hostname: self.hostname.clone().unwrap_or_default(),
            shared_tag: SHARED_TAG.to_owned(),
            shm_size: 0,
            sysctls,
            users: self.users.map(UserNamespace::message).into(),
            ..Default::default()
        }
    }

    /// As many processors as the pod's containers may use together.
    fn vcpus(&self, config: &Config) -> Result<u32, ShimError> {
        match Limits::size([self.limits], 0).vcpus {
            0 => Ok(config.vcpus),
            vcpus if vcpus <= config.max_vcpus => Ok(vcpus),
            vcpus => Err(ShimError::InvalidArgument(format!(
                "the limits of the pod's containers add up to {vcpus} processors; `max_vcpus` in config.toml allows {}",
                config.max_vcpus
            ))),
        }
    }

    /// What the pod's containers may use together, and what the guest needs beside them.
    fn memory_mib(&self, config: &Config) -> Result<u64, ShimError> {
        match Limits::size([self.limits], config.guest_memory_overhead_mib).memory_mib {
            0 => Ok(config.memory_mib),
            memory if memory <= config.max_memory_mib => Ok(memory),
            memory => Err(ShimError::InvalidArgument(format!(
                "the pod's containers and its guest need {memory} MiB of memory; `max_memory_mib` in config.toml allows {}",
                config.max_memory_mib
            ))),
        }
    }
}

/// Those of a pod's annotations that are for this runtime.
fn own_annotations<'a>(all: impl IntoIterator<Item = (&'a String, &'a String)>) -> BTreeMap<String, String> {
    all.into_iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(PREFIX)?.to_owned(), value.clone())))
        .collect()
}

fn of_the_node() -> ShimError {
    ShimError::InvalidArgument(
        "a machine cannot be on the node's own network: remove hostNetwork from the pod, or use another runtime class"
            .to_owned(),
    )
}

/// The annotations of a pod, each allowed and read.
#[derive(Default)]
struct Wishes<'a> {
    configuration: Option<Configuration>,
    guest: Option<&'a str>,
    kernel_args: Vec<String>,
    memory_mib: Option<u64>,
    template: Option<bool>,
    vcpus: Option<u32>,
}

impl<'a> Wishes<'a> {
    fn read(pod: &'a PodSpec, config: &Config) -> Result<Self, ShimError> {
        let mut wishes = Self::default();
        if ["config", "config-inline"]
            .iter()
            .all(|name| pod.annotations.contains_key(*name))
        {
            return Err(ShimError::InvalidArgument(format!(
                "the pod has two configurations, {PREFIX}config and {PREFIX}config-inline; one of them has to go"
            )));
        }
        for (name, value) in &pod.annotations {
            let (name, key) = (name.as_str(), &format!("{PREFIX}{name}"));
            if !ANNOTATIONS.contains(&name) {
                return Err(ShimError::InvalidArgument(format!(
                    "there is no annotation {key}; those of this runtime are {PREFIX}{{{}}}",
                    ANNOTATIONS.join(", ")
                )));
            }
            if !config.allows_annotation(name) {
                return Err(ShimError::InvalidArgument(format!(
                    "the annotation {key} is not allowed on this node; its admin can allow it by `annotations` in config.toml"
                )));
            }
            match name {
                "config" => wishes.configuration = Some(volume_configuration(key, value, &pod.uid, config)?),
                "config-inline" => {
                    wishes.configuration = Some(Configuration {
                        origin: format!("the pod's annotation {key}"),
                        text: value.clone(),
                    });
                }
                "guest" => wishes.guest = Some(value),
                "kernel-args" => wishes.kernel_args = value.split_ascii_whitespace().map(str::to_owned).collect(),
                "memory" => wishes.memory_mib = Some(memory(key, value, config)?),
                "template" => wishes.template = Some(yes_or_no(key, value)?),
                "vcpus" => wishes.vcpus = Some(vcpus(key, value, config)?),
                // Not to be reached: a name of ANNOTATIONS that is not read here must not be taken for one that works.
                _ => {
                    return Err(ShimError::Unimplemented(format!(
                        "the annotation {key} does not work yet"
                    )));
                }
            }
        }
        Ok(wishes)
    }
}

/// The text of a file in one of the pod's volumes.
fn volume_configuration(key: &str, value: &str, uid: &str, config: &Config) -> Result<Configuration, ShimError> {
    let file: VolumeFile = value
        .parse()
        .map_err(|problem| ShimError::InvalidArgument(format!("the annotation {key}: {problem}")))?;
    Ok(Configuration {
        origin: file.to_string(),
        text: file.read(&config.kubelet_dir, uid)?,
    })
}

fn yes_or_no(key: &str, value: &str) -> Result<bool, ShimError> {
    value.trim().parse().map_err(|_| {
        ShimError::InvalidArgument(format!(
            "the annotation {key} has {value:?}: \"true\" or \"false\" is expected"
        ))
    })
}

fn vcpus(key: &str, value: &str, config: &Config) -> Result<u32, ShimError> {
    match value.trim().parse() {
        Ok(vcpus) if (1..=config.max_vcpus).contains(&vcpus) => Ok(vcpus),
        _ => Err(ShimError::InvalidArgument(format!(
            "the annotation {key} has {value:?}: a number of processors from 1 to {} is expected",
            config.max_vcpus
        ))),
    }
}

fn memory(key: &str, value: &str, config: &Config) -> Result<u64, ShimError> {
    match mebibytes(value) {
        Some(mib) if (1..=config.max_memory_mib).contains(&mib) => Ok(mib),
        _ => Err(ShimError::InvalidArgument(format!(
            "the annotation {key} has {value:?}: an amount of memory up to {}Mi is expected, such as 768Mi or 2Gi",
            config.max_memory_mib
        ))),
    }
}

/// An amount as Kubernetes writes it (`k8s.io/apimachinery/pkg/api/resource`, whole numbers only), in MiB, rounded up.
fn mebibytes(text: &str) -> Option<u64> {
    const UNITS: [(&str, u64); 8] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
    ];
    let text = text.trim();
    let unit = UNITS
        .iter()
        .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)));
    let (number, bytes) = unit.unwrap_or((text, 1));
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    Some(number.parse::<u64>().ok()?.checked_mul(bytes)?.div_ceil(1 << 20))
}

#[cfg(test)]
pub(crate) mod tests {
    use oci_spec::runtime::Spec;
    use rstest::rstest;
    use serde_json::{Value, json};

    pub(crate) use super::cri::tests::config as sandbox_config;
    use super::{
        oci::{SANDBOX_CPU_PERIOD, SANDBOX_CPU_QUOTA, SANDBOX_MEMORY, SANDBOX_UID},
        *,
    };

    fn pod(annotations: Value) -> PodSpec {
        PodSpec::of_oci("abc", &spec(annotations)).unwrap()
    }

    /// A guests' directory with one guest of empty files, as far as the description of a machine goes.
    pub(crate) fn config(root: &std::path::Path) -> Config {
        let guest = root.join("guests/reference");
        std::fs::create_dir_all(&guest).unwrap();
        for (file, size) in [("vmlinuz", 4096), ("initrd.img", 4096), ("root.erofs", 4096)] {
            std::fs::write(guest.join(file), vec![0; size]).unwrap();
        }
        let description = "name = \"reference\"\nkernel = \"vmlinuz\"\ninitramfs = \"initrd.img\"\nroot = \"root.erofs\"\n\
             root_format = \"raw\"\nkernel_args = \"root=/dev/vda ro\"\nignition_fw_cfg = \"opt/com.coreos/config\"\n\
             ignition_versions = [\"3.3.0\"]\nmin_memory_mib = 192\n\n[files]\n\"vmlinuz\" = {size = 4096}\n\
             \"initrd.img\" = {size = 4096}\n\"root.erofs\" = {size = 4096}\n";
        std::fs::write(guest.join("guest.toml"), description).unwrap();
        Config {
            guests_dir: root.join("guests"),
            state_dir: root.join("state"),
            ..Config::default()
        }
    }

    pub(crate) fn spec(annotations: Value) -> Spec {
        serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "hostname": "web-0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/pause"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": annotations,
            "linux": {
                "cgroupsPath": "/kubepods/pod1/abc",
                "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
                "namespaces": [{"type": "pid"}, {"type": "network", "path": "/var/run/netns/cni-1"}],
            },
        }))
        .unwrap()
    }

    fn described(annotations: Value) -> Result<Machine, ShimError> {
        let root = tempfile::tempdir().unwrap();
        pod(annotations).machine(&config(root.path()))
    }

    #[test]
    fn a_pod_without_wishes_has_the_sizes_of_the_configuration() {
        let machine = described(json!({})).unwrap();
        assert_eq!((machine.vcpus, machine.memory_mib), (1, 512));
        assert_eq!(machine.cgroup, Some("kubepods/pod1/abc".into()));
        let netns = "/var/run/netns/cni-1".into();
        assert_eq!(
            machine.network,
            Network::Tap {
                netns,
                redirects: vec![]
            }
        );
    }

    #[test]
    fn a_pod_is_sized_by_its_containers_limits() {
        let machine = described(json!({
            SANDBOX_CPU_PERIOD: "100000",
            SANDBOX_CPU_QUOTA: "250000",
            SANDBOX_MEMORY: "134217729",
        }))
        .unwrap();
        assert_eq!((machine.vcpus, machine.memory_mib), (3, 512));
    }

    #[test]
    fn a_pod_with_a_configuration_has_exactly_what_its_limits_add_up_to() {
        let machine = described(json!({
            SANDBOX_MEMORY: "134217729",
            "coreos-kvm.io/config-inline": "{}",
            "coreos-kvm.io/template": "true",
        }))
        .unwrap();
        assert_eq!(machine.memory_mib, 129 + 256);
    }

    #[test]
    fn what_the_pod_says_goes_before_its_limits() {
        let machine = described(json!({
            SANDBOX_MEMORY: "134217728",
            "coreos-kvm.io/memory": "1Gi",
            "coreos-kvm.io/vcpus": "2",
            "coreos-kvm.io/config-inline": "{}",
        }))
        .unwrap();
        assert_eq!((machine.vcpus, machine.memory_mib), (2, 1024));
        assert_eq!(machine.configuration.unwrap().text, "{}");
    }

    #[test]
    fn a_configuration_comes_from_a_volume_of_the_pods_own() {
        let root = tempfile::tempdir().unwrap();
        let config = Config {
            kubelet_dir: root.path().join("kubelet"),
            ..config(root.path())
        };
        let volume = "kubelet/pods/a-uid/volumes/kubernetes.io~configmap/os";
        std::fs::create_dir_all(root.path().join(volume)).unwrap();
        std::fs::write(root.path().join(volume).join("config.yaml"), "passwd: {}").unwrap();
        let mut annotations = json!({"coreos-kvm.io/config": "configmap/os/config.yaml", SANDBOX_UID: "a-uid"});
        let machine = pod(annotations.clone()).machine(&config).unwrap();
        let found = machine.configuration.unwrap();
        assert_eq!(
            (found.origin.as_str(), found.text.as_str()),
            ("configmap/os/config.yaml", "passwd: {}")
        );
        annotations["coreos-kvm.io/config-inline"] = json!("{}");
        let error = pod(annotations).machine(&config).unwrap_err().to_string();
        assert!(error.contains("two configurations"), "{error}");
    }

    #[rstest]
    #[case("coreos-kvm.io/config", "configmap/os", &["coreos-kvm.io/config", "configmap/<volume>/<key>"])]
    #[case("coreos-kvm.io/config", "configmap/os/key", &["configmap/os/key", "no uid"])]
    #[case("coreos-kvm.io/vcpu", "2", &["coreos-kvm.io/vcpu", "vcpus", "config-inline"])]
    #[case("coreos-kvm.io/kernel-args", "single", &["kernel-args", "config.toml"])]
    #[case("coreos-kvm.io/vcpus", "33", &["\"33\"", "1 to 32"])]
    #[case("coreos-kvm.io/vcpus", "many", &["\"many\"", "1 to 32"])]
    #[case("coreos-kvm.io/memory", "lots", &["\"lots\"", "65536Mi", "768Mi"])]
    #[case("coreos-kvm.io/memory", "1Ti", &["\"1Ti\"", "65536Mi"])]
    #[case("coreos-kvm.io/guest", "nonesuch", &["nonesuch", "reference"])]
    #[case(SANDBOX_MEMORY, "109951162777600", &["104857856 MiB", "65536"])]
    fn what_cannot_be_is_told_with_what_can(#[case] key: &str, #[case] value: &str, #[case] words: &[&str]) {
        let error = described(json!({ key: value })).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word} is not in: {error}");
        }
    }

    #[rstest]
    #[case("768Mi", Some(768))]
    #[case("2Gi", Some(2048))]
    #[case("1", Some(1))]
    #[case("1000M", Some(954))]
    #[case("1.5Gi", None)]
    #[case("-1", None)]
    #[case("+1", None)]
    #[case("Mi", None)]
    #[case("99999999999999Ti", None)]
    fn amounts_are_read_as_kubernetes_writes_them(#[case] text: &str, #[case] mib: Option<u64>) {
        assert_eq!(mebibytes(text), mib);
    }

    #[test]
    fn the_guest_is_told_the_pods_name_and_settings() {
        let request = pod(json!({})).identity();
        assert_eq!(request.hostname, "web-0");
        assert_eq!(request.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        assert!(request.users.is_none() && request.sysctls.len() == 1);
    }

    #[test]
    fn the_guest_is_told_of_the_pods_users_and_lets_them_have_the_pods_ports() {
        let mut pod = pod(json!({}));
        pod.users = Some(crate::userns::tests::USERS);
        pod.sysctls = [("net.ipv4.ip_unprivileged_port_start".to_owned(), "80".to_owned())].into();
        let request = pod.identity();
        let told = |mapping: &coreos_kvm_proto::agent::IdMapping| (mapping.inside, mapping.outside, mapping.length);
        assert_eq!(told(&request.users.uids), (0, 65536, 65536));
        assert_eq!(told(&request.users.gids), (0, 131_072, 65536));
        assert_eq!(request.sysctls["net.ipv4.ip_unprivileged_port_start"], "80");
        assert_eq!(request.sysctls["net.ipv4.ping_group_range"], "0 2147483647");
    }
}
