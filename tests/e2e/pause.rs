//! Containers and pods that stand still for a while.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::cri::{COREOS_KVM, read_log, wait_for_log};
use kubeception_tests::node::Sandboxer;
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::lab::{Lab, OwnPod, Together, eventually};

const BOUND: Duration = Duration::from_secs(30);
/// How long a log does not grow when its container stands still, which writes ten times as often.
const STILL: Duration = Duration::from_millis(500);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![lab.trial(
        "a container stands still while it is paused, all of a pod while that is, and a paused pod can be stopped",
        paused,
    )]
}

fn paused(lab: &Together<'_>) -> Result<()> {
    let own = OwnPod::run(lab, Pod::new(lab.node.place(), "paused"), COREOS_KVM)?;
    let ticking = |name: &str| -> Result<_> {
        let container = Container::script(name, "i=0; while :; do i=$((i + 1)); echo tick $i; sleep 0.05; done");
        Ok((lab.run(&own.id, &container, &own.pod)?, container.log(&own.pod)))
    };
    let (one, one_log) = ticking("one")?;
    let (_, other_log) = ticking("other")?;

    task(lab, "pause", &one)?;
    stands_still(&one_log)?;
    goes_on(&other_log)?;
    task(lab, "resume", &one)?;
    goes_on(&one_log)?;

    // Where the sandboxes are the shim's, they are no tasks.
    if lab.sandboxer() == Sandboxer::PodSandbox {
        task(lab, "pause", &own.id)?;
        stands_still(&one_log)?;
        stands_still(&other_log)?;
        task(lab, "resume", &own.id)?;
        goes_on(&one_log)?;
        goes_on(&other_log)?;
        task(lab, "pause", &own.id)?;
    }
    own.remove()
}

/// Has containerd pause or resume a task, and tell that it did.
fn task(lab: &Together<'_>, what: &str, id: &str) -> Result<()> {
    let ctr = |arguments: &[&str]| -> Result<String> {
        let output = lab.node.command("ctr").arg("task").args(arguments).output()?;
        ensure!(
            output.status.success(),
            "ctr task {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    ctr(&[what, id])?;
    let tasks = ctr(&["ls"])?;
    let expected = if what == "pause" { "PAUSED" } else { "RUNNING" };
    ensure!(
        tasks.lines().any(|line| line.contains(id) && line.contains(expected)),
        "{id} is not {expected}: {tasks}"
    );
    Ok(())
}

/// What was on its way arrives, and then nothing.
fn stands_still(log: &Path) -> Result<()> {
    eventually(BOUND, || {
        let before = read_log(log)?.len();
        std::thread::sleep(STILL);
        let after = read_log(log)?.len();
        ensure!(after == before, "{} lines were written meanwhile", after - before);
        Ok(())
    })
}

fn goes_on(log: &Path) -> Result<()> {
    let seen = read_log(log)?.len();
    wait_for_log(log, BOUND, |line| line.text == format!("tick {}", seen + 5))?;
    Ok(())
}
