//! Further processes in running containers.

use std::io::Write as _;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::message;
use kubeception_tests::stream::Session;
use libtest_mimic::Trial;
use sha2::{Digest as _, Sha256};

use crate::lab::{Lab, Together};

const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial("an exec has its own stdout, stderr and exit code", streams),
        lab.trial("an exec's stdin reaches it whole, and ends", stdin),
        lab.trial("an exec on a terminal: input, size, exit code", terminal),
        lab.trial(
            "an exec of a program that is not there is an error that names it",
            missing,
        ),
        lab.trial("ten execs at a time each get their own output", at_a_time),
        lab.trial("an exec that takes too long is ended", too_long),
    ]
}

fn streams(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("exec-streams")?;
    let said = lab.exec(&container.id, &["sh", "-c", "echo out; echo err >&2; exit 42"])?;
    ensure!(
        said.stdout == "out\n" && said.stderr == "err\n" && said.exit_code == 42,
        "{said:?}"
    );
    let said = lab.exec(&container.id, &["true"])?;
    ensure!(
        said.stdout.is_empty() && said.stderr.is_empty() && said.exit_code == 0,
        "{said:?}"
    );
    Ok(())
}

fn stdin(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("exec-stdin")?;
    let input: Vec<u8> = (0..1_500_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut ctr = lab
        .node
        .command("ctr")
        .args([
            "task",
            "exec",
            "--exec-id",
            "stdin",
            &container.id,
            "sh",
            "-c",
            "sha256sum; echo the end",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = ctr.stdin.take().context("ctr has no stdin")?;
    // On its own thread: ctr may end before it has read all.
    let output = std::thread::scope(|scope| {
        scope.spawn(|| stdin.write_all(&input).map(|()| drop(stdin)));
        ctr.wait_with_output()
    })?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said == format!("{:x}  -\nthe end\n", Sha256::digest(&input)),
        "{}: {said:?} {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn terminal(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("exec-terminal")?;
    let url = lab.exec_url(&container.id, &["sh"], true)?;
    let mut session = Session::open(&lab.node, &url)?;
    session.send("echo $((40 + 2))\n")?;
    session.read_until("42", BOUND)?;
    session.resize(123, 45)?;
    // The size arrives on its own way: asked until it is there.
    session.send("until stty size | grep -q '^45 123'; do sleep 0.1; done; echo resi''zed\n")?;
    session.read_until("resized", BOUND)?;
    session.send("tty; exit 9\n")?;
    let code = session.wait(BOUND)?;
    let said = String::from_utf8_lossy(&session.stdout).into_owned();
    ensure!(
        code == 9 && said.contains("/dev/pts/"),
        "it ended with {code} and said {said:?}"
    );
    Ok(())
}

fn missing(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("exec-missing")?;
    let error = lab.exec(&container.id, &["no-such-program"]).err().context("it ran")?;
    let error = message(&error);
    ensure!(error.contains("no-such-program"), "the error is {error:?}");
    // The container is none the worse for it.
    ensure!(
        lab.exec(&container.id, &["true"])?.exit_code == 0,
        "the next exec failed"
    );
    Ok(())
}

fn at_a_time(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("exec-parallel")?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..10)
            .map(|number| {
                let id = &container.id;
                scope.spawn(move || {
                    let script = format!("seq {number}000 {number}999; exit {number}");
                    (number, lab.exec(id, &["sh", "-c", &script]))
                })
            })
            .collect();
        for thread in threads {
            let Ok((number, said)) = thread.join() else {
                anyhow::bail!("a thread panicked")
            };
            let said = said?;
            let (from, to) = (number * 1000, number * 1000 + 999);
            // seq has no leading zeros.
            let expected: String = (from..=to).map(|line| format!("{line}\n")).collect();
            ensure!(
                said.stdout == expected && said.exit_code == number,
                "exec {number} said {said:?}"
            );
        }
        Ok(())
    })
}

fn too_long(lab: &Together<'_>) -> Result<()> {
    let container = lab.idle("exec-long")?;
    let error = lab
        .exec_within(&container.id, &["sleep", "777"], Duration::from_secs(2))
        .err()
        .context("it ended well")?;
    ensure!(
        message(&error).contains("timed out") || message(&error).contains("timeout"),
        "the error is {error:#}"
    );
    let processes = lab.exec(&container.id, &["ps"])?.stdout;
    ensure!(!processes.contains("sleep 777"), "it is still there: {processes}");
    Ok(())
}
