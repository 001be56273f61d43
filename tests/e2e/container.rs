//! Containers: what they are given, what they say, how they end.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::{message, read_log, wait_for_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::pod::Container;
use libtest_mimic::Trial;

use crate::lab::{Lab, Together};

const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial("the log has what a container wrote to stdout and stderr", log),
        lab.trial("a user other than root writes to its streams by their names", streams),
        lab.trial("a log of 2 MB is complete and in order", long_log),
        lab.trial("a container's exit code is its process's", exit_code),
        lab.trial(
            "a process ended by a signal has the exit code 128 and the signal's number",
            exit_by_signal,
        ),
        lab.trial("a container is stopped by SIGTERM", stopped_by_sigterm),
        lab.trial("one that ignores SIGTERM is stopped by SIGKILL", stopped_by_sigkill),
        lab.trial("a removed container is gone, with its processes", removed),
        lab.trial("a command that is not there is an error that names it", command_missing),
        lab.trial("environment, hostname and resolv.conf are the pod's", surroundings),
        lab.trial("a container writes to its root file system and to a host path", writes),
        lab.trial("a container over its memory limit is killed and says so", out_of_memory),
    ]
}

fn log(lab: &Together<'_>) -> Result<()> {
    let container = lab.running(&Container::script(
        "log",
        "echo to stdout; echo to stderr >&2; printf unended",
    ))?;
    lab.wait_exited(&container.id, BOUND)?;
    wait_for_log(&container.log, BOUND, |line| {
        line.stream == "stdout" && line.text == "to stdout"
    })?;
    wait_for_log(&container.log, BOUND, |line| {
        line.stream == "stderr" && line.text == "to stderr"
    })?;
    wait_for_log(&container.log, BOUND, |line| line.text == "unended")?;
    Ok(())
}

fn streams(lab: &Together<'_>) -> Result<()> {
    let script = "echo out >/dev/stdout; echo err >/dev/stderr; sleep 2147483647";
    let container = lab.running(&Container::script("streams", script).user(1000))?;
    for (stream, text) in [("stdout", "out"), ("stderr", "err")] {
        wait_for_log(&container.log, BOUND, |line| line.stream == stream && line.text == text)?;
    }
    let said = lab.exec(
        &container.id,
        &["sh", "-c", "echo out >/dev/stdout; echo err >/dev/stderr"],
    )?;
    ensure!(said.stdout == "out\n" && said.stderr == "err\n", "{said:?}");
    Ok(())
}

fn long_log(lab: &Together<'_>) -> Result<()> {
    let lines = 40_000;
    let filler = "x".repeat(44);
    let script = format!("awk 'BEGIN {{ for (i = 1; i <= {lines}; i++) printf \"%06d {filler}\\n\", i }}'");
    let container = lab.running(&Container::script("long-log", &script))?;
    lab.wait_exited(&container.id, Duration::from_secs(60))?;
    wait_for_log(&container.log, BOUND, |line| {
        line.text.starts_with(&format!("{lines:06}"))
    })?;
    let log = read_log(&container.log)?;
    ensure!(log.len() == lines, "{} lines instead of {lines}", log.len());
    for (number, line) in (1..).zip(&log) {
        ensure!(
            line.text == format!("{number:06} {filler}"),
            "line {number} is {:?}",
            line.text
        );
    }
    Ok(())
}

fn exit_code(lab: &Together<'_>) -> Result<()> {
    for code in [0, 1, 42, 255] {
        let container = lab.running(&Container::script(&format!("exit-{code}"), &format!("exit {code}")))?;
        let status = lab.wait_exited(&container.id, BOUND)?;
        ensure!(status.exit_code == code, "{} instead of {code}", status.exit_code);
        let reason = if code == 0 { "Completed" } else { "Error" };
        ensure!(status.reason == reason, "the reason of {code} is {:?}", status.reason);
    }
    Ok(())
}

fn exit_by_signal(lab: &Together<'_>) -> Result<()> {
    // Of the container's first process a signal without handler is ignored, unless it comes from outside.
    let container = lab.running(&Container::script("signal", "sh -c 'kill -USR1 $$'; exit $?"))?;
    let status = lab.wait_exited(&container.id, BOUND)?;
    ensure!(status.exit_code == 128 + 10, "exit code {}", status.exit_code);
    Ok(())
}

