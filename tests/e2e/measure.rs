//! What the parts of a pod take, and how long trials are.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::leftovers::{Process, processes};
use kubeception_tests::node::Node;
use nix::unistd::Pid;

use crate::lab::in_guest;

pub(crate) const SHIM: &str = "containerd-shim-coreos-kvm";
pub(crate) const QEMU: &str = "qemu-system";

/// The agent's part of the guest's cgroups: below are `agent` for itself, and one for each container by its id.
pub(crate) const AGENTS_CGROUP: &str = "/sys/fs/cgroup/system.slice/coreos-kvm-agent.service";

/// A number that has a default, and may stand in a variable of the environment.
pub(crate) fn settable((variable, default): (&str, u64)) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is {text:?}")),
        Err(_) => Ok(default),
    }
}

/// The process of a pod that runs that program.
pub(crate) fn process_of(node: &Node, sandbox: &str, program: &str) -> Result<Process> {
    processes(node)?
        .into_iter()
        .find(|process| process.command.contains(program) && process.command.contains(sandbox))
        .with_context(|| format!("the pod has no {program}"))
}

/// What a process has written to in memory, in bytes: what it has for itself, however many run the same program.
pub(crate) fn private_memory(pid: Pid) -> Result<u64> {
    private_in(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?)
}

/// The same of the processes of a pod's agent, without those that it has been asked to run in the guest itself.
pub(crate) fn agents_memory(node: &Node, sandbox: &str) -> Result<u64> {
    let script = format!(
        "for pid in $(cat {AGENTS_CGROUP}/agent/cgroup.procs); do
            read name < /proc/$pid/comm; case $name in coreos-kvm-*) cat /proc/$pid/smaps_rollup ;; esac
        done"
    );
    private_in(&in_guest(node, sandbox, &["sh", "-c", &script])?)
}

/// In bytes: proc_pid_smaps_rollup(5) has KiB.
fn private_in(rollups: &str) -> Result<u64> {
    let lines = rollups.lines().filter_map(|line| line.strip_prefix("Private_Dirty:"));
    let words = lines.map(|line| line.split_whitespace().next().unwrap_or_default().parse::<u64>());
    let kib: Vec<_> = words.collect::<Result<_, _>>()?;
    ensure!(!kib.is_empty(), "a process's memory is not told");
    Ok(kib.iter().sum::<u64>() << 10)
}
