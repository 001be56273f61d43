//! `coreos-kvm console`: what the guest has printed, and, on demand, what it prints.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use coreos_kvm_launcher::{
    config::Config,
    console::harmless,
    machine::MachineId,
    state::{ProcessId, StateDir},
};

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
            Ok(before) => output.copy(before)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).context("opening the console's older part"),
        }
        let mut current = File::open(&log).with_context(|| format!("opening {}", log.display()))?;
        output.copy(&mut current)?;
        while self.follow && record.launcher.is_some_and(ProcessId::is_alive) && log.exists() {
            tokio::time::sleep(LOOK).await;
            output.copy(&mut current)?;
            if was_replaced(&current, &log)? {
                // Rotated away: what came between the last look and the rotation is still in this one.
                output.copy(&mut current)?;
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

/// stdout: a terminal gets text that cannot move its cursor, for the guest chose it; a file gets every byte.
struct Output {
    stdout: io::Stdout,
    terminal: bool,
    /// The beginning of a line of which the end has not come yet.
    line: Vec<u8>,
}

/// A line longer than this is shown in pieces.
const LINE: usize = 4096;

impl Output {
    fn new() -> Self {
        let stdout = io::stdout();
        Self {
            terminal: stdout.is_terminal(),
            stdout,
            line: Vec::new(),
        }
    }

    fn copy(&mut self, mut source: impl Read) -> anyhow::Result<()> {
        let mut buffer = [0; 16 * 1024];
        loop {
            let count = source.read(&mut buffer).context("reading the console")?;
            if count == 0 {
                return self.stdout.flush().context("writing");
            }
            if self.terminal {
                self.show(&buffer[..count])?;
            } else {
                self.stdout.write_all(&buffer[..count]).context("writing")?;
            }
        }
    }

    fn show(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        self.line.extend(bytes);
        while let Some(end) = self
            .line
            .iter()
            .position(|byte| *byte == b'\n')
            .or((self.line.len() > LINE).then_some(LINE))
        {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            write!(self.stdout, "{}", harmless(&String::from_utf8_lossy(&line))).context("writing")?;
        }
        Ok(())
    }
}
