//! The size of machines: that of their pods' limits, also when these change.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::{COREOS_KVM, message};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::node::{Handler, Sandboxer};
use kubeception_tests::pod::{Container, Pod, limits};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::lab::{Lab, OwnPod, Start, Together};

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![lab.trial(
        "a machine has the size of its pod's limits, and follows them",
        follows_limits,
    )]
}

/// What the guest's kernel keeps for itself, in MiB.
const KERNEL: u64 = 64;

/// Processors and MiB of memory of a machine as `coreos-kvm ps` tells them.
fn told(lab: &Together<'_>, id: &str) -> Result<(u64, u64)> {
    let mut command = lab.node.command("coreos-kvm");
    command
        .arg("--config")
        .arg(Handler::standard().config_path(lab.node.place()));
    let output = command
        .args(["ps", "--json"])
        .output()
        .context("running coreos-kvm ps")?;
    let machines: Vec<Value> = serde_json::from_slice(&output.stdout).context("reading what coreos-kvm ps says")?;
    let machine = machines.iter().find(|machine| machine["id"] == id);
    let machine = machine.context("coreos-kvm ps does not name the machine")?;
    let number = |key: &str| machine[key].as_u64().with_context(|| format!("{machine} has no {key}"));
    Ok((number("vcpus")?, number("memory_mib")?))
}

/// Fails unless the machine has this size, for the node's admin and for a container in it.
fn expect_size(lab: &Together<'_>, own: &OwnPod<'_>, container: &str, vcpus: u64, memory_mib: u64) -> Result<()> {
    let told = told(lab, &own.id)?;
    ensure!(told == (vcpus, memory_mib), "the machine has {told:?}");
    let script = "grep -c ^processor /proc/cpuinfo; grep MemTotal: /proc/meminfo";
    let said = lab.exec(container, &["sh", "-c", script])?;
    let words: Vec<_> = said.stdout.split_ascii_whitespace().collect();
    let [processors, "MemTotal:", kib, "kB"] = words.as_slice() else {
        anyhow::bail!("the container says {said:?}");
    };
    let seen = (processors.parse::<u64>()?, kib.parse::<u64>()? >> 10);
    ensure!(
        seen.0 == vcpus && (memory_mib - KERNEL..memory_mib).contains(&seen.1),
        "the container sees {seen:?} of {told:?}"
    );
    Ok(())
}

/// The limits that the guest's kernel holds a container to: quota and period of its processors, and memory.
fn held_to(lab: &Together<'_>, own: &OwnPod<'_>, container: &str) -> Result<String> {
    let script =
        format!("cd $(find /sys/fs/cgroup -type d -name '*{container}*' | head -n 1) && cat cpu.max memory.max");
    let said = lab.in_guest(&own.id, &["sh", "-c", &script])?;
    Ok(said.split_ascii_whitespace().collect::<Vec<_>>().join(" "))
}

/// Fails unless it is these.
fn expect_limits(lab: &Together<'_>, own: &OwnPod<'_>, container: &str, quota: u32, mib: u64) -> Result<()> {
    let held_to = held_to(lab, own, container)?;
    let expected = format!("{quota} 100000 {}", mib << 20);
    ensure!(held_to == expected, "the container is held to {held_to}");
    Ok(())
}

fn follows_limits(lab: &Together<'_>) -> Result<()> {
    let pod = Pod::new(lab.node.place(), "sized").limits(limits(1500, 300));
    let own = OwnPod::run(lab, pod, COREOS_KVM)?;
    // A clone has that of a template which it shares with pods of about its size.
    let memory = match lab.machine_start() {
        Start::Clone => 640,
        Start::Boot => 300 + 256,
    };
    let idle = Container::new("idle", BUSYBOX)
        .command(&["sleep", "2147483647"])
        .limits(limits(1500, 300));
    let container = lab.run(&own.id, &idle, &own.pod)?;
    expect_size(lab, &own, &container, 2, memory)?;
    expect_limits(lab, &own, &container, 150000, 300)?;

    lab.update(&container, limits(2500, 1024))?;
    let grown = memory + (1024 + 256 - memory).next_multiple_of(128);
    expect_size(lab, &own, &container, 3, grown)?;
    expect_limits(lab, &own, &container, 250000, 1024)?;

    for (too_large, words) in [
        (
            limits(2500, 1 << 20),
            "is too large: `max_memory_mib` in config.toml allows 65536",
        ),
        (
            limits(9000, 1024),
            "a machine of 9 processors is too large: this one can grow to 8",
        ),
    ] {
        let refused = lab.update(&container, too_large);
        let error = refused.err().context("a machine that is too large is not refused")?;
        ensure!(message(&error).contains(words), "the refusal is {:?}", message(&error));
    }
    expect_size(lab, &own, &container, 3, grown)?;
    expect_limits(lab, &own, &container, 250000, 1024)?;

    // Elsewhere containerd has no task of the sandbox that could be told.
    if lab.sandboxer() == Sandboxer::PodSandbox {
        // The pod's own limits, below which its container's stay.
        let limits = json!({"cpu": {"quota": 400_000, "period": 100_000}, "memory": {"limit": 1200 << 20}});
        lab.update_sandbox(&own.id, &limits)?;
        expect_size(
            lab,
            &own,
            &container,
            4,
            grown + (1200_u64 - 1024).next_multiple_of(128),
        )?;

        let limits = json!({"cpu": {"quota": 10_000}, "memory": {"limit": 64 << 20}});
        lab.update_sandbox(&own.id, &limits)?;
    }
    lab.update(&container, limits(500, 200))?;
    expect_size(lab, &own, &container, 2, memory)?;
    expect_limits(lab, &own, &container, 50000, 200)?;

    // One that its pod was started without knowing of.
    let second = Container::new("second", BUSYBOX)
        .command(&["sleep", "2147483647"])
        .limits(limits(2000, 600));
    let second = lab.run(&own.id, &second, &own.pod)?;
    expect_size(
        lab,
        &own,
        &second,
        3,
        memory + (200 + 600 + 256 - memory).next_multiple_of(128),
    )?;
    own.remove()
}