fn stopped_by_sigterm(lab: &Together<'_>) -> Result<()> {
    let script = "trap 'echo got it; exit 7' TERM; echo waiting; while :; do sleep 0.1; done";
    let container = lab.running(&Container::script("polite", script))?;
    wait_for_log(&container.log, BOUND, |line| line.text == "waiting")?;
    lab.stop(&container.id, Duration::from_secs(20))?;
    let status = lab.status(&container.id)?;
    ensure!(status.exit_code == 7, "exit code {}", status.exit_code);
    wait_for_log(&container.log, BOUND, |line| line.text == "got it")?;
    Ok(())
}

fn stopped_by_sigkill(lab: &Together<'_>) -> Result<()> {
    let script = "trap '' TERM; echo waiting; while :; do sleep 0.1; done";
    let container = lab.running(&Container::script("stubborn", script))?;
    wait_for_log(&container.log, BOUND, |line| line.text == "waiting")?;
    let begun = Instant::now();
    lab.stop(&container.id, Duration::from_secs(2))?;
    ensure!(
        begun.elapsed() >= Duration::from_secs(2),
        "it was killed before its time"
    );
    let status = lab.status(&container.id)?;
    ensure!(status.exit_code == 137, "exit code {}", status.exit_code);
    Ok(())
}

fn removed(lab: &Together<'_>) -> Result<()> {
    let shared = lab.shared()?;
    let mark = "86399";
    let container = lab.running(&Container::script("removed", &format!("sleep {mark} & sleep {mark}")))?;
    let in_guest = || lab.in_guest(&shared.id, &["sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"]);
    ensure!(in_guest()?.contains(mark), "the processes are not in the guest");
    lab.stop(&container.id, Duration::ZERO)?;
    lab.remove(&container.id)?;
    ensure!(!lab.containers()?.contains(&container.id), "it is still listed");
    let processes = in_guest()?;
    ensure!(
        !processes.contains(mark),
        "its processes are still in the guest: {processes}"
    );
    Ok(())
}

fn command_missing(lab: &Together<'_>) -> Result<()> {
    let shared = lab.shared()?;
    let container = Container::new("missing", BUSYBOX).command(&["no-such-program"]);
    let id = lab.create(&shared.id, &container, &shared.pod)?;
    let outcome = lab.start(&id);
    lab.remove(&id)?;
    let error = message(&outcome.err().context("it started")?);
    ensure!(error.contains("no-such-program"), "the error is {error:?}");
    Ok(())
}

fn surroundings(lab: &Together<'_>) -> Result<()> {
    let script = "echo $COLOUR; hostname; cat /etc/resolv.conf; pwd; id -u";
    let mut container = Container::script("surroundings", script).env("COLOUR", "blue");
    container.config.working_dir = "/www".to_owned();
    let container = lab.running(&container)?;
    lab.wait_exited(&container.id, BOUND)?;
    for expected in ["blue", "shared", "nameserver 10.88.0.1", "/www", "0"] {
        wait_for_log(&container.log, Duration::from_secs(5), |line| line.text == expected)?;
    }
    Ok(())
}

fn writes(lab: &Together<'_>) -> Result<()> {
    let folder = lab.node.place().base().join("host-path");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("from-host"), "hello guest\n")?;
    let script = "cat /volume/from-host && echo hello host > /volume/from-guest && echo x > /new && cat /new";
    let container = lab.running(&Container::script("writes", script).host_path(&folder, "/volume", false))?;
    let status = lab.wait_exited(&container.id, BOUND)?;
    ensure!(
        status.exit_code == 0,
        "exit code {}; log: {:?}",
        status.exit_code,
        read_log(&container.log)
    );
    let written = fs::read_to_string(folder.join("from-guest")).context("what the container wrote")?;
    ensure!(written == "hello host\n", "the container wrote {written:?}");
    wait_for_log(&container.log, BOUND, |line| line.text == "hello guest")?;

    let readonly =
        lab.running(&Container::script("reads", "echo y > /volume/more").host_path(&folder, "/volume", true))?;
    let status = lab.wait_exited(&readonly.id, BOUND)?;
    ensure!(
        status.exit_code != 0 && !folder.join("more").exists(),
        "a read-only volume was written to"
    );
    Ok(())
}

fn out_of_memory(lab: &Together<'_>) -> Result<()> {
    let script = "dd if=/dev/zero of=/dev/null bs=64M count=1";
    let container = lab.running(&Container::script("hungry", script).memory_limit(16 << 20))?;
    let status = lab.wait_exited(&container.id, BOUND)?;
    ensure!(
        status.exit_code == 137 && status.reason == "OOMKilled",
        "exit code {}, reason {:?}",
        status.exit_code,
        status.reason
    );
    Ok(())
}
