//! critest against this runtime and against runc, on one private node, and the outcomes side by side.
//!
//! - [`images`]: what critest pulls, made here
//! - [`suite`]: a run of it
//! - [`exceptions`]: what a machine cannot do
//! - [`table`]: the outcomes of both runtimes
//! - [`page`]: the table as a page of the documentation

mod exceptions;
mod images;
mod page;
mod suite;
mod table;

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use kubeception_tests::artifacts::{self, Containerd};
use kubeception_tests::cri::{COREOS_KVM, RUNC};
use kubeception_tests::node::{Handler, Node, Sandboxer, init};
use kubeception_tests::registry;

use exceptions::Exceptions;
use suite::{Outcome, Outcomes};
use table::{Found, Verdict};

/// Runs critest against coreos-kvm and against runc, and prints one table. What runc passes and coreos-kvm does not is a failure,
/// unless tests/critest/exceptions.txt has the reason.
#[derive(Debug, Parser)]
#[command(name = "devtool conformance")]
struct Arguments {
    /// 1.6, 1.7, 2.1 or all
    #[arg(long, default_value = "2.1", value_parser = versions)]
    containerd: Versions,
    /// podsandbox or shim: who makes the sandboxes of this runtime's pods; only containerd 2.1 has shim
    #[arg(long, default_value = "podsandbox")]
    sandboxer: Sandboxer,
    /// Writes the table to docs/conformance.md
    #[arg(long, conflicts_with_all = ["focus", "sandboxer"])]
    write: bool,
    /// Only this runtime: what counts is then what it fails
    #[arg(long, conflicts_with = "write", value_parser = [RUNC, COREOS_KVM])]
    only: Option<String>,
    /// Only the specs that match this regular expression
    #[arg(long)]
    focus: Option<String>,
}

#[derive(Debug, Clone)]
struct Versions(Vec<Containerd>);

fn versions(text: &str) -> Result<Versions, String> {
    Ok(Versions(match text {
        "all" => Containerd::ALL.to_vec(),
        one => vec![one.parse()?],
    }))
}

fn main() -> ExitCode {
    init::become_init_if_asked();
    run(&Arguments::parse()).unwrap_or_else(|error| {
        eprintln!("conformance: {error:#}");
        eprintln!("  logs: {}", artifacts::logs().display());
        ExitCode::FAILURE
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let exceptions = exceptions::read()?;
    let (mut passed, mut failed) = (0, 0);
    let mut all = Vec::new();
    for &containerd in &arguments.containerd.0 {
        let found = try_on(containerd, arguments)?;
        println!("\n{}", found.text(&exceptions));
        tell_failures(&found, &exceptions);
        println!(
            "\nskipped for both: {} (an image's digest is a constant of it)",
            suite::BY_DIGEST
        );
        print!("{}", found.summary());
        let counts = match &arguments.only {
            None => found.counts(&exceptions),
            Some(_) => found.own_counts(),
        };
        passed += counts.0;
        failed += counts.1;
        all.push(found);
    }
    if arguments.write {
        let path = page::write(&all, &exceptions).context("writing the page")?;
        println!("written to {}", path.display());
    }
    let good = failed == 0 && passed > 0;
    let verdict = if good { "ok" } else { "FAILED" };
    println!("\ntest result: {verdict}. {passed} passed; {failed} failed");
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Both runs on one node: what differs then is the runtime.
fn try_on(containerd: Containerd, arguments: &Arguments) -> Result<Found> {
    println!("containerd {}: starting a node with a registry", containerd.version());
    ensure!(
        arguments.sandboxer.is_in(containerd),
        "containerd {containerd} has no sandboxer {}",
        arguments.sandboxer.name()
    );
    let name = match arguments.sandboxer {
        Sandboxer::PodSandbox => "conformance",
        Sandboxer::Shim => "conformance-sandbox",
    };
    let node = Node::start(name, containerd, &[Handler::standard().sandboxer(arguments.sandboxer)])?;
    registry::serve(&node, &images::make()?)?;
    let run = |handler: &'static str| match &arguments.only {
        Some(only) if only != handler => Ok(Outcomes::new()),
        _ => suite::run(&node, handler, arguments.sandboxer, arguments.focus.as_deref()).context(handler),
    };
    Ok(Found {
        containerd,
        runc: run(RUNC)?,
        coreos_kvm: run(COREOS_KVM)?,
    })
}

/// What critest says of each spec in which this runtime is behind, or runc not what it has to be.
fn tell_failures(found: &Found, exceptions: &Exceptions) {
    for row in found.rows(exceptions) {
        let outcome = match row.verdict() {
            Verdict::Behind => row.coreos_kvm,
            Verdict::NoBar => row.runc,
            _ => continue,
        };
        if let Some(Outcome::Failed(reason) | Outcome::Skipped(reason)) = outcome {
            println!("{}:", row.spec);
            for line in reason.lines().filter(|line| !line.trim().is_empty()).take(12) {
                println!("    {line}");
            }
        }
    }
}
