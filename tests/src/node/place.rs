//! Where a node keeps its things.

use std::fs;
use std::path::{Path, PathBuf};

/// Under it every node has its folder. On a disk: a container's root file system does not belong in memory.
const NODES: &str = "/var/lib/kubeception";

/// The paths of one node, by its name.
#[derive(Debug, Clone)]
pub struct Place {
    name: String,
    base: PathBuf,
}

impl Place {
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            base: Path::new(NODES).join(name),
        }
    }

    /// The nodes that are there, or of which something is left.
    pub fn all() -> Vec<Self> {
        let Ok(entries) = fs::read_dir(NODES) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|file| file.strip_suffix(".lock").map(str::to_owned))
            .collect();
        names.sort();
        names.iter().map(|name| Self::new(name)).collect()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Removed with the node.
    pub fn base(&self) -> &Path {
        &self.base
    }

    /// Held by the node's init as long as the node is there.
    pub fn lock(&self) -> PathBuf {
        Path::new(NODES).join(format!("{}.lock", self.name))
    }

    /// Mounted on /run inside the node.
    pub fn run(&self) -> PathBuf {
        self.base.join("run")
    }

    /// As seen from outside; inside it is /run/containerd/containerd.sock.
    pub fn socket(&self) -> PathBuf {
        self.run().join("containerd/containerd.sock")
    }

    /// State of the pods of this runtime, as seen from outside; inside it is the default, /run/coreos-kvm.
    pub fn pods(&self) -> PathBuf {
        self.run().join("coreos-kvm")
    }

    /// containerd's persistent data.
    pub fn root(&self) -> PathBuf {
        self.base.join("root")
    }

    /// First in the PATH of containerd.
    pub fn programs(&self) -> PathBuf {
        self.base.join("bin")
    }

    pub fn cni_config(&self) -> PathBuf {
        self.base.join("cni/net.d")
    }

    pub fn cni_data(&self) -> PathBuf {
        self.base.join("cni/data")
    }

    /// Where containerd looks up which registry is asked for an image.
    pub fn registries(&self) -> PathBuf {
        self.base.join("certs.d")
    }

    /// containerd's configuration.
    pub fn containerd_config(&self) -> PathBuf {
        self.base.join("containerd.toml")
    }

    /// The guests that pods can name: `reference`, and what a trial adds.
    pub fn guests(&self) -> PathBuf {
        self.base.join("guests")
    }

    /// The kubelet's directory, with the volumes of the pods.
    pub fn kubelet(&self) -> PathBuf {
        self.base.join("kubelet")
    }

    /// The parent of the pods' cgroups, as a kubelet would name it.
    pub fn cgroup_parent(&self) -> String {
        format!("/kubeception-{}", self.name)
    }

    /// The same in each hierarchy of the machine: one with cgroup v2, one a controller with v1.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        let Ok(mounts) = fs::read_to_string("/proc/self/mountinfo") else {
            return Vec::new();
        };
        let name = &self.cgroup_parent()[1..];
        mounts
            .lines()
            .filter(|line| line.contains(" - cgroup ") || line.contains(" - cgroup2 "))
            .filter_map(|line| Some(Path::new(line.split(' ').nth(4)?).join(name)))
            .collect()
    }

    pub(super) fn folders(&self) -> Vec<PathBuf> {
        // Some programs expect their folder in /run.
        let run = ["lock", "netns"].map(|folder| self.run().join(folder));
        let mut folders = vec![
            self.root(),
            self.programs(),
            self.guests(),
            self.cni_config(),
            self.cni_data(),
        ];
        folders.extend(run);
        folders
    }
}
