//! Bad input: `crictl runp` answers one sentence that names the culprit and the way out, soon, and nothing is left behind.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::cri::{COREOS_KVM, RUNC, message};
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left, processes};
use kubeception_tests::node::{Handler, Place, Sandboxer};
use kubeception_tests::pod::Pod;
use libtest_mimic::Trial;

use crate::lab::{Alone, CONFIG_INLINE, Lab, OwnPod, Start, node_name};

/// How long a refusal may take.
const SOON: Duration = Duration::from_secs(10);
/// How long a boot may take that gets as far as the agent's greeting.
const BOOT: Duration = Duration::from_secs(120);
/// Time-out of the guest that never comes up, in seconds: long enough for some words on the console.
const NEVER_UP: u64 = 20;

/// A node of its own: each trial looks at all that is on it.
pub(crate) fn lab(version: Containerd, sandboxer: Sandboxer, start: Start) -> Arc<Lab> {
    let name = format!("bad-{version}");
    let base = Place::new(&node_name(&name, sandboxer)).base().to_owned();
    let path = |file: &str| format!("{:?}", base.join(file).display().to_string());
    let handlers = vec![
        start.handler(),
        Handler::variant("no-qemu").set("qemu", "\"/nowhere/qemu-system-x86_64\""),
        Handler::variant("old-qemu").set("qemu", path("old-qemu")),
        Handler::variant("kvm-only").set("acceleration", "\"kvm\""),
        Handler::variant("impatient")
            .set("boot_timeout_s", NEVER_UP.to_string())
            .set("templates", "\"off\""),
        Handler::variant("other-agent").set("agent_disk", path("other-agent.erofs")),
        Handler::variant("unknown-key").set("gests_dir", "\"/somewhere\""),
        Handler::variant("bad-value").set("acceleration", "\"warp\""),
    ];
    Lab::new(&name, version, sandboxer, start, handlers)
}

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    let annotated = |name: &str, annotations: &'static [(&str, &str)], words: &'static [&str]| {
        lab.trial_alone(&format!("bad input: {name}"), move |lab| {
            refused(lab, COREOS_KVM, annotations, words, SOON).map(drop)
        })
    };
    let configured = |name: &str, handler: &'static str, words: &'static [&str]| {
        lab.trial_alone(&format!("bad input: {name}"), move |lab| {
            refused(lab, handler, &[], words, SOON).map(drop)
        })
    };
    vec![
        annotated(
            "Ignition that is no JSON",
            &[(CONFIG_INLINE, "{\n  \"ignition\": { version: \"3.3.0\" }\n}")],
            &["config-inline", "line 2", "column"],
        ),
        annotated(
            "an Ignition version that nobody knows",
            &[(CONFIG_INLINE, r#"{"ignition": {"version": "9.9.0"}}"#)],
            &["config-inline", "9.9.0", "3.6.0"],
        ),
        annotated(
            "a mistake in Butane, with its place",
            &[(
                CONFIG_INLINE,
                "variant: fcos\nversion: 1.4.0\nstorage:\n  files:\n    - path: relative\n",
            )],
            &["config-inline", "line 5", "storage.files.0.path"],
        ),
        annotated(
            "a configuration in a volume that the pod does not have",
            &[("coreos-kvm.io/config", "configmap/none/config.yaml")],
            &["configmap/none/config.yaml", "no configmap volume"],
        ),
        annotated(
            "a configuration that is in no volume",
            &[("coreos-kvm.io/config", "secret/../../shadow")],
            &["coreos-kvm.io/config", "configmap/<volume>/<key>"],
        ),
        annotated(
            "two configurations",
            &[("coreos-kvm.io/config", "configmap/os/key"), (CONFIG_INLINE, "{}")],
            &["coreos-kvm.io/config-inline", "two configurations"],
        ),
        annotated(
            "a guest that is not installed",
            &[("coreos-kvm.io/guest", "nonesuch")],
            &["nonesuch", "reference"],
        ),
        annotated(
            "memory below what the guest needs",
            &[("coreos-kvm.io/memory", "16Mi")],
            &["memory", "16", "MiB"],
        ),
        annotated(
            "a number that is none",
            &[("coreos-kvm.io/vcpus", "many")],
            &["vcpus", "many"],
        ),
        annotated(
            "an annotation that is unknown",
            &[("coreos-kvm.io/vcpu", "2")],
            &["vcpu", "vcpus"],
        ),
        annotated(
            "an annotation that is not allowed",
            &[("coreos-kvm.io/kernel-args", "single")],
            &["kernel-args", "config.toml"],
        ),
        configured("QEMU is missing", "no-qemu", &["/nowhere/qemu-system-x86_64"]),
        configured(
            "an unknown key in config.toml",
            "unknown-key",
            &["unknown-key.toml:", "gests_dir", "guests_dir"],
        ),
        configured(
            "a bad value in config.toml",
            "bad-value",
            &["bad-value.toml:", "warp", "kvm", "tcg", "auto"],
        ),
        lab.trial_alone("bad input: QEMU is too old", old_qemu),
        lab.trial_alone("bad input: a guest image that is truncated", truncated_image),
        lab.trial_alone("bad input: KVM is demanded, and used or refused", kvm_demanded),
        lab.trial_alone(
            "bad input: a guest that never comes up shows the console's last lines",
            never_up,
        ),
        lab.trial_alone("bad input: an agent of another version", other_agent),
    ]
}

/// Runs a pod that has to fail, and answers the error.
fn refused(
    lab: &Alone<'_>,
    handler: &str,
    annotations: &[(&str, &str)],
    words: &[&str],
    within: Duration,
) -> Result<String> {
    let place = lab.node.place();
    // The first pod of a node makes what stays, such as the bridge.
    OwnPod::run(lab.cri, Pod::new(place, "first"), RUNC)?.remove()?;
    // So does whoever first asks for facts about the host; that not all is well is the matter of some trials.
    let mut check = lab.node.command("coreos-kvm");
    check
        .arg("--config")
        .arg(Handler::standard().config_path(place))
        .arg("check");
    check.output().context("running coreos-kvm check")?;
    let before = Snapshot::take(&lab.node)?;

    let pod = annotations
        .iter()
        .fold(Pod::new(place, "bad"), |pod, (key, value)| pod.annotation(key, *value));
    let begun = Instant::now();
    let outcome = lab.cri.run_pod(&pod, handler);
    let took = begun.elapsed();
    let Err(error) = outcome else {
        let id = outcome?;
        lab.cri.stop_pod(&id)?;
        lab.cri.remove_pod(&id)?;
        anyhow::bail!("the pod was run");
    };
    let error = message(&error);
    for word in words {
        ensure!(error.contains(word), "{word:?} is not in the error: {error}");
    }
    ensure!(
        took <= within,
        "the error came after {:.1} s: {error}",
        took.as_secs_f32()
    );
    expect_nothing_left(&lab.node, &before, SOON).with_context(|| format!("after the error {error:?}"))?;
    ensure!(lab.cri.pods()?.is_empty(), "a sandbox is still listed");
    Ok(error)
}

fn old_qemu(lab: &mut Alone<'_>) -> Result<()> {
    let program = lab.node.place().base().join("old-qemu");
    fs::write(
        &program,
        "#!/bin/sh\necho 'QEMU emulator version 4.2.1 (Debian 1:4.2-3)'\n",
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    refused(lab, "old-qemu", &[], &["4.2", "7.2"], SOON).map(drop)
}

/// A guest like the reference, under another name, with its description changed.
fn variant_guest(lab: &Alone<'_>, name: &str, change: impl Fn(String) -> String) -> Result<std::path::PathBuf> {
    let guests = lab.node.place().guests();
    let (reference, folder) = (guests.join("reference"), guests.join(name));
    fs::create_dir_all(&folder)?;
    for entry in fs::read_dir(&reference)? {
        let entry = entry?;
        let (from, to) = (entry.path().canonicalize()?, folder.join(entry.file_name()));
        match symlink(from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
    }
    let description = fs::read_to_string(reference.join("guest.toml"))?;
    let description = change(description.replace("name = \"reference\"", &format!("name = {name:?}")));
    fs::remove_file(folder.join("guest.toml"))?;
    fs::write(folder.join("guest.toml"), description)?;
    Ok(folder)
}

fn truncated_image(lab: &mut Alone<'_>) -> Result<()> {
    let folder = variant_guest(lab, "truncated", |description| description)?;
    let image = folder.join("root.erofs");
    fs::remove_file(&image)?;
    fs::write(&image, "a beginning")?;
    refused(
        lab,
        COREOS_KVM,
        &[("coreos-kvm.io/guest", "truncated")],
        &["root.erofs", "truncated"],
        SOON,
    )
    .map(drop)
}

/// Where KVM runs guests the pod runs by it, elsewhere it is refused; never is it run by translation.
fn kvm_demanded(lab: &mut Alone<'_>) -> Result<()> {
    let before = processes(&lab.node)?;
    match OwnPod::run(lab.cri, Pod::new(lab.node.place(), "by-kvm"), "kvm-only") {
        Ok(own) => {
            let processes = processes(&lab.node)?;
            let qemu = processes
                .iter()
                .find(|process| !before.contains(process) && process.command.contains("qemu-system"));
            let qemu = qemu.context("the pod has no QEMU")?;
            ensure!(
                qemu.command.contains("kvm"),
                "its QEMU is not told to use KVM: {}",
                qemu.command
            );
            own.remove()
        }
        Err(_) => refused(lab, "kvm-only", &[], &["KVM", "tcg"], SOON).map(drop),
    }
}

fn never_up(lab: &mut Alone<'_>) -> Result<()> {
    variant_guest(lab, "silent", |description| {
        let arguments = "systemd.mask=coreos-kvm-agent.service systemd.show_status=true loglevel=6";
        description.lines().fold(String::new(), |text, line| {
            match line.strip_prefix("kernel_args = \"") {
                Some(rest) => format!("{text}kernel_args = \"{} {arguments}\"\n", rest.trim_end_matches('"')),
                None => format!("{text}{line}\n"),
            }
        })
    })?;
    let within = Duration::from_secs(NEVER_UP) + SOON;
    let words = ["console", "systemd"];
    refused(lab, "impatient", &[("coreos-kvm.io/guest", "silent")], &words, within).map(drop)
}

fn other_agent(lab: &mut Alone<'_>) -> Result<()> {
    let base = lab.node.place().base();
    let content = base.join("other-agent");
    fs::create_dir_all(&content)?;
    fs::copy(
        env!("CARGO_BIN_EXE_kubeception-other-agent"),
        content.join("coreos-kvm-agent"),
    )?;
    let made = Command::new("mkfs.erofs")
        .arg(base.join("other-agent.erofs"))
        .arg(&content)
        .output()
        .context("running mkfs.erofs")?;
    ensure!(
        made.status.success(),
        "mkfs.erofs: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    refused(lab, "other-agent", &[], &["agent", "99"], BOOT).map(drop)
}
