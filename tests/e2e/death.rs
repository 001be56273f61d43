//! What a pod's end looks like when it does not come in good order, and what containerd's own end does not change.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coreos_kvm_launcher::vsock::{self, VsockKind};
use k8s_cri::v1::{ContainerState, PodSandboxState};
use kubeception_tests::cri::{COREOS_KVM, Cri, message, read_log, wait_for_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Process, expect_nothing_left, processes};
use kubeception_tests::node::Node;
use kubeception_tests::pod::{Container, Pod};
use kubeception_tests::stream::{self, Session};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, expect_start, in_guest};
use crate::measure::{QEMU, SHIM};

const BOUND: Duration = Duration::from_secs(30);
/// How long it may take until a pod's status tells that its machine is of no use any more: less than 5 s, and as much again for what
/// another node does meanwhile.
const TOLD: Duration = Duration::from_secs(10);
/// How long a guest may take to end all that runs in it when it powers off.
const POWER_OFF: Duration = Duration::from_secs(60);
/// How long a call may last that waits for a guest which does nothing any more, and so for the end of the call's own time.
const UNANSWERED: Duration = Duration::from_secs(25);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial_alone("containerd's restart loses nothing", |lab| {
            goes_on(lab, Node::restart_containerd)
        }),
        lab.trial_alone(
            "QEMU killed: its containers end with 137 at once, nothing is left",
            |lab| ends(lab, TOLD, |_, victim| victim.signal(QEMU, Signal::SIGKILL)),
        ),
        lab.trial_alone("containerd killed: nothing is lost", |lab| {
            goes_on(lab, Node::crash_containerd)
        }),
        lab.trial_alone("the shim killed: the machine ends with it, nothing is left", |lab| {
            ends(lab, TOLD, |_, victim| victim.signal(SHIM, Signal::SIGKILL))
        }),
    ]
}

/// Those that need a machine each, on one containerd.
pub(crate) fn further_trials(lab: &Arc<Lab>) -> Vec<Trial> {
    let mut trials = vec![
        lab.trial_alone(
            "what serves the pod's files killed: its containers end with 137, nothing is left",
            |lab| {
                ends(lab, TOLD, |lab, victim| {
                    victim.signal(file_server(lab.machine_start()), Signal::SIGKILL)
                })
            },
        ),
        lab.trial_alone("the guest powered off: its containers end, nothing is left", |lab| {
            ends(lab, POWER_OFF, |lab, victim| {
                victim.last_words(lab, "systemctl poweroff");
                Ok(())
            })
        }),
    ];
    match lab.start {
        Start::Clone => trials.extend(trials_of_clones(lab)),
        // Where the kernel has the device there is no process.
        Start::Boot if vsock::kind() == VsockKind::VhostUser => trials.push(lab.trial_alone(
            "the vsock device killed: its containers end with 137, nothing is left",
            |lab| {
                ends(lab, TOLD, |_, victim| {
                    victim.signal("vhost-device-vsock", Signal::SIGKILL)
                })
            },
        )),
        Start::Boot => {}
    }
    trials
}

/// Those for which it does not matter how a machine has come to run: tried with those that are there sooner.
fn trials_of_clones(lab: &Arc<Lab>) -> [Trial; 4] {
    [
        lab.trial_alone(
            "the agent killed: its containers end with 137, nothing is left",
            |lab| {
                ends(lab, TOLD, |lab, victim| {
                    let agent = "$(systemctl show --property=MainPID --value coreos-kvm-agent.service)";
                    victim.last_words(lab, &format!("kill -9 {agent}"));
                    Ok(())
                })
            },
        ),
        lab.trial_alone(
            "the guest's kernel panicked: its containers end with 137, nothing is left",
            |lab| {
                ends(lab, TOLD, |lab, victim| {
                    victim.last_words(lab, "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger");
                    Ok(())
                })
            },
        ),
        lab.trial_alone(
            "the machine frozen: execs, port-forwards and statistics end in time, and the pod is stopped and removed",
            frozen_pod,
        ),
        lab.trial_alone(
            "the machine frozen: its container is stopped when it has had its grace",
            frozen_container,
        ),
    ]
}

