//! Many pods, and what they leave.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use kubeception_tests::cri::{COREOS_KVM, wait_for_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left, processes};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, expect_start, in_guest};
use crate::measure::{AGENTS_CGROUP, SHIM, agents_memory, private_memory, process_of, settable};

const BOUND: Duration = Duration::from_secs(30);
/// In one pod.
const CONTAINERS: u32 = 20;
/// In a row, unless this variable of the environment has another number, after so many that fill what is kept for the next.
const EXECS: (&str, u64) = ("COREOS_KVM_EXECS", 1000);
const WARM_UP: u64 = 20;
/// Of the shim's memory by these, and of the agent's, in bytes. What each of them kept, a buffer of a stream or the record of a process,
/// would be a thousand times that.
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
            lab.trial_alone("execs in a row leave no file open, no process and no memory", execs),
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

/// What there is of processes on the node, by name and pid, with the number of their open files; of threads in the shim; of the
/// agent's files, processes and zombies in the guest, and of processes in a container.
fn open_files(lab: &Alone<'_>, sandbox: &str, container: &str) -> Result<BTreeMap<String, usize>> {
    let mut files = BTreeMap::new();
    for process in processes(&lab.node)? {
        let open = fs::read_dir(format!("/proc/{}/fd", process.pid));
        // What has just been asked may be at its end.
        if let Ok(open) = open {
            files.insert(format!("{} {}", process.pid, process.command), open.count());
        }
    }
    let shim = process_of(&lab.node, sandbox, SHIM)?.pid;
    files.insert(
        "threads of the shim".to_owned(),
        fs::read_dir(format!("/proc/{shim}/task"))?.count(),
    );
    let script = format!(
        "agent=$(systemctl show --property=MainPID --value coreos-kvm-agent.service)
        ls /proc/$agent/fd | wc -l
        cat {AGENTS_CGROUP}/agent/cgroup.procs | wc -l
        cat /proc/[0-9]*/stat 2> /dev/null | sed 's/.*) //' | grep -c \"^Z $agent \"
        cat {AGENTS_CGROUP}/{container}/pids.current"
    );
    let said = in_guest(&lab.node, sandbox, &["sh", "-c", &script])?;
    for (number, line) in said.lines().enumerate() {
        files.insert(format!("in the guest, {number}"), line.trim().parse()?);
    }
    Ok(files)
}

fn execs(lab: &mut Alone<'_>) -> Result<()> {
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "execs"), COREOS_KVM)?;
    let container = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
    let container = lab.cri.run(&own.id, &container, &own.pod)?;
    let run = |count: u64| {
        (0..count).try_for_each(|number| {
            let said = lab.cri.exec(&container, &["echo", &number.to_string()])?;
            ensure!(said.stdout.trim() == number.to_string(), "exec {number} said {said:?}");
            Ok(())
        })
    };
    let shim = process_of(&lab.node, &own.id, SHIM)?.pid;
    let memory = || anyhow::Ok((private_memory(shim)?, agents_memory(&lab.node, &own.id)?));
    run(WARM_UP)?;
    memory()?;
    // What is open at one time and not at the next is on its way.
    let files = eventually(BOUND, || {
        let files = open_files(lab, &own.id, &container)?;
        let then = open_files(lab, &own.id, &container)?;
        ensure!(files == then, "files come and go: {files:#?}, then {then:#?}");
        Ok(files)
    })?;
    let (before, begun, count) = (memory()?, Instant::now(), settable(EXECS)?);
    run(count)?;
    let took = begun.elapsed();
    eventually(BOUND, || {
        let now = open_files(lab, &own.id, &container)?;
        let more = now
            .iter()
            .filter(|(name, open)| files.get(*name).is_none_or(|before| before < *open));
        let more: Vec<_> = more.collect();
        ensure!(more.is_empty(), "there were {files:#?}, and are more: {more:#?}");
        let now = memory()?;
        let grown = (now.0.saturating_sub(before.0), now.1.saturating_sub(before.1));
        ensure!(
            grown.0 < GROWTH_MAX && grown.1 < GROWTH_MAX,
            "the shim has grown by {} KiB, the agent by {} KiB",
            grown.0 >> 10,
            grown.1 >> 10
        );
        eprintln!(
            "{count} execs took {:.1} s; the shim has {} KiB for itself, {} before; the agent {}, {} before",
            took.as_secs_f32(),
            now.0 >> 10,
            before.0 >> 10,
            now.1 >> 10,
            before.1 >> 10
        );
        Ok(())
    })?;
    own.remove()
}

fn churn(lab: &mut Alone<'_>) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(settable(CHURN)?);
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
