//! `coreos-kvm console`: what the guest has printed, and, on demand, what it prints.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use coreos_kvm_launcher::{
    config::Config,
    machine::MachineId,
    state::{ProcessId, StateDir},
};

use crate::output::Output;

#[derive(Args)]
pub(crate) struct Console {
    machine: MachineId,
    /// Go on until the machine ends.
    #[arg(short, long)]
    follow: bool,
}

/// How often a followed console is looked at.
const LOOK: Duration = Duration::from_millis(100);

impl Console {
    pub(crate) async fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let state = StateDir::of(&config.state_dir, &self.machine);
        let Some(record) = state.read()? else {
            bail!("there is no machine {}", self.machine)
        };
        let log = state.console();
        let mut output = Output::new();
        match File::open(log.with_extension("log.1")) {
            Ok(before) => copy(before, &mut output)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("opening the console's older part"),
        }
        let mut current = File::open(&log).with_context(|| format!("opening {}", log.display()))?;
        copy(&mut current, &mut output)?;
        while self.follow && record.launcher.is_some_and(ProcessId::is_alive) && log.exists() {
            tokio::time::sleep(LOOK).await;
            copy(&mut current, &mut output)?;
            if was_replaced(&current, &log)? {
                // Rotated away: what came between the last look and the rotation is still in this one.
                copy(&mut current, &mut output)?;
                current = File::open(&log).with_context(|| format!("opening {}", log.display()))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn was_replaced(current: &File, log: &Path) -> anyhow::Result<bool> {
    match std::fs::metadata(log) {
        Ok(metadata) => Ok(metadata.ino() != current.metadata()?.ino()),
        // The machine ended, and its folder is gone.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).context("looking at the console's file"),
    }
}

/// Prints the rest of `source`.
fn copy(mut source: impl Read, output: &mut Output) -> anyhow::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        let count = source.read(&mut buffer).context("reading the console")?;
        if count == 0 {
            return Ok(());
        }
        output.print(&buffer[..count]).context("writing")?;
    }
}
