//! The installer, below a folder.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![Trial::test(
        "the installer installs all that a node needs, and keeps its configuration",
        || install().map_err(|error| format!("{error:#}").into()),
    )]
}

fn install() -> Result<()> {
    let root = tempfile::tempdir()?;
    let path = |file: &str| root.path().join(file);
    run_installer(root.path())?;
    for (program, argument) in [
        ("containerd-shim-coreos-kvm-v2", "-v"),
        ("containerd-shim-coreos-kvm-v2", "-info"),
        ("coreos-kvm", "--version"),
        ("virtiofsd", "--version"),
        ("vhost-device-vsock", "--version"),
        ("coreos-kvm-share", "--version"),
    ] {
        let said = said(Command::new(path("usr/local/bin").join(program)).arg(argument))?;
        ensure!(!said.stdout.is_empty(), "{program} {argument} says nothing");
    }
    for file in [
        "agent.erofs",
        "guests/reference/guest.toml",
        "guests/reference/root.erofs",
    ] {
        ensure!(path("var/lib/coreos-kvm").join(file).is_file(), "{file} is missing");
    }

    let config = path("etc/coreos-kvm/config.toml");
    let shipped = fs::read_to_string(&config).context("reading the installed configuration")?;
    fs::write(&config, format!("{shipped}\nvcpus = 2\n"))?;
    run_installer(root.path())?;
    ensure!(
        fs::read_to_string(&config)?.ends_with("vcpus = 2\n"),
        "the admin's configuration is lost"
    );
    let listed: Vec<_> = fs::read_dir(path("var/lib/coreos-kvm/guests"))?
        .filter_map(|entry| Some(entry.ok()?.file_name()))
        .collect();
    ensure!(listed == ["reference"], "beside the guest there is {listed:?}");
    Ok(())
}

fn run_installer(root: &Path) -> Result<Output> {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/install");
    said(Command::new(program).arg("--root").arg(root))
}

fn said(command: &mut Command) -> Result<Output> {
    let output = command.output().with_context(|| format!("running {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(output)
}
