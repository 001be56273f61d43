//! One run of critest against one runtime handler.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kubeception_tests::artifacts;
use kubeception_tests::node::{ENDPOINT, Node, Sandboxer};
use serde::Deserialize;

/// Cannot pass without the one image whose digest is a constant of critest's source; for all runtimes alike.
pub(crate) const BY_DIGEST: &str = "public image with digest should be pulled and removed";

/// At pods on the node's network containerd 2.0 to 2.2 ends where their sandboxes are the shim's, before it asks the shim.
const ON_THE_NODE: &str = "HostNetwork is true|portforward in host network";

/// The socket for plugins that change containers, below /run: what a containerd has by default, if it knows such plugins.
const NRI: &str = "nri/nri.sock";

/// Of a whole run, more than twice what it takes.
const BOUND: Duration = Duration::from_secs(20 * 60);
/// How often a line tells how far it is.
const PROGRESS: Duration = Duration::from_secs(30);

/// What became of a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    /// With critest's words, as are the others.
    Failed(String),
    Skipped(String),
}

/// The outcomes by the specs' full names.
pub(crate) type Outcomes = BTreeMap<String, Outcome>;

/// Runs the specs whose names match `focus`, all of them where there is none. What critest says is kept in a log.
pub(crate) fn run(node: &Node, handler: &str, sandboxer: Sandboxer, focus: Option<&str>) -> Result<Outcomes> {
    let name = format!("critest-{}-{handler}", node.version());
    let report = node.place().base().join(format!("{name}.json"));
    let log_path = artifacts::logs().join(format!("{name}.log"));
    let temporary = node.place().base().join("tmp");
    fs::create_dir_all(&temporary).context("making a folder for critest")?;

    let mut command = node.command(artifacts::critest()?);
    command
        .args(["--runtime-endpoint", ENDPOINT, "--runtime-handler", handler])
        .args(["--ginkgo.no-color", "--ginkgo.v"])
        // The same order for each runtime.
        .arg("--ginkgo.seed=1")
        .arg(format!("--ginkgo.skip={BY_DIGEST}"))
        .arg(format!("--ginkgo.json-report={}", report.display()))
        .args((sandboxer == Sandboxer::Shim).then(|| format!("--ginkgo.skip={ON_THE_NODE}")))
        .args(focus.map(|focus| format!("--ginkgo.focus={focus}")))
        .args(
            node.place()
                .run()
                .join(NRI)
                .exists()
                .then(|| format!("-nri-socket=/run/{NRI}")),
        )
        .env("TMPDIR", &temporary)
        .stdout(Stdio::piped())
        .stderr(File::create(log_path.with_extension("stderr.log"))?);
    let mut critest = command.spawn().context("starting critest")?;
    let outcome = follow(&mut critest, handler, &log_path);
    if outcome.is_err() {
        // Its processes end with the node.
        let _ = critest.kill();
    }
    let _ = critest.wait();
    outcome?;
    read(&report).with_context(|| format!("critest left no report; see {}", log_path.display()))
}

/// Shows how far it is, until it ends.
fn follow(critest: &mut Child, handler: &str, log_path: &Path) -> Result<()> {
    let stdout = critest.stdout.take().context("critest has no stdout")?;
    let mut log = File::create(log_path).with_context(|| format!("making {}", log_path.display()))?;
    let (lines, received) = mpsc::channel();
    // It ends with the pipe.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });

    let begun = Instant::now();
    let mut next = begun + PROGRESS;
    let (mut total, mut done, mut failed) = (String::from("?"), 0, 0);
    loop {
        match received.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => {
                writeln!(log, "{line}").context("writing critest's log")?;
                // "Will run 112 of 142 specs", and one line for each that is done: "• [1.234 seconds]", "• [FAILED] [1.2 seconds]".
                if let Some(counts) = line.strip_prefix("Will run ") {
                    counts.split(' ').next().unwrap_or_default().clone_into(&mut total);
                }
                done += u32::from(line.starts_with("• "));
                failed += u32::from(line.starts_with("• [FAILED]"));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        let now = Instant::now();
        if now >= next {
            next = now + PROGRESS;
            let seconds = begun.elapsed().as_secs();
            println!("[{seconds:>4}s] {handler}: {done} of {total} specs done, {failed} of them failed");
        }
        ensure!(
            begun.elapsed() < BOUND,
            "critest did not end within {} minutes; see {}",
            BOUND.as_secs() / 60,
            log_path.display()
        );
    }
}

/// Ginkgo's report, as far as it is read here (`types.Report`).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    #[serde(default)]
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failure {
    #[serde(default)]
    message: String,
}

fn read(report: &Path) -> Result<Outcomes> {
    let text = fs::read(report)?;
    let reports: Vec<Report> = serde_json::from_slice(&text).context("reading the report")?;
    let mut outcomes = Outcomes::new();
    for spec in reports.into_iter().filter_map(|report| report.spec_reports).flatten() {
        let mut words = spec.container_hierarchy_texts.unwrap_or_default();
        words.push(spec.leaf_node_text);
        // The suite's own mark before each group.
        let name = words.join(" ").replace("[k8s.io] ", "");
        let reason = spec.failure.message;
        let outcome = match (spec.leaf_node_type.as_str(), spec.state.as_str()) {
            ("It", "passed") => Outcome::Passed,
            // Without a reason: left out by us, or a benchmark.
            ("It", "skipped" | "pending") if reason.is_empty() => continue,
            ("It", "skipped" | "pending") => Outcome::Skipped(reason),
            ("It", _) => Outcome::Failed(reason),
            (_, "passed" | "skipped") => continue,
            // What goes before or after all of them.
            (node, _) => bail!("critest's {node} failed: {reason}"),
        };
        outcomes.insert(name, outcome);
    }
    ensure!(!outcomes.is_empty(), "no spec was run");
    Ok(outcomes)
}
