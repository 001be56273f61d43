//! What pods and containers are said to use, held against what the kernels say.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::{ContainerStats, CpuUsage, MemoryUsage, UInt64Value};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::cri::{COREOS_KVM, wait_for_log};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;
use nix::unistd::Pid;

use crate::lab::{Lab, OwnPod, Start, Together, eventually};
use crate::measure::{AGENTS_CGROUP, QEMU, SHIM, process_of};
use crate::pod_cgroup::{PodCgroup, value};

const BOUND: Duration = Duration::from_secs(30);
/// What a container holds in memory, and what it writes to its root file system, in bytes.
const HELD: u64 = 32 << 20;
const WRITTEN: u64 = 8 << 20;
/// Processor time that it takes at least to count to 30000 in a shell, in nanoseconds.
const WORK: u64 = 10_000_000;
/// How much of a container's memory comes and goes while it is looked at, and of a machine's, in bytes.
const ABOUT: u64 = 1 << 20;
const ABOUT_MACHINE: u64 = 8 << 20;

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    // What a machine that boots has around it, it has with all containerds.
    if lab.start == Start::Boot && lab.version != Containerd::V2_1 {
        return Vec::new();
    }
    vec![
        lab.trial(
            "statistics of a container are its cgroup's in the guest, those of a pod are its cgroup's on the node",
            statistics,
        ),
        lab.trial("all of a pod is in its slice, where systemd has the cgroups", slice),
    ]
}

fn statistics(lab: &Together<'_>) -> Result<()> {
    let cgroup = PodCgroup::make(lab.node.place(), "measured")?;
    let pod = cgroup.takes(Pod::new(lab.node.place(), "measured"));
    let own = OwnPod::run(lab, pod, COREOS_KVM)?;
    // With each word it has something to do.
    let script = format!(
        "head -c {HELD} /dev/zero > /dev/shm/held; head -c {WRITTEN} /dev/zero > /written; mkfifo /dev/shm/words
        sleep 2147483647 & sleep 2147483647 & echo ready
        while read word < /dev/shm/words; do i=0; while [ $i -lt 30000 ]; do i=$((i + 1)); done; echo done $word; done"
    );
    let container = Container::script("measured", &script);
    let id = lab.run(&own.id, &container, &own.pod)?;
    let log = container.log(&own.pod);
    wait_for_log(&log, BOUND, |line| line.text == "ready")?;

    let measured = Measured {
        lab,
        own: &own,
        id: &id,
    };
    let first = measured.container()?;
    let pods_first = measured.pod(&cgroup)?;
    lab.exec(&id, &["sh", "-c", "echo first > /dev/shm/words"])?;
    wait_for_log(&log, BOUND, |line| line.text == "done first")?;
    let second = measured.container()?;
    let pods_second = measured.pod(&cgroup)?;
    // The guest's time also passes when the node has no processor for it: by how much each has grown says nothing of the other.
    let (container, pod) = (second - first, pods_second - pods_first);
    ensure!(
        container > WORK && pod > WORK,
        "the container has taken {container} ns of processor time, its pod {pod} ns"
    );
    measured.written()?;
    own.remove()
}

/// A kubelet that leaves cgroups to systemd names a slice.
fn slice(lab: &Together<'_>) -> Result<()> {
    let cgroup = PodCgroup::slice(lab.node.place(), "pod")?;
    let own = OwnPod::run(lab, cgroup.takes(Pod::new(lab.node.place(), "slice")), COREOS_KVM)?;
    let shim = process_of(&lab.node, &own.id, SHIM)?.pid;
    expect_inside(&cgroup, shim, process_of(&lab.node, &own.id, QEMU)?.pid)?;
    own.remove()
}

/// Fails unless all that the shim has started is in the pod's cgroup.
fn expect_inside(cgroup: &PodCgroup, shim: Pid, qemu: Pid) -> Result<()> {
    let all = descendants(shim)?;
    ensure!(all.contains(&qemu) && all.len() > 1, "the shim has started {all:?}");
    for process in all {
        ensure!(
            cgroup.has(process)?,
            "{} is not in the pod's cgroup",
            fs::read_to_string(format!("/proc/{process}/cmdline")).unwrap_or_default()
        );
    }
    Ok(())
}

struct Measured<'a> {
    lab: &'a Together<'a>,
    own: &'a OwnPod<'a>,
    id: &'a str,
}

/// What a container's cgroup says.
#[derive(Debug)]
struct Cgroup {
    cpu_ns: u64,
    usage: u64,
    working_set: u64,
    anonymous: u64,
    pids: u64,
    /// Of its first process, in nanoseconds.
    first: u64,
}

