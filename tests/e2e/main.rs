//! Trials of the runtime on real containerds: `devtool test` runs them.
//!
//! The name of a trial tells the containerd it runs on; `--containerd 1.7` chooses those of one.
//! Machines are clones of templates; with `--boot` they boot.
//! Sandboxes are containerd's own, and in some trials the shim's; with `--sandboxer shim` they are that in all.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::node::{Sandboxer, init};
use libtest_mimic::{Arguments, Trial};

mod alone;
mod bad_input;
mod clones;
mod container;
mod death;
mod events;
mod exec;
mod full;
mod install;
mod lab;
mod late;
mod machine;
mod many;
mod measure;
mod mounts;
mod network;
mod output;
mod pause;
mod pod_cgroup;
mod processes;
mod sandbox;
mod size;
mod stats;
mod templates;
mod testbed;
mod userns;

use lab::{Lab, Start};

fn main() -> ExitCode {
    init::become_init_if_asked();
    run().unwrap_or_else(|error| {
        eprintln!("e2e: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let (choice, arguments) = arguments()?;
    let start = choice.start;

    let mut labs = Vec::new();
    let mut queues = vec![install::trials()];
    for (version, sandboxer) in choice.kinds() {
        let handlers = [
            start.handler(),
            clones::handler(start),
            templates::handler(&lab::node_name(version.short(), sandboxer), start),
        ]
        .into_iter()
        .chain(full::handlers(start))
        .chain([userns::handler(start)])
        .collect();
        let lab = Lab::new(version.short(), version, sandboxer, start, handlers);
        if sandboxer == Sandboxer::Shim && choice.sandboxer.is_none() {
            queues.push(sandbox::chosen_trials(&lab)?);
            labs.push(lab);
            continue;
        }
        let mut trials = on_each(&lab);
        // One containerd has to do for what it does not take part in.
        if version == Containerd::V1_7 || sandboxer == Sandboxer::Shim {
            let bad = bad_input::lab(version, sandboxer, start);
            queues.push(bad_input::trials(&bad));
            labs.push(bad);
        }
        if version == Containerd::V2_1 {
            trials.extend(death::further_trials(&lab));
            trials.extend(full::trials(&lab));
            trials.extend(many::trials(&lab));
            trials.extend(clones::trials(&lab));
            trials.extend(output::trials(&lab));
            trials.extend(late::trials(&lab));
            trials.extend(templates::trials(&lab));
        }
        if sandboxer == Sandboxer::Shim {
            trials.extend(sandbox::trials(&lab));
        }
        queues.push(trials);
        labs.push(lab);
    }

    let conclusion = libtest_mimic::run(&arguments, in_turns(queues));
    for lab in labs {
        lab.tidy()?;
    }
    Ok(conclusion.exit_code())
}

/// The trials of all nodes, each node's in their order and spread over the whole run: a trial that has its node for itself leaves the other
/// processor to those of other nodes.
fn in_turns(queues: Vec<Vec<Trial>>) -> Vec<Trial> {
    let places = queues.into_iter().flat_map(|queue| {
        let length = queue.len() as f64;
        let spread = move |(index, trial)| ((index as f64 + 0.5) / length, trial);
        queue.into_iter().enumerate().map(spread)
    });
    let mut places: Vec<_> = places.collect();
    places.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    places.into_iter().map(|(_, trial)| trial).collect()
}

/// What has to work on every containerd. All but a few use one pod that they share.
fn on_each(lab: &Arc<Lab>) -> Vec<Trial> {
    [
        testbed::trials,
        machine::trials,
        container::trials,
        exec::trials,
        mounts::trials,
        network::trials,
        processes::trials,
        events::trials,
        pause::trials,
        death::trials,
        alone::trials,
        size::trials,
        stats::trials,
        userns::trials,
    ]
    .into_iter()
    .flat_map(|trials| trials(lab))
    .collect()
}

/// What the trials are run on.
struct Choice {
    /// None: all.
    containerd: Option<Containerd>,
    /// None: containerd's own for all trials, and the shim for some.
    sandboxer: Option<Sandboxer>,
    start: Start,
}

impl Choice {
    fn kinds(&self) -> impl Iterator<Item = (Containerd, Sandboxer)> {
        let all = Containerd::ALL
            .into_iter()
            .flat_map(|version| Sandboxer::ALL.map(|sandboxer| (version, sandboxer)));
        all.filter(|(version, sandboxer)| {
            sandboxer.is_in(*version)
                && self.containerd.is_none_or(|chosen| chosen == *version)
                && self.sandboxer.map_or(
                    // How a machine starts makes no difference to who asks for it.
                    *sandboxer == Sandboxer::PodSandbox || self.start == Start::Clone,
                    |chosen| chosen == *sandboxer,
                )
        })
    }
}

/// Takes `--containerd VERSION`, `--sandboxer NAME` and `--boot` out of the arguments and leaves the rest to the harness.
fn arguments() -> Result<(Choice, Arguments)> {
    let mut rest = Vec::new();
    let mut choice = Choice {
        containerd: None,
        sandboxer: None,
        start: Start::Clone,
    };
    let mut all = std::env::args();
    while let Some(argument) = all.next() {
        if argument == "--containerd" {
            let version = all.next().context("--containerd needs a version: 1.6, 1.7 or 2.1")?;
            choice.containerd = Some(version.parse().map_err(anyhow::Error::msg)?);
        } else if argument == "--sandboxer" {
            let name = all.next().context("--sandboxer needs a name: podsandbox or shim")?;
            choice.sandboxer = Some(name.parse().map_err(anyhow::Error::msg)?);
        } else if argument == "--boot" {
            choice.start = Start::Boot;
        } else {
            rest.push(argument);
        }
    }
    let mut arguments = Arguments::from_iter(rest);
    // More machines at a time than processors only makes each of them late.
    arguments.test_threads.get_or_insert(2);
    Ok((choice, arguments))
}
