//! Containers in a guest, through the agent's client alone: what the shim builds on, without containerd.
//!
//! One machine serves all: booting it takes longer than all that is tried in it. Each trial is a function named after
//! what it shows, and leaves the guest as it found it.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

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
    agent::{AgentError, ProcessName},
    vm::Vm,
};
use coreos_kvm_proto::{
    GUEST_CONTAINER_ID, SHARED_TAG,
    agent::{ConfigureSandboxRequest, Streams},
};
use futures::FutureExt as _;
use serde_json::json;

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

#[tokio::test]
async fn containers_in_a_guest_are_what_their_specifications_say() {
    let place = Place::new().await;
    let machine = place.machine("containers");
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let request = ConfigureSandboxRequest {
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
    };
    vm.agent().configure_sandbox(&request).await.unwrap();
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
        a_terminal_of_a_further_process_is_one,
        signals_reach_one_process_or_all,
        a_slow_reader_holds_back_its_writer_and_nothing_is_lost,
        a_process_killed_for_want_of_memory_is_told,
        a_folder_to_start_in_is_made,
        what_cannot_be_run_is_named,
        a_container_is_measured_limited_and_paused,
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

/// Cgroups, records and processes of containers, of which there should be none.
async fn left_in_the_guest(bed: Bed<'_>) -> String {
    let script = "find /run/coreos-kvm/containers -mindepth 2 2>/dev/null; \
        find /sys/fs/cgroup/system.slice/coreos-kvm-agent.service -mindepth 1 -type d ! -name agent; \
        ls -A /run/coreos-kvm/shm; grep -E '^Name:.(sleep|youki)' /proc/[0-9]*/status";
    run(bed.agent(), &["sh", "-c", script]).await.0
}

async fn the_guest_is_the_pods(bed: Bed<'_>) {
    assert_eq!(run(bed.agent(), &["uname", "-n"]).await.0.trim(), HOSTNAME);
    let script = "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start; \
        findmnt -no FSTYPE,OPTIONS /run/coreos-kvm/shm; findmnt -no FSTYPE /run/coreos-kvm/shared; stat -c %a /run/coreos-kvm/shm";
    let told = run(bed.agent(), &["sh", "-c", script]).await.0;
    assert!(
        told.starts_with("1\n80\ntmpfs") && told.contains("size=32768k") && told.ends_with("virtiofs\n1777\n"),
        "{told}"
    );
}

/// Else it could put a link where the host is about to mount something.
async fn the_guest_writes_only_to_what_is_mounted_for_it(bed: Bed<'_>) {
    let root = bed.root("reached");
    let shared = Path::new(&root).ancestors().nth(2).unwrap().display();
    for attempt in [
        format!("ln -s /etc {shared}/later"),
        format!("mkdir {shared}/reached/volumes"),
        format!("mv {shared}/reached {shared}/moved"),
        format!("mount -o remount,rw {shared} && touch {shared}/file"),
    ] {
        let (_, status) = run(bed.agent(), &["sh", "-c", &format!("{attempt} 2>&1")]).await;
        assert_ne!(status, 0, "{attempt} works");
    }
    assert_eq!(run(bed.agent(), &["touch", &format!("{root}/file")]).await.1, 0);
    bed.remove_root("reached");
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

/// What a process in a container says of its own wall.
const WALL: &str = "grep -E '^(SigIgn|Seccomp|NoNewPrivs|CapEff|CapBnd|CapInh|CapAmb):' /proc/self/status; \
    cat /proc/timer_list | wc -c; ls /sys/firmware | wc -l; echo 0 2>/dev/null >/proc/sys/kernel/panic || echo read-only; \
    cat /proc/1/root/proc/self/cgroup; mount -t tmpfs none /tmp 2>/dev/null || echo no mount; ulimit -n";

fn assert_wall(outcome: Outcome) {
    let told = outcome.good();
    let lines: Vec<&str> = told.lines().collect();
    let expected = [
        "SigIgn:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
        "0",
        "0",
        "read-only",
        "0::/",
        "no mount",
        "4096",
    ];
    assert_eq!(lines, expected);
}

async fn the_wall_around_a_container_stands(bed: Bed<'_>) {
    assert_wall(bed.run("wall", &["sh", "-c", WALL], |_| ()).await.0);
    let (outcome, _) = bed
        .run("nnp", &["grep", "NoNewPrivs", "/proc/self/status"], |spec| {
            spec["process"]["noNewPrivileges"] = json!(true);
        })
        .await;
    assert_eq!(outcome.good(), "NoNewPrivs:\t1\n");
    // The filter itself, not its mode alone; and a container that has none.
    let forbid = |spec: &mut serde_json::Value| {
        let rule = json!({ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 });
        spec["linux"]["seccomp"]["syscalls"][0]["names"]
            .as_array_mut()
            .unwrap()
            .retain(|name| name != "mkdir");
        spec["linux"]["seccomp"]["syscalls"].as_array_mut().unwrap().push(rule);
    };
    let (outcome, _) = bed.run("filter", &["mkdir", "/new"], forbid).await;
    assert!(outcome.stderr.contains("Operation not supported"), "{outcome:?}");
    let (outcome, _) = bed
        .run("unconfined", &["grep", "Seccomp:", "/proc/self/status"], |spec| {
            spec["linux"].as_object_mut().unwrap().remove("seccomp");
        })
        .await;
    assert_eq!(outcome.good(), "Seccomp:\t0\n");
    let (outcome, _) = bed
        .run("read-only", &["touch", "/new"], |spec| {
            spec["root"]["readonly"] = json!(true);
        })
        .await;
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
}

async fn a_further_process_stands_behind_the_same_wall(bed: Bed<'_>) {
    bed.start_idle("inner").await;
    assert_wall(bed.exec("inner", &["sh", "-c", WALL]).await);
    let mut process = spec::process(&["grep", "NoNewPrivs", "/proc/self/status"]);
    process["noNewPrivileges"] = json!(true);
    assert_eq!(
        bed.exec_with("inner", process).await.unwrap().good(),
        "NoNewPrivs:\t1\n"
    );
    let same = "for kind in pid mnt cgroup net ipc uts; do readlink /proc/self/ns/$kind; readlink /proc/1/ns/$kind; done | \
        uniq -c | grep -cv '^ *2 '; cat /proc/self/oom_score_adj; id -u; id -G";
    let (told, _) = {
        let outcome = bed
            .exec("inner", &["sh", "-c", &same.replace("readlink", "ls -l")])
            .await;
        (outcome.stdout, outcome.status)
    };
    assert!(told.ends_with("950\n0\n0\n"), "{told}");
    bed.remove("inner").await;
}

async fn another_user_has_no_capabilities(bed: Bed<'_>) {
    let user = json!({ "uid": 1000, "gid": 1001, "additionalGids": [1002, 1003], "umask": 0o27 });
    let script = "id -u; id -g; id -G; umask; grep CapEff /proc/self/status; pwd; echo $HOME";
    let expected = "1000\n1001\n1001 1002 1003\n0027\nCapEff:\t0000000000000000\n/tmp\n/\n";
    let (outcome, _) = bed
        .run("user", &["sh", "-c", script], |spec| {
            spec["process"]["user"] = user.clone();
            spec["process"]["cwd"] = json!("/tmp");
        })
        .await;
    assert_eq!(outcome.good(), expected);
    bed.start_idle("any-user").await;
    let mut process = spec::process(&["sh", "-c", script]);
    process["user"] = user;
    process["cwd"] = json!("/tmp");
    assert_eq!(bed.exec_with("any-user", process).await.unwrap().good(), expected);
    bed.remove("any-user").await;
}

async fn stdin_ends_when_the_host_says_so(bed: Bed<'_>) {
    bed.create("reads", &["sh", "-c", "cat; echo over"], PIPES, |_| ())
        .await
        .unwrap();
    let mut stdin = bed.agent().input(init("reads")).await.unwrap();
    let mut stdout = bed.agent().output(init("reads"), false).await.unwrap();
    // Before the start, too.
    stdin.write(b"one\n").await.unwrap();
    bed.agent().start_process(init("reads")).await.unwrap();
    assert_eq!(read_until(&mut stdout, "one\n").await, "one\n");
    stdin.write(b"two\n").await.unwrap();
    assert_eq!(read_until(&mut stdout, "two\n").await, "two\n");
    stdin.finish().await.unwrap();
    assert_eq!(text(stdout).await, "over\n");
    assert_eq!(bound(bed.agent().wait_process(init("reads"))).await.unwrap().status, 0);
    bed.remove("reads").await;
}

async fn a_further_process_reads_and_prints(bed: Bed<'_>) {
    bed.start_idle("host").await;
    let outcome = bed.exec("host", &["sh", "-c", "echo out; echo err >&2; exit 9"]).await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str(), outcome.status),
        ("out\n", "err\n", 9)
    );
    assert_eq!(bed.exec("host", &["sh", "-c", "kill -11 $$"]).await.status, 139);

    let name = exec("host", "cat");
    let process = spec::process(&["tr", "a-z", "A-Z"]).to_string().into_bytes();
    bed.agent().create_exec(name, process, PIPES).await.unwrap();
    let mut stdin = bed.agent().input(name).await.unwrap();
    let stdout = bed.agent().output(name, false).await.unwrap();
    bed.agent().start_process(name).await.unwrap();
    let typed = "typed\n".repeat(50_000);
    let ((), read) = tokio::join!(
        async {
            stdin.write(typed.as_bytes()).await.unwrap();
            stdin.finish().await.unwrap();
        },
        text(stdout)
    );
    assert!(read == typed.to_uppercase(), "{} of {} bytes", read.len(), typed.len());
    bound(bed.agent().wait_process(name)).await.unwrap();
    bed.agent().delete_process(name).await.unwrap();
    bed.remove("host").await;
}

