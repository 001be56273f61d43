//! The order in which containerd hears of what happened.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::events::{Event, Events};
use kubeception_tests::pod::Container;
use libtest_mimic::Trial;

use crate::lab::{Lab, Together};

const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial(
            "events: create, start, exec-added, exec-started, exit, exit, delete",
            order,
        ),
        lab.trial(
            "events: start comes before the exit of a process that ends at once",
            at_once,
        ),
    ]
}

fn order(lab: &Together<'_>) -> Result<()> {
    let shared = lab.shared()?;
    let container = Container::script("events", "while :; do sleep 1; done");
    let events = Events::subscribe(&lab.node)?;
    let id = lab.run(&shared.id, &container, &shared.pod)?;
    let exec = lab.exec(&id, &["sh", "-c", "exit 6"])?;
    ensure!(exec.exit_code == 6, "the exec said {exec:?}");
    lab.stop(&id, Duration::ZERO)?;
    lab.remove(&id)?;

    let is_end = |event: &Event| event.kind == "delete" && (event.exec_id.is_empty() || event.exec_id == id);
    let taken = events.take_until(&[&id], BOUND, is_end)?;
    // Of the exec, "delete" is published by some versions of containerd and not by others.
    let kinds: Vec<_> = taken
        .iter()
        .filter(|event| event.kind != "delete" || is_end(event))
        .map(|event| {
            (
                event.kind.as_str(),
                !event.exec_id.is_empty() && event.exec_id != id,
                event.exit_status,
            )
        })
        .collect();
    let expected = [
        ("create", false, 0),
        ("start", false, 0),
        ("exec-added", true, 0),
        ("exec-started", true, 0),
        ("exit", true, 6),
        ("exit", false, 137),
        ("delete", false, 137),
    ];
    ensure!(
        kinds == expected,
        "the events (kind, of an exec, exit status) were {kinds:?}"
    );
    let pids: Vec<_> = taken
        .iter()
        .filter(|event| event.exec_id.is_empty())
        .map(|event| event.pid)
        .collect();
    ensure!(
        pids.iter().all(|pid| *pid == pids[0] && *pid != 0),
        "the container's process ids were {pids:?}"
    );
    Ok(())
}

fn at_once(lab: &Together<'_>) -> Result<()> {
    let shared = lab.shared()?;
    let events = Events::subscribe(&lab.node)?;
    let container = lab.running(&Container::script("events-short", "exit 3"))?;
    let taken = events.take_until(&[&container.id], BOUND, |event| event.kind == "exit")?;
    let kinds: Vec<_> = taken.iter().map(|event| event.kind.as_str()).collect();
    ensure!(
        kinds == ["create", "start", "exit"],
        "the events were {kinds:?} (in {})",
        shared.id
    );
    Ok(())
}
