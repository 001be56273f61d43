//! Measures what a pod costs, as ratios of things measured in the same run, and shows a table.
//!
//! - [`clones`]: pods whose machines are clones of templates
//! - [`exec`]: a further process in a container
//! - [`goals`]: what they are to cost, and the chart of what they do
//! - [`library`]: what the translation of configurations costs
//! - [`shim`]: calls of a pod's shim
//! - [`stream`]: what a container writes
//! - [`table`]: samples and figures

mod clones;
mod exec;
mod files;
mod goals;
mod library;
mod shim;
mod stream;
mod table;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::bare::Bare;
use kubeception_tests::cri::{COREOS_KVM, Cri};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Process, processes};
use kubeception_tests::node::{Handler, Node, init};
use kubeception_tests::pod::{Container, Pod};

use table::{Samples, Table};

/// The handler whose pods boot.
const BOOTED: &str = "booted";
/// A handler whose pods are clones with a copy of their template's memory.
const COPIED: &str = "copied";
/// A handler whose shims log what their calls take.
const LOGGED: &str = "logged";
const BOOT_BOUND: Duration = Duration::from_secs(240);
const MB: f64 = 1_000_000.0;

/// Measures and prints a table.
#[derive(Debug, Parser)]
#[command(name = "devtool bench")]
struct Arguments {
    /// Writes the figures as one flat JSON object
    #[arg(long)]
    json: Option<PathBuf>,
    /// Draws the figures of clones that a file of `--json` has into this file (SVG), and measures nothing
    #[arg(long, requires = "json")]
    chart: Option<PathBuf>,
    /// How often each boot is measured
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// How often each exec is measured
    #[arg(long, default_value_t = 20)]
    execs: u32,
    /// 1.6, 1.7 or 2.1
    #[arg(long, default_value = "2.1")]
    containerd: Containerd,
    /// How often each translation of a configuration is measured
    #[arg(long, default_value_t = 31)]
    translations: u32,
    /// Measures one part alone
    #[arg(long)]
    only: Option<Part>,
    /// Writes a stream, as a program in a guest
    #[arg(long, hide = true)]
    send: Option<stream::Target>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The translation of configurations
    Library,
    /// Pods that boot
    Boots,
    /// Pods that are clones
    Clones,
    /// Files in clones of either mode
    Files,
    /// A running pod
    Pod,
    /// What the shim adds to an exec
    Exec,
    /// What a container writes
    Streams,
}

impl Arguments {
    fn measure(&self, part: Part) -> bool {
        self.only.is_none_or(|only| only == part)
    }
}