/// A shell at a terminal, which says of itself what only a terminal can.
async fn try_terminal(bed: Bed<'_>, name: ProcessName<'_>) {
    let mut stdin = bed.agent().input(name).await.unwrap();
    let mut stdout = bed.agent().output(name, false).await.unwrap();
    bed.agent().start_process(name).await.unwrap();
    bed.agent().resize_pty(name, 132, 43).await.unwrap();
    stdin.write(b"stty size; tty; echo err >&2\n").await.unwrap();
    let told = read_until(&mut stdout, "\nerr\r\n").await;
    assert!(told.contains("43 132\r\n") && told.contains("/dev/"), "{told:?}");
    // Control-C ends what runs in the foreground, and the shell tells how.
    stdin.write(b"sleep 2147483647\n").await.unwrap();
    read_until(&mut stdout, "sleep 2147483647\r\n").await;
    let interrupted = async {
        loop {
            stdin.write(b"\x03").await.unwrap();
            stdin.write(b"echo code-$?\n").await.unwrap();
            if read_until(&mut stdout, "code-1").await.contains("code-130") {
                break;
            }
        }
    };
    bound(interrupted).await;
    stdin.write(b"exit 4\n").await.unwrap();
    assert_eq!(bound(bed.agent().wait_process(name)).await.unwrap().status, 4);
    text(stdout).await;
}

