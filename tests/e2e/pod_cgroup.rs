//! The cgroup of a pod, as a kubelet makes it: that of its machine is made below.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result};
use kubeception_tests::node::Place;
use kubeception_tests::pod::Pod;
use nix::unistd::Pid;

/// Removed when dropped.
pub(crate) struct PodCgroup {
    name: String,
    /// One in each hierarchy.
    directories: Vec<PathBuf>,
    /// What was made for it above these.
    above: Vec<PathBuf>,
}

impl PodCgroup {
    pub(crate) fn make(place: &Place, name: &str) -> Result<Self> {
        let of_node = place.cgroups();
        let cgroup = Self {
            name: format!("{}/{name}", place.cgroup_parent()),
            directories: of_node.iter().map(|directory| directory.join(name)).collect(),
            above: Vec::new(),
        };
        for (above, directory) in of_node.iter().zip(&cgroup.directories) {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
            // Version 2 gives controllers to a cgroup from above; one that cannot be had is missed by who asks for it.
            for from in [above.parent(), Some(above)].into_iter().flatten() {
                let controllers = fs::read_to_string(from.join("cgroup.controllers")).unwrap_or_default();
                for controller in controllers.split_ascii_whitespace() {
                    let _ = fs::write(from.join("cgroup.subtree_control"), format!("+{controller}"));
                }
            }
        }
        Ok(cgroup)
    }

    /// As a kubelet has one that leaves cgroups to systemd: `a-b.slice` is in `a.slice` (systemd.slice(5)).
    pub(crate) fn slice(place: &Place, name: &str) -> Result<Self> {
        let node = place.cgroup_parent()[1..].replace('-', "_");
        let (above, slice) = (format!("{node}.slice"), format!("{node}-{name}.slice"));
        let of_node = place.cgroups();
        let roots = of_node.iter().filter_map(|directory| directory.parent());
        let above: Vec<_> = roots.map(|root| root.join(&above)).collect();
        let cgroup = Self {
            name: format!("/{node}.slice/{slice}"),
            directories: above.iter().map(|directory| directory.join(&slice)).collect(),
            above,
        };
        for directory in &cgroup.directories {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        Ok(cgroup)
    }

    /// Has the pod be in it.
    pub(crate) fn takes(&self, mut pod: Pod) -> Pod {
        self.name
            .clone_into(&mut pod.config.linux.get_or_insert_default().cgroup_parent);
        pod
    }

    /// Bounds the memory of all that is in it: by version 2 or by version 1.
    pub(crate) fn limit_memory(&self, bytes: u64) -> Result<()> {
        let files = ["memory.max", "memory.limit_in_bytes"];
        let file = self.find(&files).context("no hierarchy bounds memory")?;
        fs::write(&file, bytes.to_string()).with_context(|| format!("writing {}", file.display()))
    }

    /// Processor time of all that is or was in it, in nanoseconds.
    pub(crate) fn cpu(&self) -> Result<u64> {
        if let Some(file) = self.find(&["cpuacct.usage"]) {
            return Ok(fs::read_to_string(file)?.trim().parse()?);
        }
        Ok(value(&self.read(&["cpu.stat"])?, "usage_usec")? * 1000)
    }

    /// Memory of all that is in it, without what the kernel takes back first, in bytes.
    pub(crate) fn working_set(&self) -> Result<u64> {
        let used: u64 = self
            .read(&["memory.usage_in_bytes", "memory.current"])?
            .trim()
            .parse()?;
        let stat = self.read(&["memory.stat"])?;
        let inactive = value(&stat, "total_inactive_file").or_else(|_| value(&stat, "inactive_file"))?;
        Ok(used.saturating_sub(inactive))
    }

    /// Whether the process is in it, in every hierarchy.
    pub(crate) fn has(&self, process: Pid) -> Result<bool> {
        let cgroups = fs::read_to_string(format!("/proc/{process}/cgroup"))?;
        let below = format!("{}/", self.name);
        let (inside, all) = (
            cgroups
                .lines()
                .filter(|line| line.splitn(3, ':').nth(2).is_some_and(|path| path.starts_with(&below))),
            self.directories.len(),
        );
        Ok(inside.count() == all)
    }

    fn read(&self, files: &[&str]) -> Result<String> {
        let file = self.find(files).with_context(|| format!("there is no {files:?}"))?;
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }

    fn find(&self, files: &[&str]) -> Option<PathBuf> {
        let all = self
            .directories
            .iter()
            .flat_map(|directory| files.iter().map(|file| directory.join(file)));
        all.into_iter().find(|file| file.exists())
    }
}

/// The number behind a word.
pub(crate) fn value(lines: &str, word: &str) -> Result<u64> {
    let line = lines
        .lines()
        .find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    Ok(line.with_context(|| format!("there is no {word}"))?.trim().parse()?)
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for directory in self.directories.iter().chain(&self.above) {
            if let Err(error) = fs::remove_dir(directory) {
                eprintln!("{} cannot be removed: {error}", directory.display());
            }
        }
    }
}
