//! What a further process in a container costs: by containerd beside runc's, and of it what shim and vsock add to its spawn in the guest.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::RUNC;
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::pod::{Container, Pod};
use nix::sys::stat::Mode;

use super::shim::Shim;
use super::{Bench, LOGGED};
use crate::table::{Samples, Table};

/// Until containerd has written what the shim has logged.
const LOG: Duration = Duration::from_secs(10);

impl Bench<'_> {
    /// Of a running container.
    pub(super) fn execs(&self, table: &mut Table, container: &str) -> Result<()> {
        let (runc, runc_container) = self.sleeping(RUNC, "exec-runc")?;
        let (mut execs, mut others, mut spawns) = (Samples::default(), Samples::default(), Samples::default());
        for _ in 0..self.arguments.execs {
            execs.add(self.exec(container)?);
            others.add(self.exec(&runc_container)?);
        }
        self.cri.stop_pod(&runc)?;
        self.cri.remove_pod(&runc)?;
        // The clock of /proc/uptime has hundredths: many spawns a measurement.
        let count = 40;
        let script = format!(
            "read a x </proc/uptime; i=0; while [ $i -lt {count} ]; do /bin/true; i=$((i + 1)); done; read b x </proc/uptime; echo $a $b"
        );
        for _ in 0..5 {
            let said = self.cri.exec(container, &["sh", "-c", &script])?;
            let times: Vec<f64> = said
                .stdout
                .split_whitespace()
                .filter_map(|time| time.parse().ok())
                .collect();
            let [begun, ended] = times[..] else {
                anyhow::bail!("the guest's clock said {:?}", said.stdout)
            };
            spawns.add((ended - begun) * 1000.0 / f64::from(count));
        }
        let what = "exec of /bin/true by containerd, over ";
        table.ratio(
            "exec_over_spawn",
            &format!("{what}its spawn in the guest"),
            &execs,
            &spawns,
            3.0,
        );
        table.samples("exec_ms", "exec of /bin/true by containerd", "ms", &execs, None);
        table.samples("exec_runc_ms", "the same with runc", "ms", &others, None);
        table.samples("spawn_ms", "spawn of /bin/true in the guest", "ms", &spawns, None);
        Ok(())
    }

    /// Milliseconds of one exec by containerd.
    fn exec(&self, container: &str) -> Result<f64> {
        let begun = Instant::now();
        let said = self.cri.exec(container, &["/bin/true"])?;
        ensure!(said.exit_code == 0, "/bin/true failed");
        Ok(begun.elapsed().as_secs_f64() * 1000.0)
    }

    /// What shim and vsock add: from a call's way into the shim to its answer, without what the guest says that it took.
    pub(super) fn exec_added(&self, table: &mut Table) -> Result<()> {
        eprintln!("what the shim adds to an exec");
        let (id, container) = self.sleeping(LOGGED, "exec-added")?;
        let shim = Shim::connect(self.node, &id)?;
        let fifo = self.node.place().base().join("exec-added");
        nix::unistd::mkfifo(&fifo, Mode::S_IRUSR | Mode::S_IWUSR).context("making a FIFO")?;
        let mut calls = Vec::new();
        for number in 0..self.arguments.execs {
            let exec = format!("added-{number}");
            calls.push((exec.clone(), shim.exec(&container, &exec, &["/bin/true"], &fifo)?));
            shim.finish(&container, &exec)?;
        }
        fs::remove_file(&fifo)?;
        let mut added = Samples::default();
        let in_guest = in_guest(&self.node.log(), &container, &calls)?;
        for (exec, took) in &calls {
            let in_guest = in_guest.get(exec.as_str()).copied().unwrap_or_default();
            added.add(took.saturating_sub(in_guest).as_secs_f64() * 1000.0);
        }
        table.samples(
            "exec_added_ms",
            "an exec's calls of the shim, without the guest's part",
            "ms",
            &added,
            Some(10.0),
        );
        self.cri.stop_pod(&id)?;
        self.cri.remove_pod(&id)
    }

    /// A pod with a container that does nothing.
    pub(super) fn sleeping(&self, handler: &str, name: &str) -> Result<(String, String)> {
        let pod = Pod::new(self.node.place(), name);
        let id = self.cri.run_pod(&pod, handler)?;
        let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
        let container = self.cri.run(&id, &idle, &pod)?;
        Ok((id, container))
    }
}

/// How long the guest took for each of them, by the shim's log.
fn in_guest<'a>(log: &Path, container: &str, calls: &'a [(String, Duration)]) -> Result<BTreeMap<&'a str, Duration>> {
    let begun = Instant::now();
    loop {
        let text = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
        let lines: Vec<_> = text.lines().filter(|line| line.contains(container)).collect();
        let found: BTreeMap<_, _> = calls
            .iter()
            .filter_map(|(exec, _)| {
                let name = format!("exec_id=\"{exec}\" in_guest_us=");
                let (_, rest) = lines.iter().find_map(|line| line.split_once(&name))?;
                let number = rest.split_whitespace().next()?.parse().ok()?;
                Some((exec.as_str(), Duration::from_micros(number)))
            })
            .collect();
        if found.len() == calls.len() {
            return Ok(found);
        }
        ensure!(
            begun.elapsed() < LOG,
            "the log tells of {} of {} processes",
            found.len(),
            calls.len()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