async fn a_terminal_is_one(bed: Bed<'_>) {
    bed.create("terminal", &["sh"], TERMINAL, |spec| {
        spec["process"]["terminal"] = json!(true)
    })
    .await
    .unwrap();
    try_terminal(bed, init("terminal")).await;
    bed.remove("terminal").await;
}

async fn a_terminal_of_a_further_process_is_one(bed: Bed<'_>) {
    bed.start_idle("desk").await;
    let name = exec("desk", "terminal");
    let mut process = spec::process(&["sh"]);
    process["terminal"] = json!(true);
    bed.agent()
        .create_exec(name, process.to_string().into_bytes(), TERMINAL)
        .await
        .unwrap();
    try_terminal(bed, name).await;
    bed.agent().delete_process(name).await.unwrap();
    bed.remove("desk").await;
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

async fn a_slow_reader_holds_back_its_writer_and_nothing_is_lost(bed: Bed<'_>) {
    let script = "seq 1 320000; touch /done";
    bed.create("writes", &["sh", "-c", script], OUTPUT, |_| ())
        .await
        .unwrap();
    let mut stdout = bed.agent().output(init("writes"), false).await.unwrap();
    bed.agent().start_process(init("writes")).await.unwrap();
    let mut all = bound(stdout.next()).await.unwrap().unwrap().to_vec();
    // As long as nobody reads, nothing but what buffers hold is written, and other calls are answered.
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(2) {
        bed.agent().list_pids("writes").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(
        !bed.host_path("writes", "done").exists(),
        "the writer was not held back"
    );
    while let Some(bytes) = bound(stdout.next()).await.unwrap() {
        all.extend_from_slice(bytes);
    }
    let expected: String = (1..=320_000).map(|number| format!("{number}\n")).collect();
    assert!(
        all.len() > 2_000_000 && all == expected.as_bytes(),
        "{} bytes",
        all.len()
    );
    assert_eq!(bound(bed.agent().wait_process(init("writes"))).await.unwrap().status, 0);
    bed.remove("writes").await;
}

async fn a_process_killed_for_want_of_memory_is_told(bed: Bed<'_>) {
    let limit = |spec: &mut serde_json::Value| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 16 * MEBIBYTE, "swap": 16 * MEBIBYTE });
    };
    let greedy = ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"];
    let (outcome, exit) = bed.run("greedy", &greedy, limit).await;
    assert_eq!((outcome.status, exit.oom_killed), (137, true), "{outcome:?}");
    let (_, exit) = bed.run("modest", &["true"], limit).await;
    assert!(!exit.oom_killed);
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

