//! What clones cost: against the same pod on runc, against one that boots, many at once, and of the host's memory.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::bare::BareClone;
use kubeception_tests::cri::{COREOS_KVM, Cri, RUNC};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::leftovers::{Process, processes};
use kubeception_tests::pod::{Container, Pod};

use super::{BOOTED, Bench, COPIED, MB, new_processes};
use crate::goals::bar;
use crate::table::{Samples, Table};

/// Clones whose memory is measured, and those that are asked for at once.
const IDLE: u32 = 20;
const AT_ONCE: u32 = 10;
/// A pod's first output is a matter of a second, and of ten where it boots.
const OUTPUT: Duration = Duration::from_secs(240);
/// Until a new pod is idle: what waits in the guest has been woken after 2 s.
const SETTLED: Duration = Duration::from_secs(15);

/// How long the steps of pods took, in seconds.
#[derive(Default)]
struct Steps {
    ready: Samples,
    output: Samples,
    removed: Samples,
}

impl Bench<'_> {
    pub(super) fn clones(&self, table: &mut Table) -> Result<()> {
        // The first makes its template.
        self.one_pod(COREOS_KVM, "template", &mut Steps::default())?;
        self.one_pod(COPIED, "copied", &mut Steps::default())?;
        let bare = self.bare_clone()?;
        let mut bares = Samples::default();
        let [mut clones, mut copies, mut boots, mut runc] = [(); 4].map(|()| Steps::default());
        for run in 1..=self.arguments.runs {
            eprintln!("clone, boot and runc {run} of {}", self.arguments.runs);
            self.one_pod(COREOS_KVM, "clone", &mut clones)?;
            bares.add(bare.start(OUTPUT)?.as_secs_f64());
            self.one_pod(COPIED, "copied", &mut copies)?;
            self.one_pod(BOOTED, "boot", &mut boots)?;
            self.one_pod(RUNC, "runc", &mut runc)?;
        }
        table.ratio(
            "clone_pod_over_bare",
            "clone: RunPodSandbox to ready, over bare QEMU's clone to the agent",
            &clones.ready,
            &bares,
            bar("clone_pod_over_bare").unwrap_or_default(),
        );
        table.samples("clone_bare_s", "bare QEMU's clone to the agent", "s", &bares, None);
        let what = "clone: RunPodSandbox, create, start to first output, over ";
        table.ratio(
            "clone_over_runc",
            &format!("{what}runc"),
            &clones.output,
            &runc.output,
            bar("clone_over_runc").unwrap_or_default(),
        );
        table.ratio(
            "clone_over_cold",
            &format!("{what}a boot"),
            &clones.output,
            &boots.output,
            bar("clone_over_cold").unwrap_or_default(),
        );
        table.samples("clone_pod_s", "clone: RunPodSandbox to ready", "s", &clones.ready, None);
        table.samples("clone_output_s", "clone: to first output", "s", &clones.output, None);
        let copy = "clone by copy: ";
        table.samples(
            "copy_pod_s",
            &format!("{copy}RunPodSandbox to ready"),
            "s",
            &copies.ready,
            None,
        );
        table.samples(
            "copy_output_s",
            &format!("{copy}to first output"),
            "s",
            &copies.output,
            None,
        );
        table.samples("cold_output_s", "boot: to first output", "s", &boots.output, None);
        table.samples("runc_output_s", "runc: to first output", "s", &runc.output, None);
        let mut removed = Samples::default();
        clones.removed.each(|seconds| removed.add(seconds * 1000.0));
        table.samples(
            "remove_ms",
            "clone removed, everything freed",
            "ms",
            &removed,
            bar("remove_ms"),
        );
        self.at_once(table, &clones.ready)?;
        self.idle(table, COREOS_KVM, "cow", "copy-on-write")?;
        self.idle(table, COPIED, "copy", "copy")
    }

    /// A clone like those of pods, by hand.
    fn bare_clone(&self) -> Result<BareClone> {
        let before = processes(self.node)?;
        let pod = Pod::new(self.node.place(), "like");
        let id = self.cri.run_pod(&pod, COREOS_KVM)?;
        let qemu = new_processes(self.node, &before)?
            .into_iter()
            .find(|process| process.command.contains("qemu-system"))
            .context("the pod has no QEMU")?;
        let bare = BareClone::like(qemu.pid);
        self.cri.stop_pod(&id)?;
        self.cri.remove_pod(&id)?;
        bare
    }

    fn one_pod(&self, handler: &str, name: &str, steps: &mut Steps) -> Result<()> {
        let before = processes(self.node)?;
        let pod = Pod::new(self.node.place(), name);
        let begun = Instant::now();
        let id = self.cri.run_pod(&pod, handler)?;
        steps.ready.add(begun.elapsed().as_secs_f64());
        let container = Container::script("says", "echo out; exec sleep 2147483647");
        self.cri.run(&id, &container, &pod)?;
        let log = container.log(&pod);
        // More often than a log is looked at elsewhere: runc takes some tenths of a second in all.
        while fs::metadata(&log).map_or(0, |log| log.len()) == 0 {
            ensure!(begun.elapsed() < OUTPUT, "the container says nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        steps.output.add(begun.elapsed().as_secs_f64());
        std::thread::sleep(if [COREOS_KVM, COPIED].contains(&handler) {
            Duration::from_secs(4)
        } else {
            Duration::ZERO
        });

        let begun = Instant::now();
        self.cri.stop_pod(&id)?;
        self.cri.remove_pod(&id)?;
        while !new_processes(self.node, &before)?.is_empty() {
            ensure!(begun.elapsed() < OUTPUT, "processes of the pod stay");
            std::thread::sleep(Duration::from_millis(1));
        }
        steps.removed.add(begun.elapsed().as_secs_f64());
        Ok(())
    }

    fn at_once(&self, table: &mut Table, one: &Samples) -> Result<()> {
        let mut all = Samples::default();
        for run in 1..=self.arguments.runs {
            eprintln!("{AT_ONCE} clones at once, {run} of {}", self.arguments.runs);
            let begun = Instant::now();
            let ids = self.start(AT_ONCE)?;
            all.add(begun.elapsed().as_secs_f64());
            self.remove(&ids)?;
        }
        let what = format!("{AT_ONCE} clones at once until the last is ready, over one");
        let goal = bar("clones10_over_one").unwrap_or_default();
        table.ratio("clones10_over_one", &what, &all, one, goal);
        table.samples("clones10_s", "the same, in seconds", "s", &all, None);
        Ok(())
    }

    /// Starts so many pods at the same time.
    fn start(&self, count: u32) -> Result<Vec<(String, Pod)>> {
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..count)
                .map(|number| {
                    scope.spawn(move || {
                        let cri = Cri::connect(self.node)?;
                        let pod = Pod::new(self.node.place(), &format!("many-{number}"));
                        let id = cri.run_pod(&pod, COREOS_KVM)?;
                        anyhow::Ok((id, pod))
                    })
                })
                .collect();
            let joined = workers.into_iter().map(|worker| match worker.join() {
                Ok(outcome) => outcome,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            joined.collect()
        })
    }

    fn remove(&self, pods: &[(String, Pod)]) -> Result<()> {
        for (id, _) in pods {
            self.cri.stop_pod(id)?;
            self.cri.remove_pod(id)?;
        }
        Ok(())
    }

    /// The memory of many idle pods, each with a container that does nothing.
    fn idle(&self, table: &mut Table, handler: &str, mode: &str, name: &str) -> Result<()> {
        eprintln!("{IDLE} idle clones by {name}");
        let before = processes(self.node)?;
        let mut pods = Vec::new();
        for number in 0..IDLE {
            let pod = Pod::new(self.node.place(), &format!("idle-{number}"));
            let id = self.cri.run_pod(&pod, handler)?;
            let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
            self.cri.run(&id, &idle, &pod)?;
            pods.push((id, pod));
        }
        std::thread::sleep(SETTLED);
        let mut parts = Parts::default();
        for process in new_processes(self.node, &before)? {
            parts.add(&process)?;
        }
        let pod = |bytes: f64| bytes / f64::from(IDLE) / MB;
        let guest = parts.guest + parts.shared.values().sum::<f64>();
        let key = |part: &str| format!("clone_{mode}_{part}mb");
        let what = format!("{IDLE} idle clones by {name}: memory of the host, each");
        let all = pod(guest + parts.qemu + parts.others);
        table.figure(&key(""), &what, "MB", all, bar(&key("")));
        table.figure(&key("guest_"), "of it the guest's", "MB", pod(guest), None);
        table.figure(&key("qemu_"), "of it QEMU's own", "MB", pod(parts.qemu), None);
        table.figure(&key("others_"), "of it shim and helpers", "MB", pod(parts.others), None);
        self.remove(&pods)
    }
}