impl Measured<'_> {
    /// Fails unless the container's statistics are what its cgroup says, before and behind; answers its processor time.
    fn container(&self) -> Result<u64> {
        let before = self.in_guest()?;
        let stats = self.lab.stats(self.id)?;
        let after = self.in_guest()?;
        let look = || format!("the container's statistics are {stats:?}; its cgroup said {before:?}, then {after:?}");
        let cpu = cpu_of(&stats.cpu).with_context(look)?;
        ensure!((before.cpu_ns..=after.cpu_ns).contains(&cpu), look());
        ensure!(before.first <= cpu, look());
        let memory = stats.memory.as_ref().with_context(look)?;
        let working_set = of(&memory.working_set_bytes).with_context(look)?;
        ensure!(
            working_set >= HELD && near(working_set, after.working_set, ABOUT),
            look()
        );
        // Not all containerds tell these.
        for (told, is) in [
            (of(&memory.usage_bytes), after.usage),
            (of(&memory.rss_bytes), after.anonymous),
        ] {
            ensure!(told.is_none_or(|told| near(told, is, ABOUT)), look());
        }
        ensure!(before.pids == 3 && after.pids == 3, look());
        Ok(cpu)
    }

    fn in_guest(&self) -> Result<Cgroup> {
        let script = format!(
            "cd {AGENTS_CGROUP}/{} && cat cpu.stat memory.stat \
             && echo current $(cat memory.current) && echo pids $(cat pids.current) \
             && echo ticks $(awk '{{ print $14 + $15 }}' /proc/$(head -n 1 cgroup.procs)/stat)",
            self.id
        );
        let said = self.lab.in_guest(&self.own.id, &["sh", "-c", &script])?;
        let usage = value(&said, "current")?;
        Ok(Cgroup {
            cpu_ns: value(&said, "usage_usec")? * 1000,
            usage,
            working_set: usage - value(&said, "inactive_file")?,
            anonymous: value(&said, "anon")?,
            pids: value(&said, "pids")?,
            first: value(&said, "ticks")? * 10_000_000,
        })
    }

    /// Fails unless the pod's statistics are what its cgroup says, before and behind, and all of its processes are in that; answers
    /// its processor time.
    fn pod(&self, cgroup: &PodCgroup) -> Result<u64> {
        let shim = process_of(&self.lab.node, &self.own.id, SHIM)?.pid;
        let qemu = process_of(&self.lab.node, &self.own.id, QEMU)?.pid;
        expect_inside(cgroup, shim, qemu)?;
        let qemus = process_time(qemu)?;
        let before = (cgroup.cpu()?, cgroup.working_set()?);
        let stats = self.lab.pod_stats(&self.own.id)?;
        let after = (cgroup.cpu()?, cgroup.working_set()?);
        let look = || {
            format!(
                "the pod's statistics are {stats:?}; its cgroup said {before:?}, then {after:?} (processor time and working set)"
            )
        };
        let linux = stats.linux.as_ref().with_context(look)?;
        let cpu = cpu_of(&linux.cpu).with_context(look)?;
        ensure!((before.0..=after.0).contains(&cpu), look());
        ensure!(cpu >= qemus, "QEMU has taken {qemus} ns; {}", look());
        let memory = working_set(&linux.memory).with_context(look)?;
        ensure!(near(memory, after.1, ABOUT_MACHINE), look());
        // Of what a clone shares with others nothing is on its pod's account.
        let status = fs::read_to_string(format!("/proc/{qemu}/status"))?;
        let anonymous = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:")?.strip_suffix("kB"));
        let anonymous = anonymous.context("QEMU's memory is not told")?.trim().parse::<u64>()? << 10;
        ensure!(
            memory + ABOUT_MACHINE >= anonymous,
            "QEMU has {anonymous} bytes for itself; {}",
            look()
        );
        let count = linux.process.as_ref().and_then(|process| of(&process.process_count));
        ensure!(count == Some(3), look());
        let named = |stats: &ContainerStats| {
            let attributes = stats.attributes.as_ref();
            attributes.is_some_and(|attributes| attributes.id == self.id)
        };
        ensure!(linux.containers.iter().any(named), look());
        Ok(cpu)
    }

    /// containerd looks at what containers write every 10 s.
    fn written(&self) -> Result<()> {
        eventually(BOUND, || {
            let layer = self.lab.stats(self.id)?.writable_layer;
            let used = layer.as_ref().and_then(|layer| of(&layer.used_bytes));
            ensure!(
                used.is_some_and(|used| near(used, WRITTEN, ABOUT)),
                "what it has written is told as {layer:?}"
            );
            Ok(())
        })
    }
}

fn of(value: &Option<UInt64Value>) -> Option<u64> {
    value.as_ref().map(|value| value.value)
}

fn cpu_of(cpu: &Option<CpuUsage>) -> Option<u64> {
    of(&cpu.as_ref()?.usage_core_nano_seconds)
}

fn working_set(memory: &Option<MemoryUsage>) -> Option<u64> {
    of(&memory.as_ref()?.working_set_bytes)
}

fn near(told: u64, is: u64, about: u64) -> bool {
    told.abs_diff(is) <= about
}

/// Processor time of a process, in nanoseconds: proc_pid_stat(5), fields 14 and 15, which are in ticks of 10 ms and rounded down.
fn process_time(process: Pid) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    let fields = stat.rsplit_once(')').context("a process has no name")?.1;
    let ticks = fields.split_ascii_whitespace().skip(11).take(2);
    let ticks: Vec<u64> = ticks.map(str::parse).collect::<Result<_, _>>()?;
    Ok(ticks.iter().sum::<u64>() * 10_000_000)
}

/// The children of a process, and theirs.
fn descendants(process: Pid) -> Result<Vec<Pid>> {
    let mut all = Vec::new();
    for task in fs::read_dir(format!("/proc/{process}/task"))? {
        let children = fs::read_to_string(task?.path().join("children"))?;
        for child in children.split_ascii_whitespace() {
            let child = Pid::from_raw(child.parse()?);
            all.push(child);
            all.extend(descendants(child)?);
        }
    }
    Ok(all)
}
