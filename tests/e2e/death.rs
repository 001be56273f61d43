//! What a pod's end looks like when it does not come in good order, and what containerd's own end does not change.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::{ContainerState, PodSandboxState};
use kubeception_tests::cri::{COREOS_KVM, Cri, read_log, wait_for_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Process, Snapshot, expect_nothing_left, processes};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, expect_start, in_guest};

const BOUND: Duration = Duration::from_secs(30);
const SHIM: &str = "containerd-shim-coreos-kvm";

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial_alone("containerd's restart loses nothing", restart),
        lab.trial_alone(
            "QEMU killed: its containers end with 137 at once, nothing is left",
            |lab| killed(lab, &["qemu-system"], Duration::from_secs(5)),
        ),
    ]
}

/// Those that need a machine each, on one containerd.
pub(crate) fn further_trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial_alone("the shim killed: the machine ends with it, nothing is left", |lab| {
            killed(lab, &[SHIM], Duration::from_secs(10))
        }),
        lab.trial_alone(
            "what serves the pod's files killed: its containers end, nothing is left",
            |lab| killed(lab, &[file_server(lab.machine_start())], BOUND),
        ),
        lab.trial_alone(
            "the guest powered off: its containers end, nothing is left",
            powered_off,
        ),
    ]
}

/// A pod with one container, and the processes it brought.
struct Victim<'a> {
    own: OwnPod<'a>,
    container: String,
    processes: Vec<Process>,
}

fn victim<'a>(lab: &Alone<'a>) -> Result<Victim<'a>> {
    let before = processes(&lab.node)?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "victim"), COREOS_KVM)?;
    expect_start(lab.node.place(), &own.id, lab.machine_start())?;
    let container = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
    let container = lab.cri.run(&own.id, &container, &own.pod)?;
    let processes = processes(&lab.node)?
        .into_iter()
        .filter(|process| !before.contains(process))
        .collect();
    Ok(Victim {
        own,
        container,
        processes,
    })
}

impl Victim<'_> {
    fn kill(&self, program: &str) -> Result<()> {
        let mut killed = 0;
        for process in self
            .processes
            .iter()
            .filter(|process| process.command.contains(program))
        {
            kill(process.pid, Signal::SIGKILL).with_context(|| format!("killing {}", process.command))?;
            killed += 1;
        }
        ensure!(killed > 0, "there is no {program} among {:?}", self.processes);
        Ok(())
    }

    fn shim_is_gone(&self) -> bool {
        let mut shims = self.processes.iter().filter(|process| process.command.contains(SHIM));
        shims.all(|shim| kill(shim.pid, None).is_err())
    }

    /// With 137, as told by the shim; without a shim containerd may say 255, for "unknown".
    fn container_ended(&self, cri: &Cri, within: Duration) -> Result<()> {
        let begun = Instant::now();
        let status = cri.wait_exited(&self.container, BOUND)?;
        let took = begun.elapsed();
        ensure!(
            status.exit_code == 137 || (status.exit_code == 255 && self.shim_is_gone()),
            "the container's exit code is {}",
            status.exit_code
        );
        ensure!(
            took < within,
            "the container's end was seen after {:.1} s",
            took.as_secs_f32()
        );
        Ok(())
    }
}

fn killed(lab: &mut Alone<'_>, programs: &[&str], within: Duration) -> Result<()> {
    let before = Snapshot::take(&lab.node)?;
    let victim = victim(lab)?;
    for program in programs {
        victim.kill(program)?;
    }
    victim.container_ended(lab.cri, within)?;
    let deadline = Instant::now() + BOUND;
    while lab.cri.pod_status(&victim.own.id)?.state() == PodSandboxState::SandboxReady {
        ensure!(Instant::now() < deadline, "the pod is still called ready");
        std::thread::sleep(Duration::from_millis(50));
    }
    victim.own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

/// Without it the guest has no files any more: the machine ends.
fn file_server(start: Start) -> &'static str {
    match start {
        Start::Boot => "virtiofsd",
        Start::Clone => "coreos-kvm-share",
    }
}

fn powered_off(lab: &mut Alone<'_>) -> Result<()> {
    let before = Snapshot::take(&lab.node)?;
    let victim = victim(lab)?;
    // The answer may not come through any more.
    let _ = in_guest(&lab.node, &victim.own.id, &["systemctl", "poweroff"]);
    let status = lab.cri.wait_exited(&victim.container, Duration::from_secs(60))?;
    ensure!(status.exit_code != 0, "the container's exit code is 0");
    victim.own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

fn restart(lab: &mut Alone<'_>) -> Result<()> {
    let shared = lab.shared()?;
    let script = "i=0; while :; do i=$((i + 1)); echo tick $i; sleep 0.2; done";
    let container = Container::script("survivor", script);
    let id = lab.cri.run(&shared.id, &container, &shared.pod)?;
    let log = container.log(&shared.pod);
    wait_for_log(&log, BOUND, |line| line.text == "tick 3")?;
    let before = lab.cri.status(&id)?;

    lab.node.restart_containerd()?;

    // The client's first call finds its connection gone.
    let after = eventually(BOUND, || lab.cri.status(&id))?;
    ensure!(
        after.state() == ContainerState::ContainerRunning,
        "the container is {}",
        after.state().as_str_name()
    );
    ensure!(after.started_at == before.started_at, "the container was started anew");
    let seen = read_log(&log)?.len();
    wait_for_log(&log, BOUND, |line| line.text == format!("tick {}", seen + 10))?;
    ensure!(
        lab.cri.exec(&id, &["echo", "well"])?.stdout == "well\n",
        "an exec is not answered"
    );
    // No tick is missing or doubled.
    for (number, line) in (1..).zip(read_log(&log)?) {
        ensure!(
            line.text == format!("tick {number}"),
            "line {number} of the log is {:?}",
            line.text
        );
    }
    lab.cri.stop(&id, Duration::ZERO)?;
    ensure!(
        lab.cri.status(&id)?.exit_code == 137,
        "its exit code is {}",
        lab.cri.status(&id)?.exit_code
    );
    lab.cri.remove(&id)
}
