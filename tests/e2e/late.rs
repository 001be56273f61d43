//! A client that does not wait any longer, while the guest has its own time: what it wanted has one outcome all the same.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status;
use k8s_cri::v1::ContainerState;
use kubeception_tests::cri::{COREOS_KVM, message};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::expect_nothing_left;
use kubeception_tests::node::Node;
use kubeception_tests::pod::{Container, Pod};
use kubeception_tests::task::Task;
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, in_guest};
use crate::measure::{QEMU, process_of};

const BOUND: Duration = Duration::from_secs(30);
/// What a client waits that soon does not any more.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    // How the machine has come to run does not matter.
    if lab.start == Start::Boot {
        return Vec::new();
    }
    vec![lab.trial_alone(
        "a start that the client gives up while the guest is halted: the container ends or runs, and its pod goes on",
        start_given_up,
    )]
}

/// A process that does nothing until this is dropped: QEMU, for one, and its guest with it.
pub(crate) struct Halted(Vec<Pid>);

impl Halted {
    pub(crate) fn new(process: Pid) -> Result<Self> {
        kill(process, Signal::SIGSTOP).context("halting a process")?;
        Ok(Self(vec![process]))
    }

    /// containerd, with nsenter, its parent, which halts itself when its child is halted.
    pub(crate) fn containerd(node: &Node) -> Result<Self> {
        let containerd = node.containerd()?.context("there is no containerd")?;
        let status = fs::read_to_string(format!("/proc/{containerd}/status"))?;
        let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
        let parent = Pid::from_raw(parent.context("containerd has no parent")?.trim().parse()?);
        let mut halted = Self::new(containerd)?;
        halted.0.push(parent);
        Ok(halted)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        for process in &self.0 {
            if let Err(error) = kill(*process, Signal::SIGCONT) {
                eprintln!("process {process} cannot go on: {error}");
            }
        }
    }
}

fn start_given_up(lab: &mut Alone<'_>) -> Result<()> {
    let before = lab.snapshot()?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "given-up"), COREOS_KVM)?;
    let qemu = process_of(&lab.node, &own.id, QEMU)?.pid;
    given_up_by_cri(lab, &own, qemu)?;
    runs_all_the_same(lab, &own, qemu)?;
    killed_before_it_runs(lab, &own, qemu)?;

    // The guest has nothing of them.
    let agents = in_guest(&lab.node, &own.id, &["ls", "/run/coreos-kvm/containers/bundles"])?;
    ensure!(agents.trim().is_empty(), "the guest has {agents}");
    works(lab, &own, "last")?;
    own.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

fn sleeper(name: &str) -> Container {
    Container::new(name, BUSYBOX).command(&["sleep", "2147483647"])
}

/// A further container in the pod runs, answers and goes.
fn works(lab: &Alone<'_>, own: &OwnPod<'_>, name: &str) -> Result<()> {
    let container = lab.cri.run(&own.id, &sleeper(name), &own.pod)?;
    let said = lab.cri.exec(&container, &["echo", "well"])?;
    ensure!(said.stdout == "well\n", "an exec says {said:?}");
    lab.cri.stop(&container, Duration::ZERO)?;
    lab.cri.remove(&container)
}

/// As a kubelet starts it: containerd tidies up behind a start that fails.
fn given_up_by_cri(lab: &Alone<'_>, own: &OwnPod<'_>, qemu: Pid) -> Result<()> {
    let container = lab.cri.create(&own.id, &sleeper("by-cri"), &own.pod)?;
    let halted = Halted::new(qemu)?;
    let error = lab.cri.start_within(&container, PATIENCE).err();
    error.context("a container starts in a guest that is halted")?;
    drop(halted);
    let status = lab.cri.wait_exited(&container, BOUND)?;
    ensure!(
        status.state() == ContainerState::ContainerExited && status.exit_code != 0 && status.reason == "StartError",
        "it has ended with {}, {:?}",
        status.exit_code,
        status.reason
    );
    lab.cri.remove(&container)?;
    works(lab, own, "after-cri")
}

/// A start that has come to the guest is carried through, whoever has asked for it.
fn runs_all_the_same(lab: &Alone<'_>, own: &OwnPod<'_>, qemu: Pid) -> Result<()> {
    let container = lab.cri.create(&own.id, &sleeper("runs"), &own.pod)?;
    let task = Task::create(lab.cri, &container, None)?;
    let halted = Halted::new(qemu)?;
    let error = task.start_within(PATIENCE).err();
    error.context("a container starts in a guest that is halted")?;
    drop(halted);
    eventually(BOUND, || {
        let status = task.status()?;
        ensure!(status == Status::Running, "it is {}", status.as_str_name());
        Ok(())
    })?;
    let again = task.start().err().context("it starts twice")?;
    ensure!(
        message(&again).contains("already"),
        "the second start says {}",
        message(&again)
    );
    task.kill(Signal::SIGKILL)?;
    let exit = task.ended(BOUND)?;
    ensure!(exit == 137, "its exit code is {exit}");
    lab.cri.remove(&container)?;
    works(lab, own, "after-it-ran")
}

/// The client kills what it did not see start, as containerd does, while the guest is still halted: start and signal come to it together.
fn killed_before_it_runs(lab: &Alone<'_>, own: &OwnPod<'_>, qemu: Pid) -> Result<()> {
    let container = lab.cri.create(&own.id, &sleeper("killed"), &own.pod)?;
    let task = Task::create(lab.cri, &container, None)?;
    let halted = Halted::new(qemu)?;
    let error = task.start_within(PATIENCE).err();
    error.context("a container starts in a guest that is halted")?;
    let error = task.kill_within(Signal::SIGKILL, PATIENCE).err();
    error.context("a halted guest ends a container")?;
    drop(halted);
    let exit = task.ended(BOUND)?;
    ensure!(exit == 137, "its exit code is {exit}");
    lab.cri.remove(&container)?;
    works(lab, own, "after-the-kill")
}
