//! `coreos-kvm ps`: the machines of this node, from their records.

use std::process::ExitCode;

use clap::Args;
use coreos_kvm_launcher::{
    config::Config,
    machine::MachineId,
    state::{self, ProcessId, Record, StateDir},
};

use crate::table::table;

#[derive(Args)]
pub(crate) struct Ps {
    /// As one JSON array.
    #[arg(long)]
    json: bool,
}

impl Ps {
    pub(crate) fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let mut records = Vec::new();
        for id in state::machines(&config.state_dir)? {
            // One that ended since the directory was read is no machine any more.
            if let Some(record) = StateDir::of(&config.state_dir, &id).read()? {
                records.push((id, record));
            }
        }
        if self.json {
            let records: Vec<_> = records.iter().map(|(_, record)| record).collect();
            println!("{}", serde_json::to_string_pretty(&records)?);
            return Ok(ExitCode::SUCCESS);
        }
        let rows = records.iter().map(|(id, record)| row(id, record));
        let head = std::iter::once(HEAD.map(str::to_owned));
        print!("{}", table(&head.chain(rows).collect::<Vec<_>>()));
        Ok(ExitCode::SUCCESS)
    }
}

const HEAD: [&str; 8] = [
    "MACHINE",
    "STATE",
    "GUEST",
    "PID",
    "VCPUS",
    "MEMORY",
    "ACCELERATION",
    "ORIGIN",
];

fn row(id: &MachineId, record: &Record) -> [String; 8] {
    [
        id.to_string(),
        state_of(record).to_owned(),
        record.guest.clone(),
        record.qemu.map_or_else(|| "-".to_owned(), |qemu| qemu.pid.to_string()),
        record.vcpus.to_string(),
        format!("{} MiB", record.memory_mib),
        record
            .acceleration
            .map_or_else(|| "-".to_owned(), |acceleration| acceleration.to_string()),
        record
            .origin
            .as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string),
    ]
}

fn state_of(record: &Record) -> &'static str {
    let alive = |process: Option<ProcessId>| process.is_some_and(ProcessId::is_alive);
    match (alive(record.qemu), alive(record.launcher)) {
        (true, true) => "running",
        (true, false) => "orphaned",
        (false, true) if record.qemu.is_none() => "starting",
        (false, true) => "ending",
        (false, false) => "dead",
    }
}
