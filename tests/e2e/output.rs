//! Output that nobody takes as fast as it comes: it is held back, and whole in the end.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_client::types::v1::Status;
use coreos_kvm_launcher::vsock::{self, VsockKind};
use kubeception_tests::cri::{COREOS_KVM, read_log};
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::pod::{Container, Pod};
use kubeception_tests::task::{Output, Task};
use libtest_mimic::Trial;
use nix::unistd::Pid;

use crate::clones::COPY;
use crate::lab::{Alone, Lab, OwnPod, Start, eventually, in_guest, origin};
use crate::late::Halted;
use crate::measure::{AGENTS_CGROUP, SHIM, agents_memory, private_memory, process_of, settable};

const BOUND: Duration = Duration::from_secs(30);
/// So many blocks of a MiB are written, unless this variable of the environment has another number.
const LONG: (&str, u64) = ("COREOS_KVM_OUTPUT_MIB", 1024);
/// Of a block, in bytes, each of which begins with its number.
const BLOCK: usize = 1 << 20;
/// More than there can be between a process and its reader, in bytes: three pipes and two sockets, the windows of a connection, the memory in
/// which much output comes, and the block that the process is at.
const ON_ITS_WAY_MAX: u64 = 3 << 20;
/// Of the shim's memory and of the agent's, in bytes, while the output goes through them: their buffers are 64 and 256 KiB, and the windows
/// of a connection are 256 KiB.
const GROWTH_MAX: u64 = 1 << 20;
/// How long a process has to stand still to be called held back.
const STILL: Duration = Duration::from_millis(500);

/// Streams have a way of their own in machines that share memory; those of the others, also of ones that boot, are vsock's.
pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    if lab.start == Start::Boot {
        return Vec::new();
    }
    vec![
        lab.trial_alone(
            "long output to a slow reader is held back, takes no memory, and is whole and in order",
            |lab| slow_reader(lab, COREOS_KVM, "copy-on-write"),
        ),
        lab.trial_alone(
            "long output to a slow reader, by vsock, is held back, takes no memory, and is whole and in order",
            |lab| slow_reader(lab, COPY, "copy"),
        ),
    ]
}

/// A process whose output is read as a trial likes.
struct Writer<'a> {
    lab: &'a Alone<'a>,
    sandbox: &'a str,
    container: String,
    output: Output,
    /// What it writes over and over, each time after a number.
    block: Vec<u8>,
    /// What is expected next: the block of that number, of which so much was there.
    number: u64,
    expected: Vec<u8>,
    seen: usize,
    /// Bytes that were read in all.
    taken: u64,
}

impl<'a> Writer<'a> {
    /// Starts one that writes so many blocks, and then runs the rest of its script.
    fn start(lab: &'a Alone<'a>, own: &'a OwnPod<'_>, name: &str, blocks: u64, then: &str) -> Result<(Self, Task<'a>)> {
        let block = block();
        let folder = lab.node.place().base().join(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("block"), &block)?;
        // One process writes all, which is told what at once: it is not the script's speed that is tried.
        let script = format!(
            "mkdir /dev/shm/{name} && cd /dev/shm/{name} && cp /block/block . || exit 1
            i=0; while [ $i -lt {blocks} ]; do echo $i > $i; all=\"$all $i block\"; i=$((i + 1)); done
            {then}"
        );
        let container = Container::script(name, &script).host_path(&folder, "/block", true);
        let container = lab.cri.create(&own.id, &container, &own.pod)?;
        let output = Output::make(lab.node.place(), name)?;
        let task = Task::create(lab.cri, &container, Some(&output))?;
        task.start()?;
        let writer = Self {
            lab,
            sandbox: &own.id,
            container,
            output,
            number: 0,
            expected: numbered(0, &block),
            block,
            seen: 0,
            taken: 0,
        };
        Ok((writer, task))
    }

    /// Reads and compares until there are so many bytes in all, or to the end; answers whether it is the end.
    fn take(&mut self, bytes: u64) -> Result<bool> {
        let mut buffer = vec![0; 64 << 10];
        while self.taken < bytes {
            let room = buffer.len().min(usize::try_from(bytes - self.taken)?);
            let count = self.output.read(&mut buffer[..room], BOUND)?;
            if count == 0 {
                return Ok(true);
            }
            self.compare(&buffer[..count])?;
        }
        Ok(false)
    }