fn idle() -> Container {
    Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"])
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
    let container = lab.cri.run(&own.id, &idle(), &own.pod)?;
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
    /// Sends a signal to those of the pod's processes that run `program`.
    fn signal(&self, program: &str, signal: Signal) -> Result<()> {
        let mut found = self
            .processes
            .iter()
            .filter(|process| process.command.contains(program))
            .peekable();
        ensure!(
            found.peek().is_some(),
            "there is no {program} among {:?}",
            self.processes
        );
        for process in found {
            kill(process.pid, signal).with_context(|| format!("sending {signal} to {}", process.command))?;
        }
        Ok(())
    }

    /// Runs a script in the guest that ends it: the answer may not come through any more.
    fn last_words(&self, lab: &Alone<'_>, script: &str) {
        let _ = in_guest(&lab.node, &self.own.id, &["sh", "-c", script]);
    }

    fn shim_is_gone(&self) -> bool {
        let mut shims = self.processes.iter().filter(|process| process.command.contains(SHIM));
        shims.all(|shim| kill(shim.pid, None).is_err())
    }

    /// Waits until the pod's status tells the end: the container's exit code is 137, as told by the shim (without a shim containerd
    /// may say 255, for "unknown"), and the pod is not ready.
    fn has_ended(&self, cri: &Cri, bound: Duration) -> Result<()> {
        let status = cri.wait_exited(&self.container, bound)?;
        ensure!(
            status.exit_code == 137 || (status.exit_code == 255 && self.shim_is_gone()),
            "the container's exit code is {}",
            status.exit_code
        );
        let deadline = Instant::now() + bound;
        while cri.pod_status(&self.own.id)?.state() == PodSandboxState::SandboxReady {
            ensure!(Instant::now() < deadline, "the pod is still called ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

/// What `accident` does to a pod is the pod's end, told by its status `within` that time.
fn ends(
    lab: &mut Alone<'_>,
    within: Duration,
    accident: impl FnOnce(&Alone<'_>, &Victim<'_>) -> Result<()>,
) -> Result<()> {
    let before = lab.snapshot()?;
    let victim = victim(lab)?;
    accident(lab, &victim)?;
    let begun = Instant::now();
    victim.has_ended(lab.cri, within.max(BOUND))?;
    took(begun, within, "the end was told")?;
    victim.own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

fn took(begun: Instant, at_most: Duration, what: &str) -> Result<()> {
    let took = begun.elapsed();
    ensure!(took < at_most, "{what} after {:.1} s", took.as_secs_f32());
    Ok(())
}

/// Without it the guest has no files any more: the machine ends.
fn file_server(start: Start) -> &'static str {
    match start {
        Start::Boot => "virtiofsd",
        Start::Clone => "coreos-kvm-share",
    }
}

/// The guest, QEMU with it, does nothing any more and is there all the same.
fn frozen<'a>(lab: &Alone<'a>) -> Result<Victim<'a>> {
    let victim = victim(lab)?;
    victim.signal(QEMU, Signal::SIGSTOP)?;
    Ok(victim)
}

fn frozen_pod(lab: &mut Alone<'_>) -> Result<()> {
    let before = lab.snapshot()?;
    let victim = frozen(lab)?;
    let begun = Instant::now();
    let error = lab.cri.exec(&victim.container, &["true"]).err();
    let error = message(&error.context("an exec in a frozen guest ended well")?);
    ensure!(error.contains("did not answer in time"), "the error is {error:?}");
    took(begun, UNANSWERED, "the exec failed")?;
    let begun = Instant::now();
    let url = lab.cri.port_forward_url(&victim.own.id, 80)?;
    let nothing = stream::ask_port(&lab.node, &url, 80, "GET / HTTP/1.0\r\n\r\n");
    ensure!(
        !nothing.as_ref().is_ok_and(|said| !said.is_empty()),
        "a port of a frozen guest says {nothing:?}"
    );
    took(begun, 2 * UNANSWERED, "the port-forward failed")?;
    let begun = Instant::now();
    ensure!(
        lab.cri.stats(&victim.container).is_err(),
        "a frozen guest has told a container's statistics"
    );
    took(begun, UNANSWERED, "the statistics failed")?;
    // Of the pod the node itself knows some.
    let begun = Instant::now();
    lab.cri.pod_stats(&victim.own.id)?;
    took(begun, UNANSWERED, "the pod's statistics came")?;

    let begun = Instant::now();
    lab.cri.stop_pod(&victim.own.id)?;
    took(begun, UNANSWERED, "the pod was stopped")?;
    victim.has_ended(lab.cri, BOUND)?;
    victim.own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

/// As a kubelet stops a container whose liveness probe fails: neither SIGTERM nor SIGKILL is answered.
fn frozen_container(lab: &mut Alone<'_>) -> Result<()> {
    const GRACE: Duration = Duration::from_secs(1);

    let before = lab.snapshot()?;
    let victim = frozen(lab)?;
    let begun = Instant::now();
    lab.cri.stop(&victim.container, GRACE)?;
    took(begun, 2 * UNANSWERED, "the container was stopped")?;
    victim.has_ended(lab.cri, BOUND)?;
    victim.own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

/// Containerd ends and comes again while a container writes its log and somebody has an exec open.
fn goes_on(lab: &mut Alone<'_>, again: fn(&mut Node) -> Result<()>) -> Result<()> {
    let before = lab.snapshot()?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "survivor"), COREOS_KVM)?;
    let script = "i=0; while :; do i=$((i + 1)); echo tick $i; sleep 0.2; done";
    let container = Container::script("survivor", script);
    let id = lab.cri.run(&own.id, &container, &own.pod)?;
    let log = container.log(&own.pod);
    wait_for_log(&log, BOUND, |line| line.text == "tick 3")?;
    let mut session = Session::open(&lab.node, &lab.cri.exec_url(&id, &["sh"], false)?)?;
    session.send("echo open\n")?;
    session.read_until("open", BOUND)?;
    let started = lab.cri.status(&id)?.started_at;

    again(&mut lab.node)?;

    // The client's first call finds its connection gone.
    let after = eventually(BOUND, || lab.cri.status(&id))?;
    ensure!(
        after.state() == ContainerState::ContainerRunning,
        "the container is {}",
        after.state().as_str_name()
    );
    ensure!(after.started_at == started, "the container was started anew");
    let pod = lab.cri.pod_status(&own.id)?;
    ensure!(
        pod.state() == PodSandboxState::SandboxReady,
        "the pod is {}",
        pod.state().as_str_name()
    );
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
    let code = lab.cri.status(&id)?.exit_code;
    ensure!(code == 137, "its exit code is {code}");
    own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}
