//! How many of its processors the guest uses, and the memory that the host plugs into it. The kernel finds that by itself; that it
//! is used is for user space to say.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    task::spawn_blocking,
    time::{Instant, sleep},
};

use crate::error::AgentError;

/// Documentation/admin-guide/cputopology.rst and mm/memory-hotplug.rst of the kernel.
const PROCESSORS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";
/// proc(5).
const MEMINFO: &str = "/proc/meminfo";
/// New memory is for what can be moved elsewhere, so that it can be given back, as long as there is enough for all else.
const POLICY: (&str, &str) = ("/sys/module/memory_hotplug/parameters/online_policy", "auto-movable");

/// Longest time until the kernel has what was plugged in: the firmware's part is program in byte code.
const PLUGGED: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(10);

/// Uses so many processors, and all memory; answers when the latter is at least so much, in MiB, with the number of processors.
///
/// # Errors
/// When the machine has not so many processors, or the kernel does not take what there is, or in time.
pub(crate) async fn take(vcpus: u32, memory_mib: u64) -> Result<u32, AgentError> {
    // A kernel without that choice makes its own.
    let _ = fs::write(POLICY.0, POLICY.1);
    let deadline = Instant::now() + PLUGGED;
    loop {
        let memory = off_thread(|| take_memory(Path::new(MEMORY))).await;
        let memory = memory.map_err(AgentError::failed("taking memory into use"))?;
        if memory >= memory_mib {
            break;
        }
        if Instant::now() >= deadline {
            return Err(AgentError::FailedPrecondition(format!(
                "the guest's kernel has {memory} MiB of memory after {} s, and is to have {memory_mib} MiB",
                PLUGGED.as_secs()
            )));
        }
        sleep(LOOK).await;
    }
    let wanted = usize::try_from(vcpus).unwrap_or(usize::MAX);
    let used = off_thread(move || take_processors(Path::new(PROCESSORS), wanted)).await;
    let used = used.map_err(AgentError::failed("changing the processors in use"))?;
    if used < wanted {
        return Err(AgentError::FailedPrecondition(format!(
            "the guest has {used} processors, and is to use {vcpus}"
        )));
    }
    Ok(u32::try_from(used).unwrap_or(u32::MAX))
}

/// Memory that nobody needs, or that is needed for caches only, in MiB.
///
/// # Errors
/// When the kernel does not say.
pub(crate) fn available_mib() -> Result<u64, AgentError> {
    memory_mib("MemAvailable")
}

/// All memory that the kernel has, in MiB.
///
/// # Errors
/// When it does not say.
pub(crate) fn total_mib() -> Result<u64, AgentError> {
    memory_mib("MemTotal")
}

/// By the field's name in proc_meminfo(5).
fn memory_mib(field: &str) -> Result<u64, AgentError> {
    let text = fs::read_to_string(MEMINFO).map_err(AgentError::failed("reading how much memory there is"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':')?.trim().strip_suffix(" kB"));
    match kib.map(str::parse::<u64>) {
        Some(Ok(kib)) => Ok(kib >> 10),
        _ => Err(AgentError::FailedPrecondition(format!(
            "the guest's kernel does not say its {field}"
        ))),
    }
}

/// The kernel takes its time with these, which other callers are not to wait for.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(io::Error::other(error)))
}

/// Uses the first `wanted` processors, and sets the others aside where the kernel does. Answers how many are in use.
fn take_processors(folder: &Path, wanted: usize) -> io::Result<usize> {
    let all = numbered(folder, "cpu")?;
    // The first one of most machines has no switch.
    let is_used = |folder: &Path| fs::read_to_string(folder.join("online")).map_or(true, |state| state.trim() != "0");
    let mut used = all.iter().filter(|(_, folder)| is_used(folder)).count();
    // One at a time: several at once have locked up translated guests.
    for (_, processor) in &all {
        if used < wanted && !is_used(processor) {
            fs::write(processor.join("online"), "1")?;
            used += 1;
        }
    }
    for (_, processor) in all.iter().rev() {
        let switch = processor.join("online");
        // One that the kernel cannot do without stays.
        if used > wanted && is_used(processor) && switch.exists() && fs::write(switch, "0").is_ok() {
            used -= 1;
        }
    }
    Ok(used)
}

/// Answers how much memory is in use, in MiB.
fn take_memory(folder: &Path) -> io::Result<u64> {
    let block = match fs::read_to_string(folder.join("block_size_bytes")) {
        Ok(text) => u64::from_str_radix(text.trim(), 16).map_err(io::Error::other)? >> 20,
        // A kernel without hotplug has what it has.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    let mut total = 0;
    for (_, memory) in numbered(folder, "memory")? {
        let state = memory.join("state");
        match fs::read_to_string(&state) {
            Ok(text) if text.trim() == "offline" => fs::write(&state, "online")?,
            Ok(_) => {}
            Err(_) => continue,
        }
        total += block;
    }
    Ok(total)
}

/// The folders of that name with a number behind it, by that number.
fn numbered(folder: &Path, name: &str) -> io::Result<Vec<(u32, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let number = path.file_name().and_then(|file| file.to_str()?.strip_prefix(name));
        if let Some(number) = number.and_then(|number| number.parse().ok()) {
            found.push((number, path));
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn read(&self, path: &str) -> String {
            fs::read_to_string(self.0.path().join(path)).unwrap()
        }
    }

    #[test]
    fn the_first_processors_are_used() {
        let sysfs = Sysfs::new();
        sysfs.file("cpu0/topology/core_id", "0");
        for number in 1..12 {
            sysfs.file(&format!("cpu{number}/online"), "0\n");
        }
        sysfs.file("cpuidle/current_driver", "none");
        let used = || -> Vec<_> {
            let used = |number: &u32| sysfs.read(&format!("cpu{number}/online")).starts_with('1');
            (1..12).filter(used).collect()
        };
        let take = |count| take_processors(sysfs.0.path(), count).unwrap();
        assert_eq!((take(3), used()), (3, vec![1, 2]));
        assert_eq!((take(3), used()), (3, vec![1, 2]));
        assert_eq!((take(11), used()), (11, (1..11).collect()));
        assert_eq!((take(2), used()), (2, vec![1]));
        assert_eq!((take(13), used()), (12, (1..12).collect()));
        assert_eq!((take(0), used()), (1, vec![]));
    }

    #[test]
    fn memory_that_is_not_in_use_is_taken() {
        let sysfs = Sysfs::new();
        sysfs.file("block_size_bytes", "8000000\n");
        sysfs.file("memory0/state", "online\n");
        sysfs.file("memory32/state", "offline\n");
        sysfs.file("memory_hotplug/state", "offline");
        assert_eq!(take_memory(sysfs.0.path()).unwrap(), 256);
        assert_eq!(sysfs.read("memory32/state"), "online");
        assert_eq!(sysfs.read("memory0/state"), "online\n");
    }
}
