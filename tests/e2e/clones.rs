//! Pods whose machines are clones of one template, as pods see it.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::{COREOS_KVM, read_log, wait_for_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::expect_nothing_left;
use kubeception_tests::node::Handler;
use kubeception_tests::pod::{Container, Pod, limits};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::lab::{Alone, CONFIG_INLINE, Lab, OwnPod, Start, TEMPLATE, Together, eventually, expect_start, origin};

/// Handler of machines that are clones with a copy of memory.
pub(crate) const COPY: &str = "copy";
const BOUND: Duration = Duration::from_secs(30);
/// After its services have been woken a clone makes its ssh keys.
const SERVICES: Duration = Duration::from_secs(60);

pub(crate) fn handler(start: Start) -> Handler {
    start.applied(Handler::variant(COPY)).set("clone_mode", "\"copy\"")
}

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    if lab.start == Start::Boot {
        return Vec::new();
    }
    vec![
        lab.trial("clones of one template are machines of their own", own_machines),
        lab.trial(
            "pods with the same configuration are clones of one template, with ssh keys of their own",
            own_templates,
        ),
        lab.trial("a pod that is not to be a clone boots", no_clone),
        lab.trial_alone(
            "a clone with a copy of memory: containers, execs, files, output and growth; nothing is left",
            by_copy,
        ),
    ]
}

/// Nobody's public key.
const LOGIN: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA nobody";

/// What a container in the pod sees that no other machine may have.
fn seen(lab: &Together<'_>, own: &OwnPod<'_>) -> Result<Vec<String>> {
    let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
    let container = lab.run(&own.id, &idle, &own.pod)?;
    let script = "cat /proc/sys/kernel/random/boot_id; hostname; cat /sys/class/net/eth0/address; \
                  head -c 16 /dev/urandom | od -An -tx1; cat /proc/sys/kernel/random/uuid";
    let said = lab.exec(&container, &["sh", "-c", script])?;
    ensure!(said.exit_code == 0, "{}", said.stderr);
    let mut all: Vec<_> = said.stdout.lines().map(str::to_owned).collect();
    all.push(lab.in_guest(&own.id, &["cat", "/etc/machine-id"])?);
    ensure!(all.len() == 6, "the container said {all:?}");
    Ok(all)
}

fn own_machines(lab: &Together<'_>) -> Result<()> {
    let place = lab.node.place();
    let pods = ["clone-a", "clone-b"].map(|name| OwnPod::run(lab, Pod::new(place, name), COREOS_KVM));
    let mut all = Vec::new();
    for own in pods {
        let own = own?;
        expect_start(place, &own.id, Start::Clone)?;
        all.push((seen(lab, &own)?, origin(place, &own.id)?["template"].clone()));
        own.remove()?;
    }
    let [(first, template), (second, same)] = all.as_slice() else {
        anyhow::bail!("there are two pods");
    };
    ensure!(template == same, "they are clones of {template} and {same}");
    for (first, second) in first.iter().zip(second) {
        ensure!(first != second, "both have {first}");
    }
    Ok(())
}

/// A configuration with a file, and a user who may log in, for whom the guest makes a key of its own.
fn configuration(content: &str) -> Value {
    let source = format!("data:,{content}");
    json!({
        "ignition": {"version": "3.3.0"},
        "passwd": {"users": [{"name": "of-the-template", "sshAuthorizedKeys": [LOGIN]}]},
        "storage": {"files": [{"path": "/etc/of-the-template", "contents": {"source": source}}]},
    })
}

