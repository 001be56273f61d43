//! The pod's machine: a kernel and an operating system of its own, configured by Ignition.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use k8s_cri::v1::PodSandboxState;
use libtest_mimic::Trial;

use crate::lab::{IGNITED_FILE, IGNITED_UNIT, IGNITED_UNIT_FILE, IGNITED_USER, Lab, Start, Together, eventually};

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
