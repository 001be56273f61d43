//! Trials of the runtime on real containerds: `devtool test` runs them.
//!
//! The name of a trial tells the containerd it runs on; `--containerd 1.7` chooses those of one.
//! Machines are clones of templates; with `--boot` they boot.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::node::init;
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
mod pod_cgroup;
mod processes;
mod size;
mod stats;
mod templates;
mod testbed;

use lab::{Lab, Start};

fn main() -> ExitCode {
    init::become_init_if_asked();
    run().unwrap_or_else(|error| {
        eprintln!("e2e: {error:#}");
        ExitCode::FAILURE
    })
}

fn run() -> Result<ExitCode> {
    let (chosen, start, arguments) = arguments()?;

    let mut labs = Vec::new();
    let mut trials = install::trials();
    for version in Containerd::ALL
        .into_iter()
        .filter(|version| chosen.is_none_or(|chosen| chosen == *version))
    {
        let handlers = [
            start.handler(),
            clones::handler(start),
            templates::handler(version, start),
        ]
        .into_iter()
        .chain(full::handlers(start))
        .collect();
        let lab = Lab::new(version.short(), version, start, handlers);
        trials.extend(on_each(&lab));
        match version {
            Containerd::V1_6 => {}
            Containerd::V1_7 => {
                let bad = bad_input::lab(version, start);
                trials.extend(bad_input::trials(&bad));
                labs.push(bad);
            }
            Containerd::V2_1 => {
                trials.extend(death::further_trials(&lab));
                trials.extend(full::trials(&lab));
                trials.extend(many::trials(&lab));
                trials.extend(clones::trials(&lab));
                trials.extend(output::trials(&lab));
                trials.extend(late::trials(&lab));
                trials.extend(templates::trials(&lab));
            }
        }
        labs.push(lab);
    }

    let conclusion = libtest_mimic::run(&arguments, trials);
    for lab in labs {
        lab.tidy()?;
    }
    Ok(conclusion.exit_code())
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
        death::trials,
        alone::trials,
        size::trials,
        stats::trials,
    ]
    .into_iter()
    .flat_map(|trials| trials(lab))
    .collect()
}

/// Takes `--containerd VERSION` and `--boot` out of the arguments and leaves the rest to the harness.
fn arguments() -> Result<(Option<Containerd>, Start, Arguments)> {
    let mut rest = Vec::new();
    let (mut chosen, mut start) = (None, Start::Clone);
    let mut all = std::env::args();
    while let Some(argument) = all.next() {
        if argument == "--containerd" {
            let version = all.next().context("--containerd needs a version: 1.6, 1.7 or 2.1")?;
            chosen = Some(version.parse().map_err(anyhow::Error::msg)?);
        } else if argument == "--boot" {
            start = Start::Boot;
        } else {
            rest.push(argument);
        }
    }
    let mut arguments = Arguments::from_iter(rest);
    // More machines at a time than processors only makes each of them late.
    arguments.test_threads.get_or_insert(2);
    Ok((chosen, start, arguments))
}
