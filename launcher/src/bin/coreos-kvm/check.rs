//! `coreos-kvm check`: whether this node can run machines, and how. Every finding is a line; what is missing says how to
//! mend it.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::ExitCode,
};

use coreos_kvm_launcher::{
    accel,
    config::{self, Config, Templates},
    guest::Guest,
    program,
    qemu::{self, program::Qemu},
    sentence, share_server,
    state::{CloneMode, StateDir},
    template::{Manifest, Store, mode},
};

use crate::template::mib;

/// What was found of one thing: how it is, or what is wrong with it and how to mend it.
type Finding = (&'static str, Result<String, String>);

pub(crate) async fn check(config: &Config, path: Option<&Path>) -> anyhow::Result<ExitCode> {
    let findings = [
        ("configuration", Ok(configuration(path))),
        ("root", root()),
        ("acceleration", acceleration(config).await),
        (
            "qemu",
            qemu::program::find(&config.qemu, &config.state_dir)
                .await
                .map(version)
                .map_err(|error| sentence(&error)),
        ),
        ("vsock", vsock(config)),
        (
            "virtiofsd",
            program::find("virtiofsd", "virtiofsd", &config.virtiofsd)
                .map(shown)
                .map_err(|error| sentence(&error)),
        ),
        (
            "guest",
            Guest::load(&config.guests_dir, &config.guest)
                .map(guest)
                .map_err(|error| sentence(&error)),
        ),
        ("agent disk", agent_disk(config)),
        ("state", state(config)),
        ("clones", clones(config)),
        ("tun", opened("/dev/net/tun", "the kernel's module `tun` makes it")),
    ];
    for (what, finding) in &findings {
        match finding {
            Ok(how) => println!("ok     {what}: {how}"),
            Err(problem) => println!("WRONG  {what}: {problem}"),
        }
    }
    let wrong = findings
        .iter()
        .filter(|(_, finding): &&Finding| finding.is_err())
        .count();
    if wrong == 0 {
        println!("This node can run machines.");
        Ok(ExitCode::SUCCESS)
    } else {
        println!(
            "This node cannot run machines: {wrong} of {} findings are wrong.",
            findings.len()
        );
        Ok(ExitCode::FAILURE)
    }
}

fn shown(path: PathBuf) -> String {
    path.display().to_string()
}

fn version(qemu: Qemu) -> String {
    let lacks = if qemu.ivshmem {
        ""
    } else {
        "; without its device ivshmem-plain much output of clones comes slower"
    };
    format!("{}, {}{lacks}", qemu.version, qemu.path.display())
}

fn guest(guest: Guest) -> String {
    format!(
        "{}, Ignition {}, at least {} MiB of memory",
        guest.name,
        guest.ignition_versions.join(" "),
        guest.min_memory_mib
    )
}

fn configuration(path: Option<&Path>) -> String {
    match path {
        Some(path) => shown(path.to_owned()),
        None if Path::new(config::DEFAULT_PATH).exists() => config::DEFAULT_PATH.to_owned(),
        None => format!("the defaults; there is no {}", config::DEFAULT_PATH),
    }
}

fn root() -> Result<String, String> {
    if nix::unistd::geteuid().is_root() {
        Ok("yes".to_owned())
    } else {
        Err("machines are started by root: taps, cgroups and a user of its own for each need that".to_owned())
    }
}

async fn acceleration(config: &Config) -> Result<String, String> {
    let (acceleration, reason) = accel::choose(config.acceleration, &config.state_dir)
        .await
        .map_err(|error| sentence(&error))?;
    Ok(format!("{acceleration}: {reason}"))
}

fn vsock(config: &Config) -> Result<String, String> {
    if Path::new("/dev/vhost-vsock").exists() {
        return opened("/dev/vhost-vsock", "the kernel's module `vhost_vsock` makes it");
    }
    let helper =
        program::find("vhost-device-vsock", "vhost_device_vsock", &config.vhost_device_vsock).map_err(|error| {
            format!(
                "there is no /dev/vhost-vsock (kernel module `vhost_vsock`), and {}",
                sentence(&error)
            )
        })?;
    Ok(format!("{}, as there is no /dev/vhost-vsock", helper.display()))
}

fn agent_disk(config: &Config) -> Result<String, String> {
    match std::fs::metadata(&config.agent_disk) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => Ok(shown(config.agent_disk.clone())),
        Ok(_) => Err(format!(
            "{} is no image; `devtool build` makes it",
            config.agent_disk.display()
        )),
        Err(error) => Err(format!(
            "{}: {error}; `devtool build` makes it",
            config.agent_disk.display()
        )),
    }
}

/// Makes and removes the folder of a machine that nobody has.
fn state(config: &Config) -> Result<String, String> {
    let name = format!("check-{}", std::process::id());
    let id = name.parse().map_err(|error| sentence(&error))?;
    let state = StateDir::create(&config.state_dir, &id).map_err(|error| sentence(&error))?;
    state.remove().map_err(|error| sentence(&error))?;
    Ok(shown(config.state_dir.clone()))
}

/// In which way machines are cloned, and what of that the node decides.
fn clones(config: &Config) -> Result<String, String> {
    if config.templates == Templates::Off {
        return Ok("none, each machine boots: `templates` in the configuration is \"off\"".to_owned());
    }
    let space = config.template_space_mib << 20;
    let store = Store::open(&config.template_dir, space).map_err(|error| sentence(&error))?;
    let entries = store.entries().map_err(|error| sentence(&error))?;
    let bytes = entries
        .iter()
        .filter_map(|entry| entry.manifest.as_ref().ok())
        .map(Manifest::bytes)
        .sum();
    let (mode, why) = mode::choose(config, config.memory_mib);
    if mode == CloneMode::CopyOnWrite {
        share_server::find(&config.share_server).map_err(|error| sentence(&error))?;
    }
    Ok(format!(
        "by {mode}, {why}; {} templates in {}, {} of {}",
        entries.len(),
        config.template_dir.display(),
        mib(bytes),
        mib(space)
    ))
}

fn opened(path: &'static str, mending: &str) -> Result<String, String> {
    match File::options().read(true).write(true).open(path) {
        Ok(_) => Ok(path.to_owned()),
        Err(error) => Err(format!("{path}: {error}; {mending}")),
    }
}
