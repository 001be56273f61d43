//! A full file system: a pod that finds no room is refused with a sentence that says where, and nothing of it is left. What is to be
//! faster next time is done without.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::message;
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left};
use kubeception_tests::node::{Handler, Node};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;

use crate::clones::COPY;
use crate::lab::{Alone, Lab, OwnPod, Start, origin};
use crate::pod_cgroup::PodCgroup;

/// Handler of machines whose folders are in a small file system.
const STATE: &str = "small-state";
/// The same of machines that are clones with a copy of memory.
const STATE_OF_COPIES: &str = "small-state-copy";
/// Handler of machines whose templates are in it.
const TEMPLATES: &str = "small-templates";
/// That file system, inside the node.
const ROOM: &str = "/run/small";
/// How long a refusal may take, and the removal of what there was of the pod.
const SOON: Duration = Duration::from_secs(10);
/// Room that is left, in KiB: none, and too little at one place or another.
const LEFT: [u32; 5] = [0, 4, 8, 12, 16];

pub(crate) fn handlers(start: Start) -> [Handler; 3] {
    let folder = |path: String| format!("{path:?}");
    [
        start
            .applied(Handler::variant(STATE))
            .set("state_dir", folder(ROOM.to_owned())),
        start
            .applied(Handler::variant(STATE_OF_COPIES))
            .set("state_dir", folder(ROOM.to_owned()))
            .set("clone_mode", "\"copy\""),
        start
            .applied(Handler::variant(TEMPLATES))
            .set("template_dir", folder(format!("{ROOM}/templates"))),
    ]
}

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    if lab.start == Start::Boot {
        return Vec::new();
    }
    vec![
        lab.trial_alone(
            "no room for machines: pods are refused and say where, nothing is left; with room they run",
            |lab| no_room(lab, STATE),
        ),
        lab.trial_alone(
            "no room for machines with a copy of memory: pods are refused and say where, nothing is left",
            |lab| no_room(lab, STATE_OF_COPIES),
        ),
        lab.trial_alone(
            "no room for a copy of memory: the pod is refused, nothing is left; with room it is a clone",
            no_memory,
        ),
        lab.trial_alone(
            "no room any more: a machine that runs goes on, and is removed",
            no_room_any_more,
        ),
        lab.trial_alone("no room for templates: the machine boots, and says why", no_templates),
    ]
}

fn no_room(lab: &mut Alone<'_>, handler: &str) -> Result<()> {
    let room = Room::mount(&lab.node)?;
    // The first makes what stays.
    one_pod(lab, handler)?;
    let (before, files, pods) = (Snapshot::take(&lab.node)?, room.files()?, lab.cri.pods()?);
    room.fill()?;
    for left in LEFT {
        room.leave(left)?;
        let begun = Instant::now();
        match one_pod(lab, handler) {
            Ok(()) => ensure!(left > 0, "a pod runs where there is no room"),
            Err(error) => {
                let (error, took) = (message(&error), begun.elapsed());
                ensure!(
                    error.contains(ROOM) && error.contains("No space left"),
                    "with {left} KiB left the error is {error:?}"
                );
                ensure!(took < SOON, "it came after {:.1} s: {error}", took.as_secs_f32());
            }
        }
        let clean = || {
            expect_nothing_left(&lab.node, &before, SOON)?;
            let there = room.files()?;
            ensure!(there == files, "in {ROOM} there was\n{files}and there is\n{there}");
            ensure!(lab.cri.pods()? == pods, "a sandbox is still listed");
            Ok(())
        };
        clean().with_context(|| format!("after a start with {left} KiB left"))?;
    }
    room.empty()?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "with-room"), handler)?;
    let record: serde_json::Value = serde_json::from_str(&room.run(&format!("cat {ROOM}/{}/machine.json", own.id))?)?;
    let origin = &record["origin"];
    ensure!(origin["from"] == "clone", "its origin is {origin}");
    own.remove()
}

