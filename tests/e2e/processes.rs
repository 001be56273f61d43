//! Who sees whose processes.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::cri::wait_for_log;
use kubeception_tests::pod::Container;
use libtest_mimic::Trial;

use crate::lab::{Lab, Together, eventually};

const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial(
            "containers that share their processes see one another's, others do not",
            shared,
        ),
        lab.trial(
            "the first of shared processes has nothing to look into, and leaves no zombies",
            first,
        ),
        lab.trial("a container among the node's processes sees the guest's", of_the_guest),
        lab.trial("a container that shares its processes ends with all of them", all_end),
        lab.trial("a container that debugs another sees its processes alone", debugged),
    ]
}

fn sees(lab: &Together<'_>, container: &str, process: &str) -> Result<bool> {
    Ok(lab.exec(container, &["ps"])?.stdout.contains(process))
}

fn shared(lab: &Together<'_>) -> Result<()> {
    let sleeper = |name: &str, seconds: &str| Container::script(name, &format!("sleep {seconds}; :"));
    let one = lab.running(&sleeper("shared-one", "1111111").shared_processes())?;
    let two = lab.running(&sleeper("shared-two", "2222222").shared_processes())?;
    let apart = lab.running(&sleeper("apart", "3333333"))?;
    for container in [&one, &two] {
        ensure!(sees(lab, &container.id, "sleep 1111111")? && sees(lab, &container.id, "sleep 2222222")?);
        ensure!(!sees(lab, &container.id, "sleep 3333333")?);
    }
    ensure!(!sees(lab, &apart.id, "sleep 1111111")?);
    // What a container is signalled with reaches its own first process, which is not the namespace's.
    lab.stop(&one.id, Duration::from_secs(20))?;
    ensure!(lab.status(&one.id)?.exit_code == 128 + 15);
    ensure!(sees(lab, &two.id, "sleep 2222222")?);
    Ok(())
}

fn of_the_guest(lab: &Together<'_>) -> Result<()> {
    let container = lab.running(&Container::script("of-the-node", "sleep 7777777; :").node_processes())?;
    let first = lab.exec(&container.id, &["cat", "/proc/1/comm"])?.stdout;
    ensure!(first.trim() == "systemd", "the first process is {first:?}");
    Ok(())
}

fn first(lab: &Together<'_>) -> Result<()> {
    let container = lab.running(&Container::script("looks", "sleep 2147483647; :").shared_processes())?;
    let first = |path: &str| lab.exec(&container.id, &["cat", &format!("/proc/1/{path}")]);
    ensure!(first("comm")?.stdout.trim() == "pod", "{:?}", first("comm")?);
    let status = first("status")?.stdout;
    let rights = status
        .lines()
        .filter(|line| line.starts_with("CapPrm") || line.starts_with("CapEff"));
    for line in rights {
        ensure!(line.ends_with("0000000000000000"), "{line}");
    }
    for file in ["root/etc/os-release", "environ", "maps"] {
        ensure!(first(file)?.exit_code != 0, "/proc/1/{file} can be read");
    }
    // Orphans become its children.
    lab.exec(&container.id, &["sh", "-c", "for n in 1 2 3; do (sleep 0.1 &); done"])?;
    eventually(BOUND, || {
        let processes = lab.exec(&container.id, &["ps"])?.stdout;
        ensure!(
            !processes.contains("sleep 0.1") && !processes.contains("[sleep]"),
            "{processes}"
        );
        Ok(())
    })
}

fn all_end(lab: &Together<'_>) -> Result<()> {
    let other = lab.running(&Container::script("stays", "sleep 2147483647; :").shared_processes())?;
    let script = "sleep 4444444 & echo started; read -t 2 nothing; exit 3";
    let ends = lab.running(&Container::script("ends", script).shared_processes())?;
    wait_for_log(&ends.log, BOUND, |line| line.text == "started")?;
    ensure!(lab.wait_exited(&ends.id, BOUND)?.exit_code == 3);
    eventually(BOUND, || {
        ensure!(
            !sees(lab, &other.id, "sleep 4444444")?,
            "a process has outlived its container"
        );
        Ok(())
    })
}

fn debugged(lab: &Together<'_>) -> Result<()> {
    let target = lab.running(&Container::script("debugged", "sleep 5555555; :"))?;
    let debugger = lab.running(&Container::script("debugger", "sleep 6666666; :").processes_of(&target.id))?;
    for container in [&target, &debugger] {
        ensure!(sees(lab, &container.id, "sleep 5555555")? && sees(lab, &container.id, "sleep 6666666")?);
    }
    let other = lab.running(&Container::script("not-debugged", "sleep 2147483647; :").shared_processes())?;
    ensure!(!sees(lab, &other.id, "sleep 5555555")?);
    Ok(())
}
