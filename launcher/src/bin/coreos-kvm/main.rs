//! `coreos-kvm`: the node's view of its machines, for whoever looks after them.

mod check;
mod console;
mod exec;

mod ps;
mod run;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use coreos_kvm_launcher::config::Config;

/// Container Linux machines on this node.
#[derive(Parser)]
#[command(name = "coreos-kvm", version, about)]
struct Arguments {
    /// The configuration; left out, it is /etc/coreos-kvm/config.toml, or the defaults where there is none.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Says whether this node can run machines, and how. Exit code 1: it cannot.
    Check,
    /// Lists the machines of this node.
    Ps(ps::Ps),
    /// Shows what a machine's guest has printed on its console.
    Console(console::Console),
    /// Runs a command in a machine's guest, in the guest's own namespaces, as root.
    Exec(exec::Exec),
    /// Boots one machine, without network, and stays with it until it ends. For trials and measurements.
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
    let arguments = Arguments::parse();
    let config = Config::load_or_default(arguments.config.as_deref())?;
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
        match arguments.command {
            Command::Check => check::check(&config, arguments.config.as_deref()).await,
            Command::Ps(ps) => ps.run(&config),
            Command::Console(console) => console.run(&config).await,
            Command::Exec(exec) => exec.run(&config).await,
            Command::Run(run) => run.run(&config).await,
        }
    });
    // A thread that reads stdin cannot be interrupted, and nothing it could still read matters.
    runtime.shutdown_background();
    code
}
