//! Pods and containers as a kubelet would ask for them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result};
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, DnsConfig, IdMapping, ImageSpec, Int64Value, KeyValue, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount,
    MountPropagation, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PortMapping, UserNamespace,
};

use crate::image;
use crate::node::Place;

/// A pod's configuration; the sandbox is one instance of it.
#[derive(Debug, Clone)]
pub struct Pod {
    pub config: PodSandboxConfig,
}

impl Pod {
    /// A pod on a node, with the default annotations: none.
    pub fn new(place: &Place, name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let uid = format!(
            "{}-{}-{name}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: place.base().join("pod-logs").join(&uid).to_string_lossy().into_owned(),
            // Else containerd copies this machine's resolv.conf, which may be a link into the hidden /run.
            dns_config: Some(DnsConfig {
                servers: vec!["10.88.0.1".to_owned()],
                ..DnsConfig::default()
            }),
            linux: Some(LinuxPodSandboxConfig {
                // A kubelet would make and remove one of the pod's own.
                cgroup_parent: place.cgroup_parent(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        };
        Self { config }
    }

    pub fn annotation(mut self, key: &str, value: impl Into<String>) -> Self {
        self.config.annotations.insert(key.to_owned(), value.into());
        self
    }

    /// What its containers may use together, as the kubelet tells it.
    pub fn limits(mut self, limits: LinuxContainerResources) -> Self {
        self.config.linux.get_or_insert_default().resources = Some(limits);
        self
    }

    /// A TCP port of the containers, also served by the node.
    pub fn host_port(mut self, container_port: u16, host_port: u16) -> Self {
        self.config.port_mappings.push(PortMapping {
            container_port: container_port.into(),
            host_port: host_port.into(),
            ..PortMapping::default()
        });
        self
    }

    /// In a user namespace, as with `hostUsers: false`.
    pub fn users(mut self, users: Users) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context.namespace_options.get_or_insert_default().userns_options = Some(users.namespace());
        self
    }

    /// Among the processes of the node.
    pub fn node_processes(mut self) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        let context = linux.security_context.get_or_insert_default();
        context.namespace_options.get_or_insert_default().pid = NamespaceMode::Node.into();
        self
    }

    /// As a kubelet asks for a pod of which a container is privileged.
    pub fn privileged(mut self) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default().privileged = true;
        self
    }

    /// Where the kubelet would have a volume of the pod.
    fn volume(&self, place: &Place, plugin: &str, name: &str) -> PathBuf {
        let uid = self.config.metadata.as_ref().map(|metadata| metadata.uid.as_str());
        let pod = place.kubelet().join("pods").join(uid.unwrap_or_default());
        pod.join("volumes").join(plugin).join(name)
    }

    /// Makes an emptyDir volume of the pod, as the kubelet does it.
    pub fn empty_dir(&self, place: &Place, name: &str) -> Result<PathBuf> {
        let volume = self.volume(place, "kubernetes.io~empty-dir", name);
        fs::create_dir_all(&volume).with_context(|| format!("making the volume {}", volume.display()))?;
        Ok(volume)
    }

    /// A ConfigMap volume of the pod with one key, laid out as the kubelet does it.
    pub fn config_map(&self, place: &Place, volume: &str, key: &str, text: &str) -> Result<()> {
        let volume = self.volume(place, "kubernetes.io~configmap", volume);
        let version = "..2026_01_01_00_00_00.1";
        let lay_out = || {
            fs::create_dir_all(volume.join(version))?;
            fs::write(volume.join(version).join(key), text)?;
            symlink(version, volume.join("..data"))?;
            symlink(Path::new("..data").join(key), volume.join(key))
        };
        lay_out().with_context(|| format!("laying out the volume {}", volume.display()))
    }

    pub fn log_directory(&self) -> &Path {
        Path::new(&self.config.log_directory)
    }
}

/// The ids of a user namespace: those from 0 on inside are those from `first` on outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Users {
    pub first: u32,
    pub length: u32,
}

impl Users {
    fn namespace(self) -> UserNamespace {
        UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: self.mappings(),
            gids: self.mappings(),
        }
    }

    fn mappings(self) -> Vec<IdMapping> {
        vec![IdMapping {
            host_id: self.first,
            container_id: 0,
            length: self.length,
        }]
    }
}

