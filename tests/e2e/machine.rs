//! The pod's machine: a kernel and an operating system of its own, configured by Ignition.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::PodSandboxState;
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::node::Sandboxer;
use kubeception_tests::pod::Pod;
use libtest_mimic::Trial;
use serde_json::Value;

use crate::lab::{
    IGNITED_FILE, IGNITED_UNIT, IGNITED_UNIT_FILE, IGNITED_USER, Lab, OwnPod, Start, Together, eventually, origin,
};

/// Until containerd knows what a machine is.
const TOLD: Duration = Duration::from_secs(10);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial("a container runs on the guest's kernel, not on the host's", own_kernel),
        lab.trial(
            "a container does not see the guest's own files and processes",
            own_namespaces,
        ),
        lab.trial(
            "a Container Linux Config in a ConfigMap makes its user, its file and its unit in the guest",
            configuration,
        ),
        lab.trial("the pod is ready and has an address", pod_status),
        lab.trial("crictl inspectp tells what the pod's machine is", told),
    ]
}

fn own_kernel(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("kernel")?;
    let boot_id = "/proc/sys/kernel/random/boot_id";
    let of_host = fs::read_to_string(boot_id).context("the host's boot id")?;
    let of_container = lab.exec(&container.id, &["cat", boot_id])?.stdout;
    let of_guest = lab.in_guest(&lab.shared()?.id, &["cat", boot_id])?;
    ensure!(
        of_container != of_host,
        "the container has the host's boot id {of_host}"
    );
    ensure!(
        of_container == of_guest,
        "the container has the boot id {of_container}, the guest {of_guest}"
    );
    Ok(())
}

fn own_namespaces(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("namespaces")?;
    let processes = lab.exec(&container.id, &["ps"])?.stdout;
    ensure!(
        !processes.contains("systemd") && !processes.contains("coreos-kvm-agent"),
        "it sees {processes}"
    );
    let seen = lab.exec(&container.id, &["ls", IGNITED_FILE.0])?;
    ensure!(seen.exit_code != 0, "it sees the guest's {}", IGNITED_FILE.0);
    Ok(())
}

fn configuration(lab: &Together<'_>) -> Result<()> {
    let shared = lab.shared()?;
    let (path, content) = IGNITED_FILE;
    let found = lab.in_guest(&shared.id, &["cat", path])?;
    ensure!(found.trim() == content, "{path} has {found:?}");
    let (user, groups) = IGNITED_USER;
    let found = lab.in_guest(&shared.id, &["id", "-Gn", user])?;
    ensure!(found.trim() == groups, "the user {user} is in the groups {found:?}");
    // systemd starts it when the pod may already be ready.
    eventually(Duration::from_secs(30), || {
        let state = lab.in_guest(&shared.id, &["systemctl", "is-active", IGNITED_UNIT])?;
        ensure!(state.trim() == "active", "{IGNITED_UNIT} is {state:?}");
        Ok(())
    })?;
    let found = lab.in_guest(&shared.id, &["cat", IGNITED_UNIT_FILE])?;
    let address = lab.pod_address(&shared.id)?;
    let expected = match lab.machine_start() {
        Start::Boot => format!("shared {address}\n"),
        Start::Clone => "template\n".to_owned(),
    };
    ensure!(
        found == expected,
        "{IGNITED_UNIT_FILE} has {found:?}, and the pod's address is {address}"
    );
    Ok(())
}

fn pod_status(lab: &Together<'_>) -> Result<()> {
    let status = lab.pod_status(&lab.shared()?.id)?;
    ensure!(
        status.state() == PodSandboxState::SandboxReady,
        "the pod is {}",
        status.state().as_str_name()
    );
    let network = status.network.context("the pod has no network")?;
    ensure!(network.ip.starts_with("10.88."), "its address is {:?}", network.ip);
    Ok(())
}

fn told(lab: &Together<'_>) -> Result<()> {
    let place = lab.node.place();
    let own = OwnPod::run(lab, Pod::new(place, "told"), COREOS_KVM)?;
    let begun = Instant::now();
    // containerd's own sandboxes have it some moments later.
    let facts = loop {
        let facts = facts(lab, &own.id)?;
        if !facts.is_empty() {
            break facts;
        }
        ensure!(begun.elapsed() < TOLD, "nothing is told of the machine");
        std::thread::sleep(Duration::from_millis(20));
    };
    let fact = |name: &str| {
        let fact = facts.get(name).map(String::as_str);
        fact.with_context(|| format!("there is no {name} in {facts:?}"))
    };
    let comm = format!("/proc/{}/comm", fact("pid")?);
    let program = lab.node.command("cat").arg(comm).output()?.stdout;
    ensure!(program.starts_with(b"qemu-system"), "{facts:?}");
    ensure!(
        fact("guest")? == "reference" && ["kvm", "tcg"].contains(&fact("accel")?),
        "{facts:?}"
    );
    let console = fact("console")?;
    let seen = lab.node.command("test").args(["-f", console]).status()?;
    ensure!(seen.success(), "there is no {console}");
    let origin = origin(place, &own.id)?;
    let (kind, why) = match lab.machine_start() {
        Start::Clone => ("clone", "template"),
        Start::Boot => ("booted", "why"),
    };
    ensure!(
        fact("kind")? == kind && origin[why] == fact(why)?,
        "{facts:?} of {origin}"
    );
    own.remove()
}

/// What `crictl inspectp` tells of the machine: in a place of its own where the sandbox is the shim's, else among the annotations.
fn facts(lab: &Together<'_>, sandbox: &str) -> Result<BTreeMap<String, String>> {
    let said = lab.pod_info(sandbox)?;
    let info: Value = serde_json::from_str(said.get("info").context("there is no info")?)?;
    let (facts, prefix) = match lab.sandboxer() {
        Sandboxer::Shim => (&info, ""),
        Sandboxer::PodSandbox => (&info["runtimeSpec"]["annotations"], "machine.coreos-kvm.io/"),
    };
    let facts = facts.as_object().into_iter().flatten();
    Ok(facts
        .filter_map(|(name, fact)| {
            let text = fact.as_str().map_or_else(|| fact.to_string(), str::to_owned);
            Some((name.strip_prefix(prefix)?.to_owned(), text))
        })
        .collect())
}