fn main() -> ExitCode {
    init::become_init_if_asked();
    let arguments = Arguments::parse();
    let done = match arguments.send {
        Some(target) => stream::send(target),
        None => measure(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn measure(arguments: &Arguments) -> Result<()> {
    if let (Some(chart), Some(json)) = (&arguments.chart, &arguments.json) {
        return draw(json, chart);
    }
    ensure!(
        arguments.runs > 0 && arguments.execs > 0 && arguments.translations > 0,
        "nothing is measured in 0 runs"
    );
    let mut table = Table::default();
    if arguments.measure(Part::Library) {
        library::measure(&mut table, arguments.translations)?;
    }
    if arguments.only != Some(Part::Library) {
        let booted = Handler::variant(BOOTED).set("templates", "\"off\"");
        let copied = Handler::variant(COPIED).set("clone_mode", "\"copy\"");
        let logged = Handler::variant(LOGGED).set("log_level", "\"debug\"");
        let handlers = [Handler::standard(), booted, copied, logged];
        let node = Node::start("bench", arguments.containerd, &handlers)?;
        let bench = Bench {
            cri: Cri::connect(&node)?,
            node: &node,
            arguments,
        };
        if arguments.measure(Part::Boots) {
            bench.boots(&mut table)?;
        }
        if arguments.measure(Part::Clones) {
            bench.clones(&mut table)?;
        }
        if arguments.measure(Part::Files) {
            bench.files(&mut table)?;
        }
        if arguments.measure(Part::Pod) {
            bench.running_pod(&mut table)?;
        }
        if arguments.measure(Part::Exec) {
            bench.exec_added(&mut table)?;
        }
        if arguments.measure(Part::Streams) {
            bench.streams(&mut table)?;
        }
    }
    table.print();
    if let Some(path) = &arguments.json {
        fs::write(path, format!("{:#}\n", table.json())).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn draw(json: &Path, chart: &Path) -> Result<()> {
    let text = fs::read(json).with_context(|| format!("reading {}", json.display()))?;
    let figures = serde_json::from_slice(&text).with_context(|| format!("reading {}", json.display()))?;
    fs::write(chart, goals::chart(&figures)?).with_context(|| format!("writing {}", chart.display()))
}

struct Bench<'a> {
    cri: Cri,
    node: &'a Node,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    /// A pod's cold start against QEMU by hand, one after the other, so that both see the same machine.
    fn boots(&self, table: &mut Table) -> Result<()> {
        let (mut pods, mut bares) = (Samples::default(), Samples::default());
        let mut bare = None;
        for run in 1..=self.arguments.runs {
            eprintln!("cold start {run} of {}", self.arguments.runs);
            let before = processes(self.node)?;
            let pod = Pod::new(self.node.place(), "cold");
            let begun = Instant::now();
            let id = self.cri.run_pod(&pod, BOOTED)?;
            pods.add(begun.elapsed().as_secs_f64());
            if bare.is_none() {
                let new = new_processes(self.node, &before)?;
                let qemu = new
                    .iter()
                    .find(|process| process.command.contains("qemu-system"))
                    .context("the pod has no QEMU")?;
                bare = Some(Bare::like(qemu.pid)?);
            }
            self.cri.stop_pod(&id)?;
            self.cri.remove_pod(&id)?;
            if let Some(bare) = &bare {
                bares.add(bare.boot(BOOT_BOUND)?.as_secs_f64());
            }
        }
        table.ratio(
            "cold_pod_over_bare",
            "RunPodSandbox to ready, over bare QEMU to the agent",
            &pods,
            &bares,
            1.15,
        );
        table.samples("cold_pod_s", "RunPodSandbox to ready", "s", &pods, None);
        table.samples("cold_bare_s", "bare QEMU to the agent", "s", &bares, None);
        Ok(())
    }

    /// What a pod with one idle container takes of the host, and how long an exec takes.
    fn running_pod(&self, table: &mut Table) -> Result<()> {
        eprintln!("a running pod");
        let before = processes(self.node)?;
        let pod = Pod::new(self.node.place(), "running");
        let id = self.cri.run_pod(&pod, COREOS_KVM)?;
        let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
        let container = self.cri.run(&id, &idle, &pod)?;
        self.execs(table, &container)?;

        let mut memory: BTreeMap<&str, f64> = BTreeMap::new();
        for process in new_processes(self.node, &before)? {
            let part = [
                "qemu-system",
                "containerd-shim-coreos-kvm",
                "virtiofsd",
                "vhost-device-vsock",
            ]
            .into_iter()
            .find(|name| process.command.contains(name));
            *memory.entry(part.unwrap_or("other")).or_default() += pss_mb(&process)?;
        }
        let qemu = memory.remove("qemu-system").context("the pod has no QEMU")?;
        let of = |part: &str| memory.get(part).copied().unwrap_or_default();
        table.figure(
            "host_overhead_mb",
            "host's memory beside QEMU (PSS)",
            "MB",
            memory.values().sum(),
            Some(20.0),
        );
        table.figure(
            "shim_pss_mb",
            "of it the shim",
            "MB",
            of("containerd-shim-coreos-kvm"),
            Some(10.0),
        );
        table.figure("virtiofsd_pss_mb", "of it virtiofsd", "MB", of("virtiofsd"), None);
        table.figure(
            "vsock_pss_mb",
            "of it the vsock device",
            "MB",
            of("vhost-device-vsock"),
            None,
        );
        table.figure("qemu_pss_mb", "QEMU, with the guest's memory (PSS)", "MB", qemu, None);
        table.figure(
            "agent_rss_mb",
            "the agent in the guest, both of its processes (RSS)",
            "MB",
            self.agent_rss_mb(&id)?,
            Some(8.0),
        );
        self.cri.stop_pod(&id)?;
        self.cri.remove_pod(&id)
    }

    fn agent_rss_mb(&self, sandbox: &str) -> Result<f64> {
        // The kernel keeps 15 bytes of a process's name.
        let script = "for p in /proc/[0-9]*; do read name <$p/comm && [ \"$name\" = coreos-kvm-agen ] && grep VmRSS $p/status; done; true";
        let config = Handler::standard().config_path(self.node.place());
        let mut command = self.node.command("coreos-kvm");
        let output = command
            .arg("--config")
            .arg(config)
            .args(["exec", sandbox, "--", "sh", "-c", script])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        // The agent is two processes: itself, and the one that it forks containers' processes from.
        let resident = said
            .lines()
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
        let kilobytes: f64 = resident.sum();
        ensure!(
            kilobytes > 0.0,
            "the guest said {said:?} {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(kilobytes * 1024.0 / MB)
    }
}

fn new_processes(node: &Node, before: &[Process]) -> Result<Vec<Process>> {
    Ok(processes(node)?
        .into_iter()
        .filter(|process| !before.contains(process))
        .collect())
}

/// Proportional set size: shared pages count in part.
fn pss_mb(process: &Process) -> Result<f64> {
    let path = format!("/proc/{}/smaps_rollup", process.pid);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path} ({})", process.command))?;
    let line = text
        .lines()
        .find(|line| line.starts_with("Pss:"))
        .with_context(|| format!("{path} has no Pss"))?;
    let kilobytes: f64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
    Ok(kilobytes * 1024.0 / MB)
}