/// A container's configuration.
#[derive(Debug, Clone)]
pub struct Container {
    pub config: ContainerConfig,
}

impl Container {
    pub fn new(name: &str, image: &str) -> Self {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: image.to_owned(),
                ..ImageSpec::default()
            }),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(LinuxContainerResources::default()),
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxContainerSecurityContext::default()
                }),
            }),
            ..ContainerConfig::default()
        };
        Self { config }
    }

    /// A shell script on busybox.
    pub fn script(name: &str, script: &str) -> Self {
        Self::new(name, image::BUSYBOX).command(&["sh", "-c", script])
    }

    pub fn command(mut self, command: &[&str]) -> Self {
        self.config.command = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(KeyValue {
            key: key.to_owned(),
            value: value.to_owned(),
        });
        self
    }

    pub fn terminal(mut self) -> Self {
        self.config.tty = true;
        self.config.stdin = true;
        self
    }

    pub fn host_path(mut self, host: &Path, container: &str, readonly: bool) -> Self {
        self.config.mounts.push(Mount {
            container_path: container.to_owned(),
            host_path: host.to_string_lossy().into_owned(),
            readonly,
            ..Mount::default()
        });
        self
    }

    /// Has the last of its mounts show what the node mounts below it later.
    pub fn follows_the_node(mut self) -> Self {
        if let Some(mount) = self.config.mounts.last_mut() {
            mount.propagation = MountPropagation::PropagationHostToContainer.into();
        }
        self
    }

    /// In a user namespace, as its pod.
    pub fn users(mut self, users: Users) -> Self {
        self.namespace_options().userns_options = Some(users.namespace());
        self
    }

    /// Has the last of its mounts show files as those of the user namespace's, as the kubelet asks for volumes.
    pub fn owners_of(mut self, users: Users) -> Self {
        if let Some(mount) = self.config.mounts.last_mut() {
            (mount.uid_mappings, mount.gid_mappings) = (users.mappings(), users.mappings());
        }
        self
    }

    /// As this user and group.
    pub fn user(mut self, id: i64) -> Self {
        let context = self.security_context();
        (context.run_as_user, context.run_as_group) = (Some(Int64Value { value: id }), Some(Int64Value { value: id }));
        self
    }

    pub fn privileged(mut self) -> Self {
        self.security_context().privileged = true;
        self
    }

    /// Among the processes of the node.
    pub fn node_processes(mut self) -> Self {
        self.namespace_options().pid = NamespaceMode::Node.into();
        self
    }

    /// In the process namespace that the pod's containers share.
    pub fn shared_processes(mut self) -> Self {
        self.namespace_options().pid = NamespaceMode::Pod.into();
        self
    }

    /// In the process namespace of another container.
    pub fn processes_of(mut self, container: &str) -> Self {
        let options = self.namespace_options();
        options.pid = NamespaceMode::Target.into();
        container.clone_into(&mut options.target_id);
        self
    }

    fn namespace_options(&mut self) -> &mut NamespaceOption {
        self.security_context().namespace_options.get_or_insert_default()
    }

    fn security_context(&mut self) -> &mut LinuxContainerSecurityContext {
        let linux = self.config.linux.get_or_insert_default();
        linux.security_context.get_or_insert_default()
    }

    /// In bytes.
    pub fn memory_limit(mut self, bytes: i64) -> Self {
        let resources = self
            .config
            .linux
            .get_or_insert_default()
            .resources
            .get_or_insert_default();
        resources.memory_limit_in_bytes = bytes;
        self
    }

    pub fn limits(mut self, limits: LinuxContainerResources) -> Self {
        self.config.linux.get_or_insert_default().resources = Some(limits);
        self
    }

    /// Where its log is.
    pub fn log(&self, pod: &Pod) -> PathBuf {
        pod.log_directory().join(&self.config.log_path)
    }
}

/// Limits of thousandths of a processor and MiB of memory.
pub fn limits(millicpus: i64, mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: millicpus * 100,
        memory_limit_in_bytes: mib << 20,
        ..LinuxContainerResources::default()
    }
}

/// What a kubelet asks for unless the pod says otherwise: the pod's network and IPC, a PID namespace a container.
fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}
