//! A node for whoever wants to look around, or to run another test suite against it.

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::node::{ENDPOINT, Handler, Node, init};

/// Starts and ends private containerd nodes.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Starts a node, runs a command in it, and removes the node. CONTAINER_RUNTIME_ENDPOINT names its socket.
    Run {
        /// 1.6, 1.7 or 2.1
        #[arg(long, default_value = "2.1")]
        containerd: Containerd,
        /// Without the runtime handler coreos-kvm
        #[arg(long)]
        runc_only: bool,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// A shell on a running node.
    Shell { name: String },
    /// Ends all nodes, and removes what killed ones left.
    Clean,
}

fn main() -> ExitCode {
    init::become_init_if_asked();
    perform(Arguments::parse().verb).unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn perform(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Run {
            containerd,
            runc_only,
            command,
        } => run(containerd, runc_only, &command),
        Verb::Shell { name } => match Node::shell(&name)? {},
        Verb::Clean => {
            for name in Node::end_all()? {
                println!("node {name}: ended and removed");
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run(containerd: Containerd, runc_only: bool, command: &[String]) -> Result<ExitCode> {
    let handlers = if runc_only {
        Vec::new()
    } else {
        vec![Handler::standard()]
    };
    let node = Node::start("run", containerd, &handlers)?;
    let (program, arguments) = command.split_first().context("no command")?;
    let status = node
        .command(program)
        .args(arguments)
        .env("CONTAINER_RUNTIME_ENDPOINT", ENDPOINT)
        .stdin(std::process::Stdio::inherit())
        .status()
        .with_context(|| format!("running {program}"))?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .map_or(ExitCode::FAILURE, ExitCode::from))
}