async fn a_container_is_measured_limited_and_paused(bed: Bed<'_>) {
    let script = "while :; do echo tick; sleep 0.05; done";
    bed.create("measured", &["sh", "-c", script], OUTPUT, |_| ())
        .await
        .unwrap();
    let mut stdout = bed.agent().output(init("measured"), false).await.unwrap();
    let pid = bed.agent().start_process(init("measured")).await.unwrap();
    read_until(&mut stdout, "tick").await;
    assert!(bed.agent().list_pids("measured").await.unwrap().contains(&pid));

    let stats = bed.agent().stats("measured").await.unwrap();
    assert!(
        stats.cpu_usage_us > 0 && stats.memory_usage > 0 && stats.pids_current >= 1,
        "{stats:?}"
    );
    assert_eq!((stats.memory_limit, stats.pids_limit), (64 << 20, 100));
    assert!(stats.memory_stat.contains_key("inactive_file") && stats.memory_events.contains_key("oom_kill"));

    let resources =
        json!({ "memory": { "limit": 48 << 20 }, "cpu": { "quota": 50_000, "period": 100_000, "shares": 512 } });
    bed.agent()
        .update_resources("measured", resources.to_string().into_bytes())
        .await
        .unwrap();
    let stats = bed.agent().stats("measured").await.unwrap();
    assert_eq!((stats.memory_limit, stats.pids_limit), (48 << 20, 100));

    bed.agent().pause_container("measured").await.unwrap();
    let quiet = async { while bound(stdout.next()).await.unwrap().is_some() {} };
    // What was on its way comes, then nothing more.
    let frozen = tokio::time::timeout(Duration::from_secs(2), quiet).await;
    assert!(frozen.is_err());
    let before = bed.agent().stats("measured").await.unwrap().cpu_usage_us;
    assert_eq!(
        bed.agent().stats("measured").await.unwrap().cpu_usage_us,
        before,
        "it is halted"
    );
    bed.agent().resume_container("measured").await.unwrap();
    read_until(&mut stdout, "tick").await;
    // A paused container can be ended, too.
    bed.agent().pause_container("measured").await.unwrap();
    bed.remove("measured").await;
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
        .create_container("garbled", b"{".to_vec(), OUTPUT)
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

async fn the_agent_stays_small(bed: Bed<'_>) {
    let script = "for pid in $(pidof coreos-kvm-agent); do \
        awk '/^(VmRSS|VmHWM|RssAnon|RssFile):/ { printf \"%s %s \", $1, $2 }' /proc/$pid/status; done";
    let told = run(bed.agent(), &["sh", "-c", script]).await.0;
    eprintln!("  the agent's memory in KiB: {told}");
    let resident: u64 = told
        .split("VmRSS: ")
        .skip(1)
        .map(|rest| rest.split(' ').next().unwrap().parse::<u64>().unwrap())
        .sum();
    assert!((1..=8 * 1024).contains(&resident), "the agent takes {resident} KiB");
}

/// Seconds since the guest's boot, twice, with 40 runs of a program between: fork, exec, wait by an ordinary shell.
const SPAWNS: &str = "read up rest </proc/uptime; n=0; while [ $n -lt 40 ]; do /bin/true; n=$((n+1)); done; \
    read now rest </proc/uptime; echo $up $now";

fn ms_each(told: &str) -> f64 {
    let seconds: Vec<f64> = told.split_whitespace().map(|word| word.parse().unwrap()).collect();
    (seconds[1] - seconds[0]) / 40.0 * 1000.0
}

/// Milliseconds: the median of 20 tries.
async fn median<F: Future<Output = ()>>(mut attempt: impl FnMut() -> F) -> f64 {
    let mut times = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        attempt().await;
        times.push(begin.elapsed());
    }
    times.sort();
    times[10].as_secs_f64() * 1000.0
}

