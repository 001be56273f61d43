//! `coreos-kvm run`: one machine without a network, for trials and measurements.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Args;
use coreos_kvm_launcher::{
    config::Config,
    guest::Guest,
    machine::{Machine, MachineId, Network},
    vm::{self, Vm},
};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Args)]
pub(crate) struct Run {
    /// Name of the machine; left out, it is made of the process id.
    #[arg(long)]
    name: Option<MachineId>,
    /// The guest's name.
    #[arg(long)]
    guest: Option<String>,
    /// An Ignition configuration.
    #[arg(long, value_name = "FILE")]
    ignition: Option<PathBuf>,
    /// In MiB.
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    #[arg(long, value_name = "NUMBER")]
    vcpus: Option<u32>,
    /// A further argument of the guest's kernel.
    #[arg(long = "kernel-arg", value_name = "ARGUMENT")]
    kernel_args: Vec<String>,
    /// End the machine as soon as its agent answers.
    #[arg(long)]
    until_ready: bool,
}

/// What the guest is given to power off.
const GRACE: Duration = Duration::from_secs(30);

impl Run {
    pub(crate) async fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let ignition = self.ignition.map(|path| {
            std::fs::read_to_string(&path)
                .with_context(|| format!("reading the Ignition configuration {}", path.display()))
        });
        let id = match self.name {
            Some(id) => id,
            None => format!("run-{}", std::process::id()).parse()?,
        };
        let machine = Machine {
            id: id.clone(),
            guest: Guest::load(&config.guests_dir, self.guest.as_deref().unwrap_or(&config.guest))?,
            vcpus: self.vcpus.unwrap_or(config.vcpus),
            memory_mib: self.memory.unwrap_or(config.memory_mib),
            acceleration: config.acceleration,
            ignition: ignition.transpose()?,
            kernel_args: self.kernel_args,
            network: Network::None,
            cgroup: None,
            boot_timeout: config.boot_timeout,
        };
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let begin = Instant::now();
        let vm = tokio::select! {
            vm = Vm::start(config, machine) => Some(vm?),
            _ = interrupt.recv() => None,
            _ = terminate.recv() => None,
        };
        let Some(vm) = vm else {
            // The start is being undone, but this process must not end before it is.
            vm::destroy(&config.state_dir, &id).await?;
            anyhow::bail!("interrupted before the machine was up");
        };
        println!(
            "{}",
            serde_json::json!({ "ready_s": begin.elapsed().as_secs_f64(), "machine": vm.info() })
        );
        if self.until_ready {
            vm.shutdown(Duration::ZERO).await?;
            return Ok(ExitCode::SUCCESS);
        }
        let exit = tokio::select! {
            exit = vm.exited() => Some(exit),
            _ = interrupt.recv() => None,
            _ = terminate.recv() => None,
        };
        vm.shutdown(GRACE).await?;
        let exit = match exit {
            Some(exit) => exit,
            None => vm.exited().await,
        };
        println!("{}", serde_json::to_string(&exit)?);
        Ok(if exit.orderly {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}
