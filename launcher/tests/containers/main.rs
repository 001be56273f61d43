//! Containers in a guest, through the agent's client alone: what the shim builds on, without containerd.
//!
//! One machine serves all: booting it takes longer than all that is tried in it. Each trial is a function named after
//! what it shows, and leaves the guest as it found it.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

#[path = "../common/mod.rs"]
mod common;
mod limits;
mod streams;
mod wall;

use std::{
    panic::AssertUnwindSafe,
    path::Path,
    time::{Duration, Instant},
};

use common::{
    Place,
    container::{BOUND, Bed, OUTPUT, Outcome, PIPES, TERMINAL, bound, exec, init, read_until, text},
    run, spec,
};
use coreos_kvm_launcher::{
    agent::{AgentError, ProcessName, Processes},
    machine::Machine,
    state::Origin,
    vm::Vm,
};
use coreos_kvm_proto::{
    GUEST_CONTAINER_ID, SHARED_TAG,
    agent::{ConfigureSandboxRequest, Streams},
};
use futures::FutureExt as _;
use limits::*;
use serde_json::json;
use streams::*;
use wall::*;

const HOSTNAME: &str = "a-pod";
const MEBIBYTE: usize = 1 << 20;

/// Runs each trial, also after one that failed; answers the names of those that failed. COREOS_KVM_TRIAL names a single one.
macro_rules! trials {
    ($bed:expr, $($trial:ident),* $(,)?) => {{
        let mut failed = Vec::new();
        let only = std::env::var("COREOS_KVM_TRIAL").ok();
        $(
            let name = stringify!($trial);
            if only.as_deref().is_none_or(|only| only == name) {
                let before = left_in_the_guest($bed).await;
                let begin = Instant::now();
                let outcome = AssertUnwindSafe($trial($bed)).catch_unwind().await;
                let left = left_in_the_guest($bed).await;
                eprintln!("{name}: {:.1} s", begin.elapsed().as_secs_f64());
                if outcome.is_err() {
                    failed.push(name);
                } else if left != before {
                    eprintln!("{name} leaves something behind:\n{left}");
                    failed.push(name);
                }
            }
        )*
        failed
    }};
}

