//! A guest that is about to be saved: nothing in it is under way, and what it will need is loaded. And what is made up for when it
//! has become a clone.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{sys::stat::Mode, unistd::mkfifo};
use tokio::time::{Instant, sleep};

use crate::template::Kind;

/// A unit that does not come up without what a template does not have, such as a network, is not waited for longer.
const BOOT: Duration = Duration::from_secs(30);
/// systemd's answers take tenths of seconds in an emulated guest.
const ANSWER: Duration = Duration::from_secs(20);

/// Services that wait until the machine is one of its own and its containers have begun to start: the journal, for it is marked with
/// the ids of the machine that it was begun on; udev, for it runs programs for each device of a clone, and nobody waits for what they
/// do.
const HALTED: [&str; 2] = ["systemd-journald.service", "systemd-udevd.service"];
/// Holds their start back: it is a named pipe, and open(2) waits for the other side.
const GATE: &str = "/run/coreos-kvm/services-gate";

fn gate_drop_in(service: &str) -> PathBuf {
    Path::new("/run/systemd/system").join(format!("{service}.d/coreos-kvm.conf"))
}

/// Where journals are, each machine's in a folder named by its id: systemd-journald.service(8).
const JOURNALS: [&str; 2] = ["/run/log/journal", "/var/log/journal"];
/// A guest that this marks holds back what only a machine of its own may do, such as making keys.
const MARK: &str = "/run/coreos-kvm/template";

/// Waits until systemd has started everything that it is to start, but not for ever.
pub(crate) async fn boot_has_ended() {
    let waited = tokio::process::Command::new("systemctl")
        .args(["is-system-running", "--wait"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .status();
    if tokio::time::timeout(BOOT, waited).await.is_err() {
        tracing::warn!("some unit of the guest is still starting, and is saved as it is");
    }
}

/// Has the services restart, but not before the gate opens. What they are told meanwhile waits in their sockets, which systemd
/// keeps.
pub(crate) async fn halt_services() -> Result<()> {
    if Path::new(GATE).exists() {
        bail!("the guest's services are held back already");
    }
    mkfifo(GATE, Mode::S_IRUSR | Mode::S_IWUSR).context("making the services' gate")?;
    for service in HALTED {
        let drop_in = gate_drop_in(service);
        fs::create_dir_all(drop_in.parent().unwrap_or(Path::new("/"))).context("making a folder for a service")?;
        let text = format!("[Service]\nExecStartPre=-/bin/cat {GATE}\nTimeoutStartSec=infinity\n");
        fs::write(drop_in, text).context("changing a service")?;
    }
    run("systemctl", &["daemon-reload"])?;
    run("systemctl", &[["restart", "--no-block"].as_slice(), &HALTED].concat())?;
    let deadline = Instant::now() + ANSWER;
    for service in HALTED {
        let question = ["show", "--property=SubState", "--value", service];
        while said("systemctl", &question)?.trim() != "start-pre" {
            ensure!(Instant::now() < deadline, "{service} does not halt");
            sleep(Duration::from_millis(50)).await;
        }
    }
    // What was recorded so far stays readable, but is not added to.
    for journal in journals() {
        if let Some(name) = journal.to_str().and_then(|name| name.strip_suffix(".journal"))
            && !name.contains('@')
        {
            fs::rename(&journal, format!("{name}@template.journal")).context("setting the template's journal aside")?;
        }
    }
    Ok(())
}

/// All journals in the folders of all machines.
fn journals() -> Vec<PathBuf> {
    let entries = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let machines = JOURNALS.iter().flat_map(|folder| entries(Path::new(folder)));
    machines.flat_map(|machine| entries(&machine)).collect()
}

/// Gives the journals of the machine `old` to the machine `new`.
pub(crate) fn rename_journals(old: &str, new: &str) -> Result<()> {
    for folder in JOURNALS {
        let old = Path::new(folder).join(old);
        if old.exists() {
            fs::rename(&old, Path::new(folder).join(new)).with_context(|| format!("renaming {}", old.display()))?;
        }
    }
    Ok(())
}

/// The machine is nobody's template any more.
pub(crate) fn unmark() -> Result<()> {
    match fs::remove_file(MARK) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context("removing the mark of a template"),
        _ => Ok(()),
    }
}

/// Lets go on what waited for the machine to be one of its own.
pub(crate) fn wake_services(kind: Kind) -> Result<()> {
    for service in HALTED {
        fs::remove_file(gate_drop_in(service)).context("restoring a service")?;
    }
    // They have been waiting at the other side, or the open would wait for them.
    let gate = fs::File::options().write(true).open(GATE);
    drop(gate.context("letting the services start")?);
    // When they are restarted later there is nothing to wait for.
    fs::remove_file(GATE).context("removing the services' gate")?;
    if kind == Kind::Own {
        // Its end is the reaper's.
        Command::new("systemctl")
            .args(["start", "--no-block", "default.target"])
            .stdin(Stdio::null())
            .spawn()
            .context("having systemd start what waited")?;
    }
    Ok(())
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> Result<()> {
    said(program, arguments).map(drop)
}

fn said(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{program} {}: {}: {}",
        arguments.join(" "),
        output.status,
        error.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
