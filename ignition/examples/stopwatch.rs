//! How long the library takes for a configuration: `stopwatch RUNS FILE` prints the milliseconds of each run, one a line. A run
//! is what a pod's start has of it: read, translated, merged over what the machine itself needs, and written.

use std::{env, fs, hint::black_box, process::ExitCode, time::Instant};

use coreos_kvm_ignition::{Config, Options, Platform, transpile};

/// As large as what the launcher adds, which the configuration is merged over.
const MACHINE: &str = r#"{"ignition":{"version":"3.3.0"},"systemd":{"units":[
    {"name":"agent.mount","contents":"[Unit]\nDefaultDependencies=no\n[Mount]\nWhat=/dev/vda\nWhere=/run/agent\nType=erofs\n"},
    {"name":"agent.service","enabled":true,"contents":"[Service]\nExecStart=/run/agent/agent\n[Install]\nWantedBy=multi-user.target\n"}]}}"#;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stopwatch: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = env::args().skip(1);
    let (Some(runs), Some(path)) = (arguments.next(), arguments.next()) else {
        return Err("usage: stopwatch RUNS FILE".into());
    };
    let text = fs::read_to_string(path)?;
    let (machine, _) = Config::parse(MACHINE)?;
    for _ in 0..runs.parse::<u32>()? {
        let begun = Instant::now();
        black_box(pod(&text, &machine)?);
        println!("{:.4}", begun.elapsed().as_secs_f64() * 1000.0);
    }
    Ok(())
}

fn pod(text: &str, machine: &Config) -> Result<String, Box<dyn std::error::Error>> {
    let options = Options {
        platform: Some(Platform::Custom),
        ..Options::default()
    };
    let user = transpile(black_box(text), &options)?
        .config
        .for_guest(&[machine.version()])?;
    Ok(user.merge(machine)?.to_json())
}