/// Not a gate: the figures are for people and depend on the machine's load. What is checked is that nothing waits.
async fn a_further_process_starts_fast(bed: Bed<'_>) {
    let run_true = async |container_id| {
        let name = exec(container_id, "true");
        let process = spec::process(&["/bin/true"]).to_string().into_bytes();
        if container_id == GUEST_CONTAINER_ID {
            bed.agent()
                .create_guest_exec("true", process, Default::default())
                .await
                .unwrap();
        } else {
            bed.agent()
                .create_exec(name, process, Default::default())
                .await
                .unwrap();
        }
        bed.agent().start_process(name).await.unwrap();
        assert_eq!(bound(bed.agent().wait_process(name)).await.unwrap().status, 0);
        bed.agent().delete_process(name).await.unwrap();
    };
    bed.start_idle("fast").await;
    bed.create("bare", &["sleep", "2147483647"], Streams::default(), |spec| {
        spec["linux"].as_object_mut().unwrap().remove("seccomp");
    })
    .await
    .unwrap();
    bed.agent().start_process(init("bare")).await.unwrap();
    let call = median(|| async { drop(bed.agent().list_pids("fast").await.unwrap()) }).await;
    let in_container = median(|| run_true("fast")).await;
    let in_bare = median(|| run_true("bare")).await;
    let in_guest = median(|| run_true(GUEST_CONTAINER_ID)).await;
    let spawned = ms_each(&bed.exec("fast", &["sh", "-c", SPAWNS]).await.good());
    let spawned_in_guest = ms_each(&run(bed.agent(), &["sh", "-c", SPAWNS]).await.0);
    eprintln!(
        "  ms for /bin/true: exec {in_container:.1}, without seccomp {in_bare:.1}, in the guest {in_guest:.1}; spawned by a shell \
         in the container {spawned:.1}, in the guest {spawned_in_guest:.1}; one call {call:.1}; ratio {:.2}",
        in_container / spawned,
    );
    assert!(Duration::from_secs_f64(in_container / 1000.0) < BOUND / 10);
    bed.remove("fast").await;
    bed.remove("bare").await;
}
