//! Processors and memory that the host plugs into the running guest. The kernel finds them by itself; that they are used is for
//! user space to say.

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
/// New memory is for what can be moved elsewhere, so that it can be given back, as long as there is enough for all else.
const POLICY: (&str, &str) = ("/sys/module/memory_hotplug/parameters/online_policy", "auto-movable");

/// Longest time until the kernel has what was plugged in: the firmware's part is program in byte code.
const PLUGGED: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(10);

/// Uses all processors and all memory; answers when there are so many and so much, in MiB.
///
/// # Errors
/// When the kernel does not take them, or in time.
pub(crate) async fn take(vcpus: u32, memory_mib: u64) -> Result<(), AgentError> {
    let deadline = Instant::now() + PLUGGED;
    // A kernel without that choice makes its own.
    let _ = fs::write(POLICY.0, POLICY.1);
    let wanted = (usize::try_from(vcpus).unwrap_or(usize::MAX), memory_mib);
    loop {
        // The kernel prepares what it takes, which others who call are not to wait for.
        let taken = spawn_blocking(|| Ok((take_processors(Path::new(PROCESSORS))?, take_memory(Path::new(MEMORY))?)));
        let taken = taken.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        let (processors, memory) = taken.map_err(AgentError::failed("taking processors and memory into use"))?;
        if processors >= wanted.0 && memory >= wanted.1 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            let message = format!(
                "the guest's kernel has {processors} processors and {memory} MiB of memory after {} s, and is to have {vcpus} and {memory_mib} MiB",
                PLUGGED.as_secs()
            );
            return Err(AgentError::FailedPrecondition(message));
        }
        sleep(LOOK).await;
    }
}

/// Answers how many processors are in use.
fn take_processors(folder: &Path) -> io::Result<usize> {
    let mut count = 0;
    for processor in numbered(folder, "cpu")? {
        let switch = processor.join("online");
        // The first one of most machines has none.
        if fs::read_to_string(&switch).is_ok_and(|state| state.trim() == "0") {
            fs::write(&switch, "1")?;
        }
        count += 1;
    }
    Ok(count)
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
    for memory in numbered(folder, "memory")? {
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

/// The folders of that name with a number behind it.
fn numbered(folder: &Path, name: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let number = path.file_name().and_then(|file| file.to_str()?.strip_prefix(name));
        if number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())) {
            found.push(path);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_use_is_taken() {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let read = |path: &str| fs::read_to_string(root.path().join(path)).unwrap();
        file("cpu0/topology/core_id", "0");
        file("cpu1/online", "0\n");
        file("cpu2/online", "1\n");
        file("cpuidle/current_driver", "none");
        assert_eq!(take_processors(root.path()).unwrap(), 3);
        assert_eq!((read("cpu1/online"), read("cpu2/online")), ("1".into(), "1\n".into()));

        file("block_size_bytes", "8000000\n");
        file("memory0/state", "online\n");
        file("memory32/state", "offline\n");
        file("memory_hotplug/state", "offline");
        assert_eq!(take_memory(root.path()).unwrap(), 256);
        assert_eq!(
            (read("memory32/state"), read("memory0/state")),
            ("online".into(), "online\n".into())
        );
    }
}