    fn compare(&mut self, mut read: &[u8]) -> Result<()> {
        while !read.is_empty() {
            let expected = &self.expected[self.seen..];
            let (now, later) = read.split_at(read.len().min(expected.len()));
            ensure!(
                expected.starts_with(now),
                "behind {} bytes comes something else than was written, in block {}",
                self.taken,
                self.number
            );
            self.taken += now.len() as u64;
            self.seen += now.len();
            if self.seen == self.expected.len() {
                self.number += 1;
                self.expected = numbered(self.number, &self.block);
                self.seen = 0;
            }
            read = later;
        }
        Ok(())
    }

    /// Fails unless it is held back, and has not written more than is on its way.
    fn is_held_back(&self) -> Result<()> {
        let written = held_back(self.lab, self.sandbox, &self.container, "cat")?;
        ensure!(
            written <= self.taken + ON_ITS_WAY_MAX,
            "{written} bytes are written, of which {} are read",
            self.taken
        );
        Ok(())
    }

    /// Reads what is left, which is so many blocks in all, and the end behind it.
    fn ends_after(&mut self, blocks: u64) -> Result<()> {
        ensure!(self.take(u64::MAX)?);
        ensure!(
            self.number == blocks && self.taken == length(blocks),
            "after {} bytes, in block {}, there is nothing more",
            self.taken,
            self.number
        );
        Ok(())
    }
}

/// Waits until a container's first process, which runs that program, stands still; answers how many bytes it has written.
fn held_back(lab: &Alone<'_>, sandbox: &str, container: &str, program: &str) -> Result<u64> {
    let script = format!(
        "cd /proc/$(head -n 1 {AGENTS_CGROUP}/{container}/cgroup.procs) || exit 1
        cat stat; sleep {}; cat stat; grep ^wchar: io",
        STILL.as_secs_f32()
    );
    eventually(BOUND, || {
        let said = in_guest(&lab.node, sandbox, &["sh", "-c", &script])?;
        let lines: Vec<_> = said.lines().collect();
        let [before, after, written] = lines.as_slice() else {
            anyhow::bail!("of the process there is {said:?}");
        };
        // Also the time that it has taken is the same: proc_pid_stat(5).
        ensure!(
            before == after && after.contains(&format!("({program}) S ")),
            "the process does not stand still: {said}"
        );
        let written = written.strip_prefix("wchar: ").context("no wchar")?;
        Ok(written.parse()?)
    })
}