/// Bytes of memory, by whose they are.
#[derive(Default)]
struct Parts {
    /// What guests have for themselves.
    guest: f64,
    /// What guests have in common, by the inode of its file.
    shared: BTreeMap<u64, f64>,
    qemu: f64,
    others: f64,
}

impl Parts {
    /// Shared pages count in part, save those of a guest: all that its file has count once, whoever has mapped them.
    fn add(&mut self, process: &Process) -> Result<()> {
        let path = format!("/proc/{}/smaps_rollup", process.pid);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path} ({})", process.command))?;
        let own = bytes(&text, "Pss:") - bytes(&text, "Pss_Shmem:");
        if process.command.contains("qemu-system") {
            let memory = guest_memory(process)?;
            self.qemu += own - memory.private;
            self.guest += memory.private;
            if memory.is_shared {
                self.shared.insert(memory.inode, memory.file);
            } else {
                self.guest += memory.file;
            }
        } else {
            self.others += own;
        }
        Ok(())
    }
}

/// A number of proc_pid_smaps(5), in bytes.
fn bytes(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    kilobytes.unwrap_or_default() * 1024.0
}

/// The file that a guest's memory is, in bytes.
struct GuestMemory {
    inode: u64,
    is_shared: bool,
    /// What the file takes.
    file: f64,
    /// What QEMU has in place of the file's.
    private: f64,
}

fn guest_memory(qemu: &Process) -> Result<GuestMemory> {
    for entry in fs::read_dir(format!("/proc/{}/fd", qemu.pid))? {
        let path = entry?.path();
        let name = fs::read_link(&path).unwrap_or_default().to_string_lossy().into_owned();
        let is_shared = name.starts_with("/memfd:template");
        if is_shared || name.starts_with("/memfd:guest") {
            let file = fs::metadata(&path)?;
            let maps = fs::read_to_string(format!("/proc/{}/smaps", qemu.pid))?;
            let mapped = maps.split_once(name.split(' ').next().unwrap_or_default());
            let (_, numbers) = mapped.with_context(|| format!("{} has not mapped its guest's memory", qemu.command))?;
            return Ok(GuestMemory {
                inode: file.ino(),
                is_shared,
                file: file.blocks() as f64 * 512.0,
                private: if is_shared { bytes(numbers, "Anonymous:") } else { 0.0 },
            });
        }
    }
    anyhow::bail!("{} is no clone: it has no file with the guest's memory", qemu.command)
}
