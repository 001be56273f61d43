//! Pods whose sandboxes are the shim's: what is the shim's to do then, and that all else goes on as with containerd's own.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{expect_nothing_left, processes};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab, TEMPLATE, Together};
use crate::measure::QEMU;
use crate::{container, death, events, machine, network, processes, stats};

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial("containers share the pod's /dev/shm, and have its files in /etc", files),
        lab.trial_alone(
            "a pod that the client gives up while its machine boots leaves nothing",
            given_up,
        ),
    ]
}

/// Of all others, those that go another way than with containerd's own sandboxes: by words of their names.
const CHOSEN: [&str; 13] = [
    "crictl inspectp tells",
    "the pod is ready and has an address",
    "a Container Linux Config in a ConfigMap",
    "environment, hostname and resolv.conf",
    "a container's exit code",
    "statistics",
    "a web server answers",
    "is forwarded",
    "containers that share their processes",
    "events: create",
    "containerd's restart loses nothing",
    "QEMU killed",
    "the shim killed",
];

/// These trials, and the chosen ones.
///
/// # Errors
/// When there is no trial of a name.
pub(crate) fn chosen_trials(lab: &Arc<Lab>) -> Result<Vec<Trial>> {
    let others = [
        machine::trials,
        container::trials,
        network::trials,
        processes::trials,
        events::trials,
        stats::trials,
        death::trials,
        death::further_trials,
    ];
    let others: Vec<_> = others.into_iter().flat_map(|trials| trials(lab)).collect();
    for words in CHOSEN {
        let found = others.iter().any(|trial| trial.name().contains(words));
        ensure!(found, "there is no trial about {words:?}");
    }
    let chosen = others
        .into_iter()
        .filter(|trial| CHOSEN.iter().any(|words| trial.name().contains(words)));
    Ok(chosen.chain(trials(lab)).collect())
}

fn files(lab: &Together<'_>) -> Result<()> {
    let idle = |name| lab.running(&Container::new(name, BUSYBOX).command(&["sleep", "2147483647"]));
    let (one, two) = (idle("files-one")?, idle("files-two")?);
    let run = |id: &str, script: &str| {
        let said = lab.exec(id, &["sh", "-c", script])?;
        ensure!(said.exit_code == 0, "{script}: {said:?}");
        anyhow::Ok(said.stdout)
    };
    run(&one.id, "echo of one >/dev/shm/file")?;
    let found = run(&two.id, "cat /dev/shm/file && rm /dev/shm/file")?;
    ensure!(found == "of one\n", "/dev/shm of the other has {found:?}");
    let hostname = run(&one.id, "cat /etc/hostname")?;
    ensure!(hostname == "shared\n", "/etc/hostname has {hostname:?}");
    let hosts = run(&one.id, "cat /etc/hosts")?;
    ensure!(
        hosts == std::fs::read_to_string("/etc/hosts")?,
        "/etc/hosts has {hosts:?}"
    );
    Ok(())
}

/// containerd does not ask the shim for anything any more then.
fn given_up(lab: &mut Alone<'_>) -> Result<()> {
    let (before, pods) = (lab.snapshot()?, lab.cri.pods()?);
    let pod = Pod::new(lab.node.place(), "given-up").annotation(TEMPLATE, "false");
    let others = processes(&lab.node)?;
    let boots = || {
        let new = processes(&lab.node)?
            .into_iter()
            .filter(|process| !others.contains(process));
        Ok(new.into_iter().any(|process| process.command.contains(QEMU)))
    };
    lab.cri.give_up_pod(&pod, COREOS_KVM, boots)?;
    // containerd hears of it with the client's next call.
    lab.cri.pods()?;
    expect_nothing_left(&lab.node, &before, Duration::from_secs(30))?;
    ensure!(lab.cri.pods()? == pods, "the sandbox is still listed");
    Ok(())
}