fn own_templates(lab: &Together<'_>) -> Result<()> {
    let place = lab.node.place();
    let mut keys = BTreeSet::new();
    let mut templates = Vec::new();
    for (name, content) in [("own-a", "one"), ("own-b", "one"), ("own-c", "another")] {
        let pod = Pod::new(place, name)
            .annotation(CONFIG_INLINE, configuration(content).to_string())
            .annotation(TEMPLATE, "true");
        let own = OwnPod::run(lab, pod, COREOS_KVM)?;
        expect_start(place, &own.id, Start::Clone)?;
        templates.push(origin(place, &own.id)?["template"].clone());
        let file = lab.in_guest(&own.id, &["cat", "/etc/of-the-template"])?;
        ensure!(file == content, "{name} has {file:?}");
        let key = eventually(SERVICES, || {
            lab.in_guest(&own.id, &["cat", "/etc/ssh/ssh_host_ed25519_key.pub"])
        });
        keys.insert(key.context("the guest has no ssh key")?);
        own.remove()?;
    }
    ensure!(templates[0] == templates[1], "the same configuration has two templates");
    ensure!(templates[1] != templates[2], "two configurations have one template");
    ensure!(keys.len() == 3, "there are the ssh keys {keys:?}");
    Ok(())
}

fn no_clone(lab: &Together<'_>) -> Result<()> {
    let place = lab.node.place();
    let pod = Pod::new(place, "no-clone").annotation(TEMPLATE, "false");
    let own = OwnPod::run(lab, pod, COREOS_KVM)?;
    expect_start(place, &own.id, Start::Boot)?;
    own.remove()
}

fn by_copy(lab: &mut Alone<'_>) -> Result<()> {
    let before = lab.snapshot()?;
    let place = lab.node.place();
    // Two, for neither may have anything of the other's.
    let pods = ["copy-a", "copy-b"].map(|name| OwnPod::run(lab.cri, Pod::new(place, name), COPY));
    for own in pods {
        let own = own?;
        let origin = origin(place, &own.id)?;
        ensure!(
            origin["from"] == "clone" && origin["mode"] == "copy",
            "its origin is {origin}"
        );
        lives(lab, &own)?;
        own.remove()?;
    }
    expect_nothing_left(&lab.node, &before, BOUND)
}

/// Everything that goes another way in such a clone: calls, streams and files.
fn lives(lab: &Alone<'_>, own: &OwnPod<'_>) -> Result<()> {
    let folder = lab.node.place().base().join("copied");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("from-host"), "hello guest\n")?;
    let script = "cat /volume/from-host; echo hello host > /volume/from-guest; seq 1 20000; while :; do sleep 1; done";
    let container = Container::script("lives", script).host_path(&folder, "/volume", false);
    let id = lab.cri.run(&own.id, &container, &own.pod)?;
    wait_for_log(&container.log(&own.pod), BOUND, |line| line.text == "20000")?;
    let log = read_log(&container.log(&own.pod))?;
    let expected = std::iter::once("hello guest".to_owned()).chain((1..=20_000).map(|number| number.to_string()));
    ensure!(
        log.iter()
            .map(|line| &line.text)
            .eq(expected.collect::<Vec<_>>().iter()),
        "the log of {} lines is not what was written",
        log.len()
    );
    let written = fs::read_to_string(folder.join("from-guest")).context("what the container wrote")?;
    ensure!(written == "hello host\n", "the container wrote {written:?}");

    // Its root file system, by way of the host and back.
    let script =
        "head -c 3000000 /dev/urandom > /new && sync && cp /new /copy && cmp /new /copy && wc -c < /copy; hostname";
    let said = lab.cri.exec(&id, &["sh", "-c", script])?;
    let name = &own.pod.config.hostname;
    ensure!(said.stdout == format!("3000000\n{name}\n"), "an exec says {said:?}");
    lab.cri.update(&id, limits(1000, 1024))?;
    let said = lab.cri.exec(&id, &["grep", "MemTotal:", "/proc/meminfo"])?;
    let kib = said.stdout.split_ascii_whitespace().nth(1).context("no memory")?;
    ensure!(kib.parse::<u64>()? > 1 << 20, "with 1 GiB allowed there is {kib} KiB");
    lab.cri.stop(&id, Duration::ZERO)?;
    let exit = lab.cri.status(&id)?.exit_code;
    ensure!(exit == 137, "its exit code is {exit}");
    lab.cri.remove(&id)
}
