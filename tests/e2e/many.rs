//! Many pods, and what they leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab, OwnPod, Start, expect_start};

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
    if lab.start == Start::Clone {
        trials.push(lab.trial_alone(
            "10 pods at a time, started and removed over and over, leave the machine as it was",
            churn,
        ));
    }
    trials
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
