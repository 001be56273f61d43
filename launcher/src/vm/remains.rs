//! Ending a machine, and freeing what it holds on the host: by the process that started it, or by any later one, from the
//! record on disk alone. Every step is tried, whatever became of the others, and each may have been done before.

use std::{io, path::Path, time::Duration};

use nix::{
    mount::{MntFlags, umount2},
    sys::signal::Signal,
};
use tokio::time::{Instant, sleep};

use crate::{
    cgroup,
    machine::MachineId,
    mountinfo, netdev, sentence,
    state::{CloneMode, Origin, ProcessId, Record, StateDir},
    template::resident,
    user,
};

/// A killed process is gone at once, unless it hangs in the kernel.
const DEATH: Duration = Duration::from_secs(3);
/// Rounds of unmounting: a mount upon a mount appears when the upper one is gone.
const UNMOUNT_ROUNDS: usize = 64;

/// Something of a machine is still there.
#[derive(Debug, thiserror::Error)]
#[error("machine {id} is not wholly removed: {}", problems.join("; "))]
pub struct DestroyError {
    id: String,
    problems: Vec<String>,
}

impl DestroyError {
    pub(super) fn new(id: &str, problems: Vec<String>) -> Self {
        Self {
            id: id.to_owned(),
            problems,
        }
    }
}

/// Ends the machine `id` if it still runs and frees everything it holds; what is gone already is no error, nor a machine
/// that never was.
///
/// # Errors
/// What could not be ended or freed, all of it.
pub async fn destroy(state_dir: &Path, id: &MachineId) -> Result<(), DestroyError> {
    let state = StateDir::of(state_dir, id);
    let mut problems = Vec::new();
    let record = state.read().unwrap_or_else(|error| {
        problems.push(sentence(&error));
        None
    });
    if let Some(record) = &record {
        // A launcher that still lives would take its processes' end for an accident and free things at the same time.
        end(
            record.launcher.filter(|launcher| launcher.pid != std::process::id()),
            "the launcher",
            &mut problems,
        )
        .await;
    }
    free(state_dir, &state, record.as_ref(), &mut problems).await;
    if problems.is_empty() {
        Ok(())
    } else {
        Err(DestroyError::new(id.as_str(), problems))
    }
}

/// Ends the machine's processes and frees what the record names.
pub(super) async fn free(state_dir: &Path, state: &StateDir, record: Option<&Record>, problems: &mut Vec<String>) {
    if let Some(record) = record {
        end(record.qemu, "QEMU", problems).await;
        for helper in &record.helpers {
            end(Some(helper.process), &helper.name, problems).await;
        }
        if let Some(netns) = &record.netns {
            note(netdev::detach(netns).await, problems);
        }
        if let Some(cgroup) = &record.cgroup {
            note(cgroup::remove(cgroup).await, problems);
        }
        if let Some(uid) = record.uid {
            note(user::release(state_dir, uid), problems);
        }
        if let Some(Origin::Clone {
            template,
            mode: CloneMode::CopyOnWrite,
        }) = &record.origin
        {
            let (state_dir, template) = (state_dir.to_owned(), template.clone());
            let swept = tokio::task::spawn_blocking(move || resident::sweep(&state_dir, &template)).await;
            note(swept.map_err(io::Error::other).and_then(|swept| swept), problems);
        }
    }
    note(unmount_below(state.path()), problems);
    note(state.remove(), problems);
}

fn note<E: std::error::Error + 'static>(result: Result<(), E>, problems: &mut Vec<String>) {
    if let Err(error) = result {
        problems.push(sentence(&error));
    }
}

async fn end(process: Option<ProcessId>, name: &str, problems: &mut Vec<String>) {
    let Some(process) = process else { return };
    match process.signal(Signal::SIGKILL) {
        Ok(true) => {}
        Ok(false) => return,
        Err(error) => return problems.push(format!("{name} (pid {}) cannot be killed: {error}", process.pid)),
    }
    let deadline = Instant::now() + DEATH;
    while process.is_alive() {
        if Instant::now() > deadline {
            return problems.push(format!(
                "{name} (pid {}) does not end although it was killed",
                process.pid
            ));
        }
        sleep(Duration::from_millis(2)).await;
    }
}

/// Unmounts whatever is mounted below `folder`, the deepest first, without following links.
fn unmount_below(folder: &Path) -> io::Result<()> {
    let folder = match folder.canonicalize() {
        Ok(folder) => folder,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for _ in 0..UNMOUNT_ROUNDS {
        let all = mountinfo::mounts()?;
        let mut points: Vec<_> = mountinfo::below(&folder, &all).collect();
        if points.is_empty() {
            return Ok(());
        }
        points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
        for point in points {
            umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).map_err(|error| {
                io::Error::new(
                    io::Error::from(error).kind(),
                    format!("unmounting {}: {error}", point.display()),
                )
            })?;
        }
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        format!("mounts keep appearing below {}", folder.display()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_machine_that_never_was_is_destroyed_at_once() {
        let root = tempfile::tempdir().unwrap();
        destroy(root.path(), &"pod".parse().unwrap()).await.unwrap();
    }
}
