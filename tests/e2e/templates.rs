//! Templates that go wrong, as pods see it: a pod comes up anyway, and says why it is no clone.

use std::fs;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Process, expect_nothing_left, processes};
use kubeception_tests::node::{Handler, Node, Place};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::lab::{Alone, Lab, OwnPod, Start, eventually, expect_start, origin};
use crate::measure::{QEMU, SHIM};

/// Handler of machines whose templates are the trial's own.
const OWN: &str = "own-templates";
const BOUND: Duration = Duration::from_secs(30);
/// Processor time of a template's QEMU, in clock ticks of 10 ms, by which its guest is on its way.
const ON_ITS_WAY: u64 = 200;
/// Whoever waits for a template says so after 5 s.
const WAITS: &str = "the machine waits for its template";

/// For the lab of that name.
pub(crate) fn handler(lab: &str, start: Start) -> Handler {
    start
        .applied(Handler::variant(OWN))
        .set("template_dir", format!("{:?}", folder(&Place::new(lab))))
}

fn folder(place: &Place) -> PathBuf {
    place.base().join("templates")
}

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    if lab.start == Start::Boot {
        return Vec::new();
    }
    vec![
        lab.trial_alone(
            "templates that go wrong: pods come up anyway and say why they are no clones, clones go on, others make them anew",
            go_wrong,
        ),
    ]
}

/// The folder of templates, removed when dropped.
struct Templates<'a> {
    node: &'a Node,
    folder: PathBuf,
    /// How long the node's log was.
    logged: usize,
}

impl<'a> Templates<'a> {
    fn of(node: &'a Node) -> Result<Self> {
        Ok(Self {
            node,
            folder: folder(node.place()),
            logged: usize::try_from(fs::metadata(node.log())?.len())?,
        })
    }

    /// The one template's folder; None where there is none.
    fn template(&self) -> Result<Option<PathBuf>> {
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.extension().is_none() {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// What `coreos-kvm` says, by the handler's configuration.
    fn told(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let output = self
            .node
            .command("coreos-kvm")
            .arg("--config")
            .arg(Handler::variant(OWN).config_path(self.node.place()))
            .args(arguments)
            .output()?;
        serde_json::from_slice(&output.stdout).with_context(|| format!("coreos-kvm {arguments:?}: {output:?}"))
    }

    /// What the node's log got since.
    fn log(&self) -> Result<String> {
        let log = fs::read(self.node.log())?;
        Ok(String::from_utf8_lossy(&log[self.logged..]).into_owned())
    }

    /// Fails unless the pod's machine has booted for that reason, and says so in the log and to who lists machines.
    fn expect_boot(&self, own: &OwnPod<'_>, because: &str) -> Result<()> {
        let origin = origin(self.node.place(), &own.id)?;
        let why = origin["why"].as_str().unwrap_or_default();
        ensure!(
            origin["from"] == "boot" && why.contains(because),
            "its origin is {origin}"
        );
        let machines = self.told(&["ps", "--json"])?;
        let listed = machines.iter().find(|machine| machine["id"] == own.id.as_str());
        ensure!(
            listed.is_some_and(|machine| machine["origin"] == origin),
            "coreos-kvm ps says {machines:?}"
        );
        eventually(BOUND, || {
            let log = self.log()?;
            let told = log.lines().any(|line| line.contains(&own.id) && line.contains(because));
            ensure!(told, "the log does not say {because:?}");
            Ok(())
        })
    }

    /// Fails unless that many clones came up and did not, as `coreos-kvm template ls` tells.
    fn expect_uses(&self, clones: u64, failures: u64) -> Result<()> {
        let templates = self.told(&["template", "ls", "--json"])?;
        let [template] = templates.as_slice() else {
            anyhow::bail!("the templates are {templates:?}");
        };
        let uses = &template["uses"];
        ensure!(
            uses["clones"] == clones && uses["failures"] == failures,
            "the uses are {uses}"
        );
        Ok(())
    }
}

impl Drop for Templates<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("{} cannot be removed: {error}", self.folder.display());
        }
    }
}

