//! A container that nobody calls part of a pod, as `ctr run` makes them: it has a machine of its own.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left};
use kubeception_tests::node::Handler;
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab};

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![lab.trial_alone(
        "ctr runs a container in a machine of its own, and nothing is left of it",
        ctr_run,
    )]
}

fn ctr_run(lab: &mut Alone<'_>) -> Result<()> {
    // The first machine of a node makes what stays.
    lab.shared()?;
    // The folder of ctr's own FIFOs, which it makes and leaves.
    fs::create_dir_all(lab.node.place().run().join("containerd/fifo"))?;
    let before = Snapshot::take(&lab.node)?;
    let cgroup = format!("{}/by-ctr", lab.node.place().cgroup_parent());
    let config = Handler::standard().config_path(lab.node.place());
    let output = lab
        .node
        .command("ctr")
        .args(["-n", "k8s.io", "run", "--rm", "--cgroup", &cgroup])
        .args(["--runtime", "io.containerd.coreos-kvm.v2", "--runtime-config-path"])
        .arg(config)
        .args([
            BUSYBOX,
            "by-ctr",
            "sh",
            "-c",
            "cat /proc/sys/kernel/random/boot_id; exit 3",
        ])
        .output()?;
    let (said, complaints) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(
        output.status.code() == Some(3),
        "ctr ended with {}: {said} {complaints}",
        output.status
    );
    let of_host = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    ensure!(
        said.trim().len() == 36 && said.trim() != of_host.trim(),
        "the container said {said:?}"
    );
    expect_nothing_left(&lab.node, &before, Duration::from_secs(10))
}
