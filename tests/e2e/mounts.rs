//! Volumes that are more than a folder: what the node has mounted below one, and what is mounted at /dev/shm.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::lab::{Lab, OwnPod, Running, Together, eventually};

const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial(
            "what the node mounts below a volume shows where that is asked for, and stays the node's",
            below_a_volume,
        ),
        lab.trial(
            "a folder is one for all containers of a pod: a pipe in it, and who may write to it",
            of_the_pod,
        ),
        lab.trial(
            "a volume at /dev/shm is there: its files, or as much memory as it has",
            at_dev_shm,
        ),
    ]
}

fn of_the_pod(lab: &Together<'_>) -> Result<()> {
    let folder = lab.node.place().base().join("of-the-pod");
    on_node(
        lab,
        &folder,
        "mkdir -p $0/plain $0/sub-path $0/follows/late && mount --bind $0/plain $0/sub-path",
    )?;
    let tried = one_for_all(lab, &folder);
    let unmounted = on_node(
        lab,
        &folder,
        "umount $0/sub-path; ! mountpoint -q $0/follows/late || umount -l $0/follows/late; rm -r $0",
    );
    tried.and(unmounted)
}

fn one_for_all(lab: &Together<'_>, folder: &Path) -> Result<()> {
    let place = lab.node.place();
    let pod = Pod::new(place, "volumes");
    let empty_dir = pod.empty_dir(place, "sockets")?;
    let own = OwnPod::run(lab, pod, COREOS_KVM)?;
    let container = |name, path: &Path, readonly| {
        let container = Container::new(name, BUSYBOX).command(&["sleep", "2147483647"]);
        let container = container.host_path(&empty_dir, "/own", readonly);
        lab.run(&own.id, &container.host_path(path, "/node", readonly), &own.pod)
    };
    // Of the pod's own volume who may only read comes first.
    let early = container("early", &folder.join("plain"), true)?;
    let one = container("one", &folder.join("plain"), false)?;
    // As the kubelet has it for a `subPath`: another mount of the same folder.
    let two = container("two", &folder.join("sub-path"), false)?;
    let late = container("late", &folder.join("plain"), true)?;

    let run = |id: &str, script: &str| lab.exec(id, &["sh", "-c", script]);
    let made = run(&one, "mkfifo /own/pipe /node/pipe && echo begun >/node/file")?;
    ensure!(made.exit_code == 0, "a volume cannot be written to: {}", made.stderr);
    for volume in ["/own", "/node"] {
        let refused = run(&late, &format!("cat /node/file && echo >{volume}/other"))?;
        ensure!(
            refused.stdout == "begun\n" && refused.exit_code != 0,
            "a read-only volume can be written to: {refused:?}"
        );
    }
    for (from, to, pipe) in [
        (&one, &two, "/node/pipe"),
        (&two, &late, "/node/pipe"),
        (&one, &early, "/own/pipe"),
        (&two, &late, "/own/pipe"),
    ] {
        // The writer waits for its reader.
        run(
            from,
            &format!("(echo through-the-pipe >{pipe}) </dev/null >/dev/null 2>&1 &"),
        )?;
        let read = run(to, &format!("timeout 20 cat {pipe}"))?;
        ensure!(
            read.stdout == "through-the-pipe\n",
            "{pipe} is not one for both: {} {}",
            read.stdout,
            read.stderr
        );
    }
    let follows = Container::new("follows", BUSYBOX).command(&["sleep", "2147483647"]);
    let follows = follows
        .host_path(&folder.join("follows"), "/follows", false)
        .follows_the_node();
    let follows = lab.run(&own.id, &follows, &own.pod)?;
    on_node(
        lab,
        folder,
        "mount -t tmpfs none $0/follows/late && echo late >$0/follows/late/file",
    )?;
    let seen = run(&follows, "cat /follows/late/file")?;
    ensure!(
        seen.stdout == "late\n",
        "what the node mounts later does not show: {seen:?}"
    );
    for id in [&one, &two, &early, &follows] {
        lab.stop(id, Duration::ZERO)?;
        lab.remove(id)?;
    }
    let seen = run(&late, "cat /node/file")?;
    ensure!(
        seen.stdout == "begun\n",
        "a volume has gone with another container: {seen:?}"
    );
    lab.stop(&late, Duration::ZERO)?;
    lab.remove(&late)?;
    let mounts = lab.in_guest(&own.id, &["cat", "/proc/self/mountinfo"])?;
    ensure!(!mounts.contains("/.volumes/"), "the guest still has volumes:\n{mounts}");
    own.remove()
}

fn at_dev_shm(lab: &Together<'_>) -> Result<()> {
    let folder = lab.node.place().base().join("shm");
    // Named as the kubelet names them.
    let make = "mkdir -p $0/disk $0/kubernetes.io~empty-dir/memory && echo of-the-node >$0/disk/file \
        && mount -t tmpfs -o size=80m none $0/kubernetes.io~empty-dir/memory";
    on_node(lab, &folder, make)?;
    let tried = files_or_memory(lab, &folder);
    let unmounted = on_node(lab, &folder, "umount $0/kubernetes.io~empty-dir/memory && rm -r $0");
    tried.and(unmounted)
}

fn files_or_memory(lab: &Together<'_>, folder: &Path) -> Result<()> {
    let idle = |name, volume: &str| {
        let container = Container::new(name, BUSYBOX).command(&["sleep", "2147483647"]);
        container.host_path(&folder.join(volume), "/dev/shm", false)
    };
    let (disk, memory) = (idle("disk", "disk"), idle("memory", "kubernetes.io~empty-dir/memory"));
    let (disk, memory) = (lab.running(&disk)?, lab.running(&memory)?);
    let run = |container: &Running<'_>, script: &str| {
        let outcome = lab.exec(&container.id, &["sh", "-c", script])?;
        ensure!(outcome.exit_code == 0, "{script}: {}", outcome.stderr);
        Ok(outcome.stdout)
    };
    let found = run(&disk, "cat /dev/shm/file && echo of-the-guest >/dev/shm/file")?;
    ensure!(found == "of-the-node\n", "the volume has {found:?}");
    on_node(lab, folder, "test of-the-guest = \"$(cat $0/disk/file)\"")?;
    // More than a pod has without.
    let wrote = run(
        &memory,
        "head -c 75497472 /dev/zero >/dev/shm/much && rm /dev/shm/much && df -m /dev/shm",
    )?;
    ensure!(wrote.contains(" 80 "), "not as large as the volume: {wrote}");
    for container in [disk, memory] {
        lab.stop(&container.id, Duration::ZERO)?;
        lab.remove(&container.id)?;
    }
    Ok(())
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
