//! What the node has mounted below a volume: what of it a container sees, and that it stays the node's.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::pod::Container;
use libtest_mimic::Trial;

use crate::lab::{Lab, Running, Together, eventually};

const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![lab.trial(
        "what the node mounts below a volume shows where that is asked for, and stays the node's",
        below_a_volume,
    )]
}

fn below_a_volume(lab: &Together<'_>) -> Result<()> {
    let folder = lab.node.place().base().join("mounts");
    on_node(
        lab,
        &folder,
        "mkdir -p $0 && mount -t tmpfs none $0 && mkdir $0/early $0/late",
    )?;
    let tried = shown_and_kept(lab, &folder);
    // What is left of a trial that failed is in the way of others.
    let unmounted = on_node(lab, &folder, "umount -R $0 && rmdir $0");
    tried.and(unmounted)
}

fn shown_and_kept(lab: &Together<'_>, folder: &Path) -> Result<()> {
    on_node(lab, folder, "mount -t tmpfs none $0/early && echo early >$0/early/file")?;
    let idle = |name, readonly| {
        let container = Container::new(name, BUSYBOX).command(&["sleep", "2147483647"]);
        container.host_path(folder, "/volume", readonly)
    };
    let follows = lab.running(&idle("follows", false).follows_the_node())?;
    let apart = lab.running(&idle("apart", false))?;
    let read_only = lab.running(&idle("read-only", true))?;
    for container in [&follows, &apart, &read_only] {
        let found = sees(lab, container, "early")?;
        ensure!(found, "what was mounted before is not there");
    }
    on_node(lab, folder, "mount -t tmpfs none $0/late && echo late >$0/late/file")?;
    eventually(BOUND, || {
        ensure!(sees(lab, &follows, "late")?, "what was mounted later is not there");
        Ok(())
    })?;
    for container in [&apart, &read_only] {
        ensure!(!sees(lab, container, "late")?, "what was mounted later shows unasked");
    }
    let write = |file: &str| {
        let outcome = lab.exec(&read_only.id, &["touch", &format!("/volume/{file}")])?;
        anyhow::Ok(outcome.exit_code == 0)
    };
    ensure!(!write("new")?, "a read-only volume can be written to");
    ensure!(
        write("early/new")?,
        "what is mounted below it is read-only as well, which nobody asked for"
    );

    // The node can unmount what containers see, and remove where it was. Lazily, for the guest remembers files that it has looked at.
    on_node(lab, folder, "umount -l $0/late && rmdir $0/late")?;
    for container in [follows, apart, read_only] {
        lab.stop(&container.id, Duration::ZERO)?;
        lab.remove(&container.id)?;
    }
    on_node(lab, folder, "test early = \"$(cat $0/early/file)\"").context("a mount of the node went with a container")
}

fn sees(lab: &Together<'_>, container: &Running<'_>, name: &str) -> Result<bool> {
    let outcome = lab.exec(&container.id, &["cat", &format!("/volume/{name}/file")])?;
    Ok(outcome.stdout.trim() == name)
}

/// Runs a script on the node, in which `$0` is the folder.
fn on_node(lab: &Together<'_>, folder: &Path, script: &str) -> Result<()> {
    let mut command: Command = lab.node.command("sh");
    let output = command
        .args(["-c", script])
        .arg(folder)
        .output()
        .context("running sh")?;
    ensure!(
        output.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