/// Waits for the machine of a template to be on its way.
fn wait_for_template_machine(node: &Node) -> Result<()> {
    eventually(BOUND, || {
        let all = processes(node)?;
        let of_template = |process: &&Process| process.command.contains(QEMU) && process.command.contains(" template-");
        let qemu = all.iter().find(of_template).context("no template is being made")?.pid;
        let stat = fs::read_to_string(format!("/proc/{qemu}/stat"))?;
        let fields: Vec<_> = stat
            .rsplit_once(')')
            .context("no name")?
            .1
            .split_ascii_whitespace()
            .collect();
        // proc_pid_stat(5), field 14.
        let ticks: u64 = fields.get(11).context("no time")?.parse()?;
        ensure!(ticks > ON_ITS_WAY, "the template's guest has not come far");
        Ok(())
    })
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    match thread.join() {
        Ok(outcome) => outcome,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn go_wrong(lab: &mut Alone<'_>) -> Result<()> {
    let lab = &*lab;
    let before = lab.snapshot()?;
    let templates = Templates::of(&lab.node)?;
    let clone = maker_killed(lab, &templates)?;
    templates.expect_uses(1, 0)?;
    let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
    let container = lab.cri.run(&clone.id, &idle, &clone.pod)?;
    let template = templates.template()?.context("there is no template")?;
    somebody_elses(lab, &templates, &template)?;
    cut_short(lab, &templates, &template)?;

    // It has what it needs of the template, which is gone.
    let said = lab.cri.exec(&container, &["echo", "well"])?;
    ensure!(said.stdout == "well\n", "an exec in the clone says {said:?}");
    let own = run(lab, "anew")?;
    expect_start(lab.node.place(), &own.id, Start::Clone)?;
    templates.expect_uses(2, 1)?;
    own.remove()?;
    clone.remove()?;
    expect_nothing_left(&lab.node, &before, BOUND)
}

fn run<'a>(lab: &Alone<'a>, name: &str) -> Result<OwnPod<'a>> {
    OwnPod::run(lab.cri, Pod::new(lab.node.place(), name), OWN)
}

/// The shim that makes it dies, and its pod with it; the pod that waits for it makes it, and is answered.
fn maker_killed<'a>(lab: &Alone<'a>, templates: &Templates<'_>) -> Result<OwnPod<'a>> {
    let before = processes(&lab.node)?;
    let heir = std::thread::scope(|scope| {
        let maker = scope.spawn(|| run(lab, "maker"));
        wait_for_template_machine(&lab.node)?;
        let shim = processes(&lab.node)?
            .into_iter()
            .find(|process| process.command.contains(SHIM) && !before.contains(process));
        let shim = shim.context("nobody makes the template")?.pid;
        let heir = scope.spawn(|| run(lab, "heir"));
        eventually(BOUND, || {
            ensure!(templates.log()?.contains(WAITS), "nobody waits for the template");
            Ok(())
        })?;
        kill(shim, Signal::SIGKILL)?;
        ensure!(joined(maker).is_err(), "a pod has come up without its shim");
        joined(heir)
    })?;
    expect_start(lab.node.place(), &heir.id, Start::Clone)?;
    Ok(heir)
}

fn somebody_elses(lab: &Alone<'_>, templates: &Templates<'_>, template: &Path) -> Result<()> {
    const SOMEBODY: u32 = 65534;

    let memory = template.join("memory");
    chown(&memory, Some(SOMEBODY), None)?;
    let own = run(lab, "somebodys")?;
    templates.expect_boot(&own, &format!("is not this user's alone (owner {SOMEBODY}"))?;
    ensure!(memory.exists(), "what is somebody else's is removed");
    own.remove()?;
    Ok(chown(&memory, Some(0), None)?)
}

fn cut_short(lab: &Alone<'_>, templates: &Templates<'_>, template: &Path) -> Result<()> {
    let memory = fs::File::options().write(true).open(template.join("memory"))?;
    memory.set_len(memory.metadata()?.len() / 2)?;
    let own = run(lab, "cut-short")?;
    templates.expect_boot(&own, "is damaged: its memory has")?;
    ensure!(!template.exists(), "the damaged template is kept");
    own.remove()
}
