//! `coreos-kvm`: the node's view of its machines, for whoever looks after them.

mod check;
mod console;
mod exec;
mod input;
mod local_files;
mod output;
mod ps;
mod run;
mod table;
mod template;
mod transpile;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use coreos_kvm_launcher::config::Config;

/// Container Linux machines on this node.
#[derive(Parser)]
#[command(name = "coreos-kvm", version, propagate_version = true, about)]
struct Arguments {
    /// The configuration; left out, it is /etc/coreos-kvm/config.toml, or the defaults where there is none.
    #[arg(long, global = true, value_name = "FILE", env = "COREOS_KVM_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    #[command(flatten)]
    Node(NodeCommand),
    /// Translates a configuration (Butane, Container Linux Config, cloud-config, Ignition) into Ignition.
    Transpile(transpile::Transpile),
}

/// What is about this node, as its configuration describes it.
#[derive(Subcommand)]
enum NodeCommand {
    /// Says whether this node can run machines, and how. Exit code 1: it cannot.
    Check,
    /// Lists the machines of this node.
    Ps(ps::Ps),
    /// Shows what a machine's guest has printed on its console.
    Console(console::Console),
    /// Runs a command in a machine's guest, in the guest's own namespaces, as root.
    Exec(exec::Exec),
    /// Makes, lists, verifies and removes the templates that machines are clones of.
    Template(template::Template),
    /// Boots one machine without Kubernetes, with its own network, disk and configuration, and stays with it until it ends.
    Run(run::Run),
}

fn main() -> ExitCode {
    match start() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("coreos-kvm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start() -> anyhow::Result<ExitCode> {
    let command = Arguments::command().mut_subcommand("run", run::without_empty_variables);
    let matches = command.get_matches_from(transpile::command_line(std::env::args_os()));
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match arguments.command {
        Command::Transpile(transpile) => transpile.run(),
        Command::Node(command) => on_node(command, arguments.config.as_deref()),
    }
}

fn on_node(command: NodeCommand, path: Option<&Path>) -> anyhow::Result<ExitCode> {
    let config = Config::load_or_default(path)?;
    let filter = std::env::var("COREOS_KVM_LOG").unwrap_or_else(|_| "warn".to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the async runtime")?;
    let code = runtime.block_on(async {
        match command {
            NodeCommand::Check => check::check(&config, path).await,
            NodeCommand::Ps(ps) => ps.run(&config),
            NodeCommand::Console(console) => console.run(&config).await,
            NodeCommand::Exec(exec) => exec.run(&config).await,
            NodeCommand::Template(template) => template.run(&config).await,
            NodeCommand::Run(run) => run.run(&config).await,
        }
    });
    // A thread that reads stdin cannot be interrupted, and nothing it could still read matters.
    runtime.shutdown_background();
    code
}