/// The copy is on the pod's account, whose bound comes in the middle of it.
fn no_memory(lab: &mut Alone<'_>) -> Result<()> {
    /// Of the memory that is copied some 90 MiB are not zero.
    const TOO_LITTLE: u64 = 48 << 20;
    const ENOUGH: u64 = 1 << 30;

    lab.shared()?;
    let cgroup = PodCgroup::make(lab.node.place(), "bounded")?;
    let pod = |name: &str| cgroup.takes(Pod::new(lab.node.place(), name));
    let before = Snapshot::take(&lab.node)?;
    cgroup.limit_memory(TOO_LITTLE)?;
    let error = OwnPod::run(lab.cri, pod("bounded"), COPY).err();
    let error = message(&error.context("a pod has a machine that its memory is too small for")?);
    ensure!(error.contains("killed by signal 9"), "the error is {error:?}");
    expect_nothing_left(&lab.node, &before, SOON)?;

    cgroup.limit_memory(ENOUGH)?;
    let own = OwnPod::run(lab.cri, pod("with-room"), COPY)?;
    let origin = origin(lab.node.place(), &own.id)?;
    ensure!(
        origin["from"] == "clone" && origin["mode"] == "copy",
        "its origin is {origin}"
    );
    own.remove()?;
    expect_nothing_left(&lab.node, &before, SOON)
}

fn no_room_any_more(lab: &mut Alone<'_>) -> Result<()> {
    let room = Room::mount(&lab.node)?;
    one_pod(lab, STATE)?;
    let files = room.files()?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "goes-on"), STATE)?;
    room.fill()?;
    let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
    let container = lab.cri.run(&own.id, &idle, &own.pod)?;
    let said = lab.cri.exec(&container, &["echo", "well"])?;
    ensure!(said.stdout == "well\n", "an exec says {said:?}");
    own.remove()?;
    let there = room.files()?;
    ensure!(there == files, "in {ROOM} there was\n{files}and there is\n{there}");
    Ok(())
}

fn no_templates(lab: &mut Alone<'_>) -> Result<()> {
    let room = Room::mount(&lab.node)?;
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "no-template"), TEMPLATES)?;
    let origin = origin(lab.node.place(), &own.id)?;
    let why = origin["why"].as_str().unwrap_or_default();
    ensure!(
        origin["from"] == "boot" && why.contains("no space left") && why.contains(ROOM),
        "its origin is {origin}"
    );
    own.remove()?;
    let left = room.files()?;
    ensure!(
        left.lines()
            .all(|file| file.ends_with("/templates") || file.ends_with(".lock")),
        "in {ROOM} there is\n{left}"
    );
    Ok(())
}

fn one_pod(lab: &Alone<'_>, handler: &str) -> Result<()> {
    OwnPod::run(lab.cri, Pod::new(lab.node.place(), "small"), handler)?.remove()
}

/// A small file system in memory, unmounted when dropped.
struct Room<'a> {
    node: &'a Node,
}

impl<'a> Room<'a> {
    fn mount(node: &'a Node) -> Result<Self> {
        let room = Self { node };
        room.run(&format!(
            "mkdir {ROOM} && mount -t tmpfs -o size=1m,mode=711 small {ROOM}"
        ))?;
        Ok(room)
    }

    fn fill(&self) -> Result<()> {
        self.run(&format!("! dd if=/dev/zero of={ROOM}/filler bs=4k status=none 2>&1"))
            .map(drop)
    }

    /// Makes so much room, in KiB, that is otherwise taken.
    fn leave(&self, kib: u32) -> Result<()> {
        self.fill()?;
        self.run(&format!("truncate --size=-{kib}K {ROOM}/filler")).map(drop)
    }

    fn empty(&self) -> Result<()> {
        self.run(&format!("rm {ROOM}/filler")).map(drop)
    }

    /// What is in it beside what fills it.
    fn files(&self) -> Result<String> {
        self.run(&format!("find {ROOM} -mindepth 1 ! -name filler | sort"))
    }

    fn run(&self, script: &str) -> Result<String> {
        let output = self.node.command("sh").args(["-c", script]).output()?;
        ensure!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.run(&format!("umount {ROOM} && rmdir {ROOM}")) {
            eprintln!("{error:#}");
        }
    }
}
