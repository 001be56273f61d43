//! `coreos-kvm ps`: the machines of this node, from their records.

use std::process::ExitCode;

use clap::Args;
use coreos_kvm_launcher::{
    config::Config,
    machine::MachineId,
    state::{self, ProcessId, Record, StateDir},
};

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
        print!(
            "{}",
            table(std::iter::once(HEAD.map(str::to_owned)).chain(rows).collect())
        );
        Ok(ExitCode::SUCCESS)
    }
}

const HEAD: [&str; 7] = ["MACHINE", "STATE", "GUEST", "PID", "VCPUS", "MEMORY", "ACCELERATION"];

fn row(id: &MachineId, record: &Record) -> [String; 7] {
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

fn table(rows: Vec<[String; 7]>) -> String {
    let mut widths = [0; 7];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let line: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = ["a-long-name", "running", "reference", "7", "1", "512 MiB", "tcg"].map(str::to_owned);
        let text = table(vec![HEAD.map(str::to_owned), row]);
        assert_eq!(
            text,
            "MACHINE      STATE    GUEST      PID  VCPUS  MEMORY   ACCELERATION\n\
             a-long-name  running  reference  7    1      512 MiB  tcg\n"
        );
    }
}