fn sandbox() -> ConfigureSandboxRequest {
    ConfigureSandboxRequest {
        sandbox_id: "sandbox".to_owned(),
        hostname: HOSTNAME.to_owned(),
        shared_tag: SHARED_TAG.to_owned(),
        shm_size: 32 << 20,
        sysctls: [
            ("kernel.shm_rmid_forced", "1"),
            ("net.ipv4.ip_unprivileged_port_start", "80"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into(),
        ..Default::default()
    }
}

/// On virtiofs and vsock, and on what a clone has that shares its memory.
#[rstest::rstest]
#[case::boot(false)]
#[case::copy_on_write(true)]
#[tokio::test]
async fn containers_in_a_guest_are_what_their_specifications_say(#[case] cloneable: bool) {
    let mut place = Place::new().await;
    place.config.template_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates");
    let machine = Machine {
        cloneable,
        // A guest that does not power off says on its console what it waits for. Templates of other tests are used again.
        kernel_args: if cloneable {
            Vec::new()
        } else {
            vec!["systemd.show_status=auto".to_owned()]
        },
        sandbox: Some(sandbox()),
        ..place.machine("containers")
    };
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let origin = vm.info().record.origin;
    assert_eq!(matches!(origin, Some(Origin::Clone { .. })), cloneable, "{origin:?}");
    let bed = Bed { vm: &vm };
    let failed = trials!(
        bed,
        the_guest_is_the_pods,
        the_guest_writes_only_to_what_is_mounted_for_it,
        output_and_exit_code_arrive,
        the_container_sees_its_own_world,
        the_wall_around_a_container_stands,
        a_further_process_stands_behind_the_same_wall,
        another_user_has_no_capabilities,
        stdin_ends_when_the_host_says_so,
        a_further_process_reads_and_prints,
        a_terminal_is_one,
        a_terminal_belongs_to_who_is_at_it,
        a_terminal_of_a_further_process_is_one,
        signals_reach_one_process_or_all,
        a_slow_reader_holds_back_its_writer_and_nothing_is_lost,
        a_process_killed_for_want_of_memory_is_told,
        a_folder_to_start_in_is_made,
        what_cannot_be_run_is_named,
        a_container_is_measured_limited_and_paused,
        the_clock_is_right_again_after_a_pause,
        a_machine_goes_on_that_was_paused_while_it_was_spoken_to,
        names_and_states_are_checked,
        a_container_that_never_started_can_be_deleted,
        many_containers_at_once,
        the_agent_stays_small,
        a_further_process_starts_fast,
    );
    assert!(failed.is_empty(), "failed: {}", failed.join(", "));
    let begin = Instant::now();
    vm.shutdown(Duration::from_secs(30)).await.unwrap();
    eprintln!("powering off: {:.1} s", begin.elapsed().as_secs_f64());
    let exit = vm.exited().await;
    assert_eq!(
        (exit.reason.as_str(), exit.orderly),
        ("the guest powered off", true),
        "{exit:?}"
    );
    place.assert_nothing_is_left(&machine);
}

/// Cgroups, records, mounts and processes of containers, of which there should be none.
async fn left_in_the_guest(bed: Bed<'_>) -> String {
    let script = "find /run/coreos-kvm/containers -mindepth 2 2>/dev/null; \
        find /sys/fs/cgroup/system.slice/coreos-kvm-agent.service -mindepth 1 -type d ! -name agent; \
        ls -A /run/coreos-kvm/shm; grep -o '/run/coreos-kvm/shared/[^ ]*' /proc/self/mountinfo; grep -E '^Name:.(sleep|youki)' /proc/[0-9]*/status";
    run(bed.agent(), &["sh", "-c", script]).await.0
}

async fn the_guest_is_the_pods(bed: Bed<'_>) {
    assert_eq!(run(bed.agent(), &["uname", "-n"]).await.0.trim(), HOSTNAME);
    let script = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; \
        findmnt -no FSTYPE,OPTIONS /run/coreos-kvm/shm; findmnt -no FSTYPE /run/coreos-kvm/shared; stat -c %a /run/coreos-kvm/shm";
    let told = run(bed.agent(), &["sh", "-c", script]).await.0;
    let share = match bed.vm.info().record.origin {
        Some(Origin::Clone { .. }) => "fuse\n1777\n",
        _ => "virtiofs\n1777\n",
    };
    assert!(
        told.starts_with("1\n80\ntmpfs") && told.contains("size=32768k") && told.ends_with(share),
        "{told}"
    );
}

async fn output_and_exit_code_arrive(bed: Bed<'_>) {
    let (outcome, _) = bed
        .run("speaks", &["sh", "-c", "echo out; echo err >&2; exit 7"], |_| ())
        .await;
    let expected = Outcome {
        stdout: "out\n".to_owned(),
        stderr: "err\n".to_owned(),
        status: 7,
    };
    assert_eq!(outcome, expected);
    let (outcome, exit) = bed.run("killed", &["sh", "-c", "kill -9 $$"], |_| ()).await;
    // Init of a PID namespace is beyond its own signals.
    assert_eq!((outcome.status, exit.oom_killed), (0, false));
}

async fn the_container_sees_its_own_world(bed: Bed<'_>) {
    let script = "hostname; echo $$; ls /; cat /proc/self/cgroup; cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/memory.max; \
        ulimit -n; grep -c . /proc/mounts; touch /dev/shm/mark; touch /made; cat /proc/self/oom_score_adj; ls /dev; tty";
    let (outcome, _) = bed.run("world", &["sh", "-c", script], |_| ()).await;
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    assert_eq!(lines[..2], [HOSTNAME, "1"], "{outcome:?}");
    for expected in ["0::/", "100", "67108864", "4096", "950", "mqueue", "not a tty"] {
        assert!(lines.contains(&expected), "{expected}: {outcome:?}");
    }
    assert_eq!(
        run(bed.agent(), &["rm", "/run/coreos-kvm/shm/mark"]).await.1,
        0,
        "/dev/shm is the pod's"
    );
}

async fn signals_reach_one_process_or_all(bed: Bed<'_>) {
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 1; done";
    bed.create("signals", &["sh", "-c", script], OUTPUT, |_| ())
        .await
        .unwrap();
    let mut stdout = bed.agent().output(init("signals"), false).await.unwrap();
    bed.agent().start_process(init("signals")).await.unwrap();
    read_until(&mut stdout, "ready\n").await;
    let name = exec("signals", "sleeper");
    let process = spec::process(&["sleep", "2147483647"]).to_string().into_bytes();
    bed.agent()
        .create_exec(name, process, Default::default())
        .await
        .unwrap();
    bed.agent().start_process(name).await.unwrap();
    bed.agent().signal_process(name, 15, false).await.unwrap();
    assert_eq!(bound(bed.agent().wait_process(name)).await.unwrap().status, 143);
    let gone = bed.agent().signal_process(name, 15, false).await.unwrap_err();
    assert!(matches!(gone, AgentError::NotFound(_)), "{gone}");
    bed.agent().delete_process(name).await.unwrap();
    bed.agent().signal_process(init("signals"), 15, false).await.unwrap();
    assert_eq!(
        bound(bed.agent().wait_process(init("signals"))).await.unwrap().status,
        5
    );
    assert_eq!(text(stdout).await, "caught\n");
    bed.remove("signals").await;

    // A child that init does not wait for ends with all the others.
    let script = "sleep 2147483647 & echo ready; wait";
    bed.create("all", &["sh", "-c", script], OUTPUT, |_| ()).await.unwrap();
    let mut stdout = bed.agent().output(init("all"), false).await.unwrap();
    bed.agent().start_process(init("all")).await.unwrap();
    read_until(&mut stdout, "ready\n").await;
    assert_eq!(bed.agent().list_pids("all").await.unwrap().len(), 2);
    bed.agent().signal_process(init("all"), 9, true).await.unwrap();
    assert_eq!(bound(bed.agent().wait_process(init("all"))).await.unwrap().status, 137);
    bed.remove("all").await;
}

async fn a_folder_to_start_in_is_made(bed: Bed<'_>) {
    let (outcome, _) = bed
        .run("folder", &["sh", "-c", "pwd; echo $HOME"], |spec| {
            spec["process"]["cwd"] = json!("/new/folder")
        })
        .await;
    assert_eq!(outcome.good(), "/new/folder\n/root\n");
}

async fn what_cannot_be_run_is_named(bed: Bed<'_>) {
    let missing = bed
        .create("missing", &["no-such-program", "-x"], OUTPUT, |_| ())
        .await
        .unwrap_err();
    assert!(missing.to_string().contains("no-such-program"), "{missing}");
    let no_folder = bed
        .create("no-folder", &["true"], OUTPUT, |spec| {
            spec["process"]["cwd"] = json!("/etc/passwd/folder")
        })
        .await
        .unwrap_err();
    assert!(no_folder.to_string().contains("/etc/passwd/folder"), "{no_folder}");
    let rootless = bed
        .create("rootless", &["true"], OUTPUT, |spec| {
            spec["root"]["path"] = json!("/run/coreos-kvm/shared/none")
        })
        .await
        .unwrap_err();
    assert!(
        rootless.to_string().contains("/run/coreos-kvm/shared/none"),
        "{rootless}"
    );
    for id in ["missing", "no-folder", "rootless"] {
        bed.remove_root(id);
    }

    bed.start_idle("asked").await;
    for (args, expected) in [
        (["no-such-program"], "no-such-program"),
        (["/etc/passwd"], "/etc/passwd"),
        (["/no/such/path"], "/no/such/path"),
    ] {
        let error = bed.exec_with("asked", spec::process(&args)).await.unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    let mut process = spec::process(&["true"]);
    process["cwd"] = json!("/no/such/folder");
    let error = bed.exec_with("asked", process).await.unwrap_err();
    assert!(error.to_string().contains("/no/such/folder"), "{error}");
    bed.remove("asked").await;
}

async fn names_and_states_are_checked(bed: Bed<'_>) {
    bed.start_idle("once").await;
    let twice = bed.create("once", &["true"], OUTPUT, |_| ()).await.unwrap_err();
    assert!(matches!(twice, AgentError::AlreadyExists(_)), "{twice}");
    let again = bed.agent().start_process(init("once")).await.unwrap_err();
    assert!(matches!(again, AgentError::FailedPrecondition(_)), "{again}");
    let running = bed.agent().delete_process(init("once")).await.unwrap_err();
    assert!(matches!(running, AgentError::FailedPrecondition(_)), "{running}");
    let unknown = bed.agent().stats("nobody").await.unwrap_err();
    assert!(matches!(unknown, AgentError::NotFound(_)), "{unknown}");
    let unknown = bed.agent().wait_process(exec("once", "nobody")).await.unwrap_err();
    assert!(matches!(unknown, AgentError::NotFound(_)), "{unknown}");
    let garbled = bed
        .agent()
        .create_container("garbled", b"{".to_vec(), OUTPUT, Processes::Own, 0)
        .await
        .unwrap_err();
    assert!(matches!(garbled, AgentError::InvalidArgument(_)), "{garbled}");
    bed.remove("once").await;
    let gone = bed.agent().list_pids("once").await.unwrap_err();
    assert!(matches!(gone, AgentError::NotFound(_)), "{gone}");
}

async fn a_container_that_never_started_can_be_deleted(bed: Bed<'_>) {
    bed.create("unborn", &["true"], OUTPUT, |_| ()).await.unwrap();
    bed.agent().delete_process(init("unborn")).await.unwrap();
    bed.remove_root("unborn");
}

async fn many_containers_at_once(bed: Bed<'_>) {
    let ids: Vec<String> = (0..6).map(|number| format!("one-of-many-{number}")).collect();
    let each = ids.iter().map(|id| async move {
        let (outcome, _) = bed
            .run(id, &["sh", "-c", "hostname; sleep 0.2; echo end"], |_| ())
            .await;
        outcome.good()
    });
    for told in futures::future::join_all(each).await {
        assert_eq!(told, format!("{HOSTNAME}\nend\n"));
    }
}
