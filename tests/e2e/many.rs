//! Many pods, and what they leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab, OwnPod, expect_start};

const PODS: u32 = 20;
/// At a time: as many as the smallest machine for the tests has processors.
const AT_A_TIME: u32 = 2;

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![lab.trial_alone("20 pods, started and removed, leave the machine as it was", twenty_pods)]
}

fn twenty_pods(lab: &mut Alone<'_>) -> Result<()> {
    // The first makes what stays: the bridge, the chains of the port translation.
    one_pod(lab, 0)?;
    let before = Snapshot::take(&lab.node)?;
    let next = AtomicU32::new(1);
    std::thread::scope(|scope| {
        let lab = &*lab;
        let workers: Vec<_> = (0..AT_A_TIME)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number > PODS {
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
    let container = Container::script("says", &format!("exit {number}"));
    let container = lab.cri.run(&own.id, &container, &own.pod)?;
    let status = lab.cri.wait_exited(&container, Duration::from_secs(30))?;
    ensure!(
        status.exit_code == i32::try_from(number)?,
        "pod {number}: exit code {}",
        status.exit_code
    );
    own.remove()
}
