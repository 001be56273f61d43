//! What pods leave behind on a node: a snapshot of everything a pod brings into being, and the difference in words.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::unistd::Pid;

use crate::node::Node;

/// Everything of one node that pods bring into being, each as a line for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    things: BTreeSet<String>,
}

/// What one snapshot has and an earlier one has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftovers(Vec<String>);

impl Snapshot {
    pub fn take(node: &Node) -> Result<Self> {
        let mut snapshot = Self::default();
        snapshot.processes(node)?;
        snapshot.mounts(node)?;
        snapshot.network(node)?;
        snapshot.abstract_sockets(node)?;
        for cgroup in node.place().cgroups() {
            snapshot.folders("cgroup", &cgroup)?;
        }
        let place = node.place();
        let runtime = place.root().join("io.containerd.runtime.v2.task");
        let sandboxes = place.root().join("io.containerd.sandbox.controller.v1.shim");
        let cri = place.root().join("io.containerd.grpc.v1.cri");
        for folder in [
            place.run(),
            place.cni_data(),
            runtime,
            sandboxes,
            cri.join("sandboxes"),
            cri.join("containers"),
        ] {
            snapshot.files(&folder)?;
        }
        for folder in ["/tmp", "/dev/shm", "/var/tmp"] {
            snapshot.temporary(Path::new(folder))?;
        }
        Ok(snapshot)
    }

    pub fn left_since(&self, before: &Self) -> Leftovers {
        Leftovers(self.things.difference(&before.things).cloned().collect())
    }

    fn add(&mut self, kind: &str, what: impl fmt::Display) {
        self.things.insert(format!("{kind} {what}"));
    }

    fn processes(&mut self, node: &Node) -> Result<()> {
        let containerd = node.containerd()?;
        for process in processes(node)? {
            // It may have been started anew.
            if Some(process.pid) == containerd {
                continue;
            }
            let command: String = process.command.chars().take(160).collect();
            self.add("process", format_args!("{}: {command}", process.pid));
        }
        Ok(())
    }

    fn mounts(&mut self, node: &Node) -> Result<()> {
        let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", node.init())).context("the node's mounts")?;
        for mount in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
            self.add("mount", mount);
        }
        Ok(())
    }

    /// Links, addresses and the translation of ports in the node's network.
    fn network(&mut self, node: &Node) -> Result<()> {
        for (kind, program, arguments) in [
            ("link", "ip", ["-br", "link"].as_slice()),
            ("port translation", "iptables", &["-w", "5", "-t", "nat", "-S"]),
        ] {
            let output = node
                .command(program)
                .args(arguments)
                .output()
                .with_context(|| format!("running {program}"))?;
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                // Of a link only the name: its state changes with what is plugged in.
                let line = if kind == "link" {
                    line.split_whitespace().next().unwrap_or_default()
                } else {
                    line
                };
                self.add(kind, line);
            }
        }
        Ok(())
    }

    /// Sockets by name without a file, of which each network namespace has its own.
    fn abstract_sockets(&mut self, node: &Node) -> Result<()> {
        let sockets = fs::read_to_string(format!("/proc/{}/net/unix", node.init())).context("the node's sockets")?;
        for name in sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(7))
            .filter(|name| name.starts_with('@'))
        {
            self.add("socket", name);
        }
        Ok(())
    }

    fn folders(&mut self, kind: &str, folder: &Path) -> Result<()> {
        let Ok(entries) = fs::read_dir(folder) else {
            return Ok(());
        };
        for entry in entries {
            let path = entry?.path();
            if path.is_dir() {
                self.add(kind, path.display());
                self.folders(kind, &path)?;
            }
        }
        Ok(())
    }

    fn files(&mut self, folder: &Path) -> Result<()> {
        // A folder may vanish while it is read.
        let Ok(entries) = fs::read_dir(folder) else {
            return Ok(());
        };
        for entry in entries {
            let entry = entry?;
            let Ok(kind) = entry.file_type() else { continue };
            let word = if kind.is_socket() { "socket" } else { "file" };
            self.add(word, entry.path().display());
            if kind.is_dir() {
                self.files(&entry.path())?;
            }
        }
        Ok(())
    }

    /// In folders that everybody uses, files whose names tell that they are a machine's.
    fn temporary(&mut self, folder: &Path) -> Result<()> {
        let Ok(entries) = fs::read_dir(folder) else {
            return Ok(());
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
            if ["coreos-kvm", "qemu", "virtiofs", "vhost"]
                .iter()
                .any(|word| name.contains(word))
            {
                self.add("file", path.display());
            }
        }
        Ok(())
    }
}

impl Leftovers {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for thing in &self.0 {
            writeln!(f, "  {thing}")?;
        }
        Ok(())
    }
}

/// A process of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Outside of the node.
    pub pid: Pid,
    /// The command line.
    pub command: String,
}

/// The processes in the node's PID namespace, zombies aside.
pub fn processes(node: &Node) -> Result<Vec<Process>> {
    let namespace = fs::read_link(format!("/proc/{}/ns/pid", node.init())).context("the node's PID namespace")?;
    let mut processes = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let path = entry.path();
        // A process may end at any time.
        let (Ok(of_process), Ok(command)) = (fs::read_link(path.join("ns/pid")), fs::read(path.join("cmdline"))) else {
            continue;
        };
        if of_process == namespace && !command.is_empty() {
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            processes.push(Process {
                pid: Pid::from_raw(pid),
                command,
            });
        }
    }
    Ok(processes)
}

/// Waits until nothing is left that was not there before; what ends on its own gets some time for it.
pub fn expect_nothing_left(node: &Node, before: &Snapshot, bound: Duration) -> Result<()> {
    let deadline = Instant::now() + bound;
    loop {
        let left = Snapshot::take(node)?.left_since(before);
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("left behind, {} s after the pod had gone:\n{left}", bound.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
