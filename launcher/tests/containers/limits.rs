//! What containers and the agent use, may use, and how fast that goes.

use std::time::UNIX_EPOCH;

use super::*;

pub(crate) async fn a_process_killed_for_want_of_memory_is_told(bed: Bed<'_>) {
    let limit = |spec: &mut serde_json::Value| {
        spec["linux"]["resources"]["memory"] = json!({ "limit": 16 * MEBIBYTE, "swap": 16 * MEBIBYTE });
    };
    let greedy = ["dd", "if=/dev/zero", "of=/dev/null", "bs=64M", "count=1"];
    let (outcome, exit) = bed.run("greedy", &greedy, limit).await;
    assert_eq!((outcome.status, exit.oom_killed), (137, true), "{outcome:?}");
    let (_, exit) = bed.run("modest", &["true"], limit).await;
    assert!(!exit.oom_killed);
}

pub(crate) async fn the_clock_is_right_again_after_a_pause(bed: Bed<'_>) {
    let now = || i64::try_from(UNIX_EPOCH.elapsed().unwrap().as_nanos()).unwrap();
    let slack = 50_000_000;
    bed.vm.pause().await.unwrap();
    // What its clock is then behind by.
    tokio::time::sleep(Duration::from_secs(2)).await;
    bed.vm.resume().await.unwrap();
    let right = async {
        loop {
            let before = now();
            let guest = bed.agent().adjust_clock(0, false).await.unwrap();
            if (before - slack..now() + slack).contains(&guest) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    bound(right).await;
}

pub(crate) async fn a_machine_goes_on_that_was_paused_while_it_was_spoken_to(bed: Bed<'_>) {
    for round in 0..20 {
        let call = bed.agent().adjust_clock(0, false);
        let halted = async {
            // At another moment of the call each time, which takes some milliseconds.
            tokio::time::sleep(Duration::from_micros(150 * round)).await;
            bed.vm.pause().await.unwrap();
            // A connection that begins meanwhile and is given up.
            let dialed = tokio::time::timeout(Duration::from_millis(20), bed.agent().stream()).await;
            drop(dialed);
            bed.vm.resume().await.unwrap();
        };
        let (called, ()) = tokio::join!(call, halted);
        called.unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
}

pub(crate) async fn a_container_is_measured_limited_and_paused(bed: Bed<'_>) {
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

pub(crate) async fn the_agent_stays_small(bed: Bed<'_>) {
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
pub(crate) async fn a_further_process_starts_fast(bed: Bed<'_>) {
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