/// Of which no part is like another: xorshift64 of George Marsaglia.
fn block() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = (0..BLOCK / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

fn numbered(number: u64, block: &[u8]) -> Vec<u8> {
    [format!("{number}\n").as_bytes(), block].concat()
}

/// Of so many blocks, in bytes.
fn length(blocks: u64) -> u64 {
    (0..blocks)
        .map(|number| numbered(number, &[]).len() as u64 + BLOCK as u64)
        .sum()
}

fn slow_reader(lab: &mut Alone<'_>, handler: &str, mode: &str) -> Result<()> {
    let own = OwnPod::run(lab.cri, Pod::new(lab.node.place(), "slow-reader"), handler)?;
    let origin = origin(lab.node.place(), &own.id)?;
    ensure!(origin["mode"] == mode, "its origin is {origin}");
    long(lab, &own)?;
    ends_meanwhile(lab, &own)?;
    two_at_once(lab, &own)?;
    if handler == COREOS_KVM {
        by_cri(lab, &own)?;
    }
    own.remove()
}

fn long(lab: &Alone<'_>, own: &OwnPod<'_>) -> Result<()> {
    let blocks = settable(LONG)?;
    let shim = process_of(&lab.node, &own.id, SHIM)?.pid;
    let memory = |shim: Pid| anyhow::Ok((private_memory(shim)?, agents_memory(&lab.node, &own.id)?));
    // What is made for whoever looks is there.
    memory(shim)?;
    let before = memory(shim)?;
    let (mut writer, task) = Writer::start(lab, own, "long", blocks, "exec cat $all")?;
    let all = length(blocks);
    let (mut most, begun) = ((0, 0), Instant::now());
    let mut reading = Duration::ZERO;
    // Nothing is read, then a quarter at a time.
    for part in 0..4 {
        let since = Instant::now();
        writer.take(all / 4 * part)?;
        reading += since.elapsed();
        writer.is_held_back()?;
        let now = memory(shim)?;
        most = (most.0.max(now.0), most.1.max(now.1));
    }
    let since = Instant::now();
    writer.ends_after(blocks)?;
    reading += since.elapsed();
    let exit = task.ended(BOUND)?;
    ensure!(exit == 0, "its exit code is {exit}");
    let grown = (most.0.saturating_sub(before.0), most.1.saturating_sub(before.1));
    eprintln!(
        "{} MiB were read in {:.1} s of {:.1} s; the shim grew by {} KiB, the agent by {} KiB",
        all >> 20,
        reading.as_secs_f32(),
        begun.elapsed().as_secs_f32(),
        grown.0 >> 10,
        grown.1 >> 10
    );
    ensure!(
        grown.0 < GROWTH_MAX && grown.1 < GROWTH_MAX,
        "the shim has grown by {} bytes, the agent by {}",
        grown.0,
        grown.1
    );
    // All but what came before it was seen that there is much.
    let shared = shared(shim)?;
    let by_kernel = origin(lab.node.place(), &own.id)?["mode"] == "copy" && vsock::kind() == VsockKind::Vhost;
    ensure!(
        by_kernel || shared > all / 10 * 9,
        "{shared} of {all} bytes came in shared memory"
    );
    Ok(())
}

/// So many bytes have come in the memory that guest and host share: the first number in it.
fn shared(shim: Pid) -> Result<u64> {
    for descriptor in fs::read_dir(format!("/proc/{shim}/fd"))? {
        let descriptor = descriptor?.path();
        if fs::read_link(&descriptor).is_ok_and(|file| file.to_string_lossy().starts_with("/memfd:window")) {
            let mut number = [0; 8];
            File::open(descriptor)?.read_exact_at(&mut number, 0)?;
            return Ok(u64::from_ne_bytes(number));
        }
    }
    bail!("the shim has no memory for output")
}

/// What is still on its way when a process ends comes all the same.
fn ends_meanwhile(lab: &Alone<'_>, own: &OwnPod<'_>) -> Result<()> {
    const BLOCKS: u64 = 2;
    /// A FIFO holds as much, so that the process comes to its end.
    const LEFT: u64 = 48 << 10;

    let (mut writer, task) = Writer::start(lab, own, "ends", BLOCKS, "cat $all; exit 3")?;
    writer.take(length(BLOCKS) - LEFT)?;
    eventually(BOUND, || {
        let status = task.status()?;
        ensure!(status == Status::Stopped, "it is {}", status.as_str_name());
        Ok(())
    })?;
    // Whoever deletes it waits for the reader.
    let exit = std::thread::scope(|scope| {
        let deleting = scope.spawn(move || task.ended(BOUND));
        writer.ends_after(BLOCKS)?;
        match deleting.join() {
            Ok(exit) => exit,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })?;
    ensure!(exit == 3, "its exit code is {exit}");
    Ok(())
}

/// One whose output nobody reads does not hold back another, nor is anything of either in the other.
fn two_at_once(lab: &Alone<'_>, own: &OwnPod<'_>) -> Result<()> {
    const BLOCKS: u64 = 24;

    let (mut stuck, stuck_task) = Writer::start(lab, own, "stuck", BLOCKS, "exec cat $all")?;
    stuck.take(length(BLOCKS) / 4)?;
    stuck.is_held_back()?;
    let (mut other, other_task) = Writer::start(lab, own, "other", BLOCKS, "exec cat $all")?;
    other.ends_after(BLOCKS)?;
    stuck.ends_after(BLOCKS)?;
    for task in [stuck_task, other_task] {
        let exit = task.ended(BOUND)?;
        ensure!(exit == 0, "its exit code is {exit}");
    }
    Ok(())
}

/// A containerd that is halted does not read; its log is whole when it goes on.
fn by_cri(lab: &Alone<'_>, own: &OwnPod<'_>) -> Result<()> {
    /// Of 8 bytes each: more than is on its way.
    const LINES: usize = 1_000_000;

    let container = Container::new("logs", BUSYBOX).command(&["seq", "-w", "1", &LINES.to_string()]);
    let id = lab.cri.create(&own.id, &container, &own.pod)?;
    lab.cri.start(&id)?;
    let halted = Halted::containerd(&lab.node)?;
    let written = held_back(lab, &own.id, &id, "seq")?;
    drop(halted);
    let exit = lab.cri.wait_exited(&id, BOUND)?;
    ensure!(exit.exit_code == 0, "its exit code is {}", exit.exit_code);
    eventually(BOUND, || {
        let lines = read_log(&container.log(&own.pod))?;
        let in_order = (1..)
            .zip(&lines)
            .all(|(number, line)| line.text == format!("{number:07}"));
        ensure!(
            lines.len() == LINES && in_order,
            "it was held back when it had written {written} bytes; its log has {} lines, in order: {in_order}",
            lines.len()
        );
        Ok(())
    })
}
