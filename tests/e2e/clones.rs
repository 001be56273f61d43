//! Pods whose machines are clones of one template, as pods see it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::lab::{CONFIG_INLINE, Lab, OwnPod, Start, TEMPLATE, Together, eventually, expect_start, origin};

/// After its services have been woken a clone makes its ssh keys.
const SERVICES: Duration = Duration::from_secs(60);

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
