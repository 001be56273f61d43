//! Many pods, and what they leave.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::{COREOS_KVM, wait_for_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left, processes};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;
use nix::unistd::Pid;

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, expect_start, in_guest};

const SHIM: &str = "containerd-shim-coreos-kvm";
const BOUND: Duration = Duration::from_secs(30);
/// In one pod.
const CONTAINERS: u32 = 20;
/// In a row, after so many that fill what is kept for the next.
const EXECS: u32 = 100;
const WARM_UP: u32 = 10;
/// Of the shim's memory by these, in bytes. What each of them kept would be a hundred times that.
const GROWTH_MAX: u64 = 512 << 10;

const PODS: u32 = 20;
/// At a time: as many as the smallest machine for the tests has processors.
const AT_A_TIME: u32 = 2;
/// At a time when they come and go, as on a node where much happens.
const CROWD: u32 = 10;
/// For so many seconds they come and go, unless this variable of the environment has another number.
const CHURN: (&str, u64) = ("COREOS_KVM_CHURN_SECONDS", 60);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    let mut trials = vec![
        lab.trial_alone("20 pods, started and removed, leave the machine as it was", |lab| {
            pods(lab, AT_A_TIME, |number| number <= PODS)
        }),
    ];
    // Ten machines that boot take most of the time with that, and the others are not about how a machine starts.
    if lab.start == Start::Clone {
        trials.extend([
            lab.trial_alone(
                "10 pods at a time, started and removed over and over, leave the machine as it was",
                churn,
            ),
            lab.trial_alone("a pod of 20 containers, each with its own output", containers),
            lab.trial_alone("100 execs leave no file open, no process and no memory", execs),
        ]);
    }
    trials
}

fn containers(lab: &mut Alone<'_>) -> Result<()> {
    let before = lab.snapshot()?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "many-containers"), COREOS_KVM)?;
    let mut running = Vec::new();
    for number in 0..CONTAINERS {
        let script = format!("echo container {number}; sleep 2147483647; :");
        let container = Container::script(&format!("one-of-many-{number}"), &script);
        running.push((lab.cri.run(&own.id, &container, &own.pod)?, container.log(&own.pod)));
    }
    for (number, (id, log)) in running.iter().enumerate() {
        wait_for_log(log, BOUND, |line| line.text == format!("container {number}"))?;
        let said = lab.cri.exec(id, &["cat", "/proc/1/cmdline"])?;
        ensure!(said.stdout.contains(&format!("container {number};")), "{said:?}");
    }
    own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

/// What there is of processes on the node and in the guest, by name and pid, with the number of their open files.
fn open_files(lab: &Alone<'_>, sandbox: &str) -> Result<BTreeMap<String, usize>> {
    let mut files = BTreeMap::new();
    for process in processes(&lab.node)? {
        let open = fs::read_dir(format!("/proc/{}/fd", process.pid));
        // What has just been asked may be at its end.
        if let Ok(open) = open {
            files.insert(format!("{} {}", process.pid, process.command), open.count());
        }
    }
    let agent = "ls /proc/$(systemctl show --property=MainPID --value coreos-kvm-agent.service)/fd | wc -l; \
        cat /sys/fs/cgroup/system.slice/coreos-kvm-agent.service/agent/cgroup.procs | wc -l";
    for (number, line) in in_guest(&lab.node, sandbox, &["sh", "-c", agent])?.lines().enumerate() {
        files.insert(format!("in the guest, {number}"), line.trim().parse()?);
    }
    Ok(files)
}

fn execs(lab: &mut Alone<'_>) -> Result<()> {
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "execs"), COREOS_KVM)?;
    let container = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
    let container = lab.cri.run(&own.id, &container, &own.pod)?;
    let run = |count: u32| {
        (0..count).try_for_each(|number| {
            let said = lab.cri.exec(&container, &["echo", &number.to_string()])?;
            ensure!(said.stdout.trim() == number.to_string(), "exec {number} said {said:?}");
            Ok(())
        })
    };
    let shim = processes(&lab.node)?
        .into_iter()
        .find(|process| process.command.contains(SHIM) && process.command.contains(&own.id));
    let shim = shim.context("the pod has no shim")?.pid;
    run(WARM_UP)?;
    // What is open at one time and not at the next is on its way.
    let files = eventually(BOUND, || {
        let files = open_files(lab, &own.id)?;
        ensure!(files == open_files(lab, &own.id)?, "files come and go");
        Ok(files)
    })?;
    let memory = private_memory(shim)?;
    run(EXECS)?;
    eventually(BOUND, || {
        let now = open_files(lab, &own.id)?;
        let more = now
            .iter()
            .filter(|(name, open)| files.get(*name).is_none_or(|before| before < *open));
        let more: Vec<_> = more.collect();
        ensure!(more.is_empty(), "there were {files:#?}, and are more: {more:#?}");
        let grown = private_memory(shim)?.saturating_sub(memory);
        ensure!(grown < GROWTH_MAX, "the shim has grown by {} KiB", grown >> 10);
        Ok(())
    })?;
    own.remove()
}

/// In bytes: proc_pid_smaps_rollup(5) has KiB.
fn private_memory(pid: Pid) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let lines = rollup.lines().filter_map(|line| line.strip_prefix("Private_Dirty:"));
    let kib: u64 = lines
        .filter_map(|line| line.split_whitespace().next()?.parse::<u64>().ok())
        .sum();
    Ok(kib << 10)
}

fn churn(lab: &mut Alone<'_>) -> Result<()> {
    let (variable, seconds) = CHURN;
    let seconds = match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is {text:?}"))?,
        Err(_) => seconds,
    };
    let end = Instant::now() + Duration::from_secs(seconds);
    pods(lab, CROWD, |_| Instant::now() < end)
}

/// Pods one after another, so many at a time, as long as another one is wanted.
fn pods(lab: &mut Alone<'_>, at_a_time: u32, wanted: impl Fn(u32) -> bool + Sync) -> Result<()> {
    // The first makes what stays: the bridge, the chains of the port translation.
    one_pod(lab, 0)?;
    let before = Snapshot::take(&lab.node)?;
    let next = AtomicU32::new(1);
    std::thread::scope(|scope| {
        let (lab, next, wanted) = (&*lab, &next, &wanted);
        let workers: Vec<_> = (0..at_a_time)
            .map(|_| {
                scope.spawn(move || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if !wanted(number) {
                            return anyhow::Ok(());
                        }
                        one_pod(lab, number)?;
                    }
                })
            })
            .collect();
        for worker in workers {
            match worker.join() {
                Ok(outcome) => outcome?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        anyhow::Ok(())
    })?;
    expect_nothing_left(&lab.node, &before, Duration::from_secs(30))
}

fn one_pod(lab: &Alone<'_>, number: u32) -> Result<()> {
    let port = u16::try_from(20_000 + number)?;
    let pod = Pod::new(lab.node.place(), &format!("pod-{number}")).host_port(8080, port);
    let own = OwnPod::run(lab.cri, pod, COREOS_KVM)?;
    expect_start(lab.node.place(), &own.id, lab.machine_start())?;
    // As large as an exit code may be.
    let code = number % 256;
    let container = Container::script("says", &format!("exit {code}"));
    let container = lab.cri.run(&own.id, &container, &own.pod)?;
    let status = lab.cri.wait_exited(&container, Duration::from_secs(30))?;
    ensure!(
        status.exit_code == i32::try_from(code)?,
        "pod {number}: exit code {}",
        status.exit_code
    );
    own.remove()
}
