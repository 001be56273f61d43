//! What is kept on disk of each running machine: a folder that only root may enter, and in it a record from which any later
//! process can find the machine, or end it and free what it holds.

use std::{
    fmt,
    fs::{DirBuilder, Permissions},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags};
use serde::{Deserialize, Serialize};

use crate::{accel::Acceleration, machine::MachineId};

const RECORD: &str = "machine.json";
/// A record is some hundred bytes; a longer one was not written here.
const RECORD_MAX: u64 = 64 * 1024;

/// What could not be done in a machine's folder.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("a machine {id} exists already: its folder {} is there", path.display())]
    Exists { id: MachineId, path: PathBuf },
    #[error("{what} {} failed", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the record {} is not one of this program's", path.display())]
    Record {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

impl StateError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// One process, named so that a later one of the same pid is never taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: u32,
    /// Clock ticks after boot at which it started: field 22 of /proc/PID/stat, proc_pid_stat(5).
    pub start_time: u64,
}

impl ProcessId {
    /// The process that has `pid` now, ended or not; None if there is none.
    pub fn of(pid: u32) -> Option<Self> {
        Self::look(pid).map(|(process, _)| process)
    }

    /// Whether it still runs; one that has ended and is not yet waited for does not.
    pub fn is_alive(self) -> bool {
        Self::look(self.pid).is_some_and(|(process, ended)| process == self && !ended)
    }

    /// The process, and whether it has ended.
    fn look(pid: u32) -> Option<(Self, bool)> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field, the name in parentheses, may hold anything, so count behind the last parenthesis.
        let (_, fields) = stat.rsplit_once(')')?;
        let mut fields = fields.split_ascii_whitespace();
        let (state, start_time) = (fields.next()?, fields.nth(18)?);
        Some((
            Self {
                pid,
                start_time: start_time.parse().ok()?,
            },
            matches!(state, "Z" | "X"),
        ))
    }

    /// Sends `signal`; says whether there was a process to send it to. Race-free: a process that took over the number
    /// between the look and the signal is not hit.
    ///
    /// # Errors
    /// Of pidfd_open(2) and pidfd_send_signal(2), save that the process is gone.
    pub fn signal(self, signal: Signal) -> io::Result<bool> {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return Ok(false);
        };
        let gone = |error: rustix::io::Errno| {
            if error == rustix::io::Errno::SRCH {
                Ok(false)
            } else {
                Err(error.into())
            }
        };
        let descriptor = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => descriptor,
            Err(error) => return gone(error),
        };
        if !self.is_alive() {
            return Ok(false);
        }
        // The kernel's numbers of signals are the same in both crates.
        let Some(signal) = rustix::process::Signal::from_named_raw(signal as i32) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        rustix::process::pidfd_send_signal(descriptor.as_fd(), signal)
            .map(|()| true)
            .or_else(gone)
    }
}

/// A helper process of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Helper {
    /// The program's name.
    pub name: String,
    #[serde(flatten)]
    pub process: ProcessId,
}

/// Where the guest's vsock is reached from the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VsockAddress {
    /// The kernel's vhost-vsock: the guest's context id.
    Cid(u32),
    /// vhost-device-vsock: the Unix socket that takes `CONNECT <port>`.
    Socket(PathBuf),
}

/// Everything about a machine that outlives the process which started it. Written before what it names comes into being, so
/// that nothing can be made that nobody knows of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub id: String,
    /// The guest's name.
    pub guest: String,
    /// The process that started the machine, and that its processes do not survive.
    pub launcher: Option<ProcessId>,
    pub qemu: Option<ProcessId>,
    #[serde(default)]
    pub helpers: Vec<Helper>,
    pub vsock: Option<VsockAddress>,
    /// How QEMU runs the guest, and why so.
    pub acceleration: Option<Acceleration>,
    pub acceleration_reason: Option<String>,
    /// How the guest came to run; None as long as that is not decided.
    #[serde(default)]
    pub origin: Option<Origin>,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// The network namespace that has the machine's taps.
    pub netns: Option<PathBuf>,
    /// As in [`crate::machine::Machine::cgroup`].
    pub cgroup: Option<PathBuf>,
    /// uid of the machine's processes.
    pub uid: Option<u32>,
}

/// How a guest came to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "from")]
pub enum Origin {
    /// It booted.
    Boot {
        /// Why it is no clone.
        why: String,
    },
    /// It goes on where a template was saved.
    Clone { template: String, mode: CloneMode },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boot { why } => write!(f, "boot ({why})"),
            Self::Clone { template, mode } => write!(f, "clone by {mode} ({:.12})", template),
        }
    }
}

/// How a clone comes to its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloneMode {
    /// It shares what the template had until it writes there.
    CopyOnWrite,
    /// It has a copy of what the template had.
    Copy,
}

impl fmt::Display for CloneMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CopyOnWrite => "copy-on-write",
            Self::Copy => "copy",
        })
    }
}

/// The folder of one machine: `<state_dir>/<id>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Where the folder of `id` is, whether it exists or not.
    pub fn of(state_dir: &Path, id: &MachineId) -> Self {
        Self {
            path: state_dir.join(id.as_str()),
        }
    }

    /// Makes the folder, and those above it that are missing.
    ///
    /// # Errors
    /// When it exists: a machine is never started over the remains of another.
    pub fn create(state_dir: &Path, id: &MachineId) -> Result<Self, StateError> {
        make_state_dir(state_dir)?;
        let state = Self::of(state_dir, id);
        match DirBuilder::new().mode(0o700).create(&state.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(StateError::Exists {
                id: id.clone(),
                path: state.path,
            }),
            result => result
                .map_err(StateError::io("making the directory", &state.path))
                .map(|()| state),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory in which mount points below [`StateDir::shared`] are made.
    pub fn mount_points(&self) -> PathBuf {
        self.path.join("mount-points")
    }

    /// The directory that the guest sees by virtiofs.
    pub fn shared(&self) -> PathBuf {
        self.path.join("shared")
    }

    /// What the guest printed last.
    pub fn console(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// Replaces the record: whoever reads it sees the old or the new one whole.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub fn write(&self, record: &Record) -> Result<(), StateError> {
        let path = self.path.join(RECORD);
        write_atomically(&path, record)
    }

    /// The record; None if there is no folder, or nothing was recorded in it yet.
    ///
    /// # Errors
    /// When it cannot be read or is no record.
    pub fn read(&self) -> Result<Option<Record>, StateError> {
        let path = self.path.join(RECORD);
        match read_bounded(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| StateError::Record { path, source }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StateError::io("reading", &path)(error)),
        }
    }

    /// Removes the folder and what is in it. Whatever is mounted below [`StateDir::shared`] has to be unmounted before: the
    /// removal stays on the folder's own file system and fails rather than delete files of a mount.
    ///
    /// # Errors
    /// When something in it cannot be removed. A folder that is not there is no error.
    pub fn remove(&self) -> Result<(), StateError> {
        match remove_tree(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.map_err(StateError::io("removing", &self.path)),
        }
    }
}

/// Writes JSON beside `path` and renames it there, readable by root alone. Where there is no room for it nothing is left.
pub(crate) fn write_atomically(path: &Path, value: &impl Serialize) -> Result<(), StateError> {
    let new = path.with_extension("new");
    let write = || {
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(&serde_json::to_vec(value)?)?;
        std::fs::rename(&new, path)
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&new);
        StateError::io("writing", path)(error)
    })
}

pub(crate) fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read;
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(RECORD_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Makes the directory of all machines.
pub(crate) fn make_state_dir(state_dir: &Path) -> Result<(), StateError> {
    let make = || {
        DirBuilder::new().recursive(true).mode(0o711).create(state_dir)?;
        // Not more open than that if it was made by hand: the sockets of machines are in it.
        let mode = std::fs::metadata(state_dir)?.permissions().mode() & 0o777;
        if mode & !0o755 != 0 {
            std::fs::set_permissions(state_dir, Permissions::from_mode(0o755))
        } else {
            Ok(())
        }
    };
    make().map_err(StateError::io("making the directory", state_dir))
}

/// The machines that have a folder, by id.
///
/// # Errors
/// When the directory cannot be read; one that does not exist has no machines.
pub fn machines(state_dir: &Path) -> Result<Vec<MachineId>, StateError> {
    let entries = match std::fs::read_dir(state_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StateError::io("reading the directory", state_dir)(error)),
    };
    let mut ids: Vec<MachineId> = entries
        .flatten()
        .filter(|entry| entry.path().join(RECORD).is_file())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// Like `std::fs::remove_dir_all`, which does not follow links either, but stops at mounts.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;

    fn empty(folder: &Path, device: u64) -> io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let metadata = std::fs::symlink_metadata(entry.path())?;
            if metadata.dev() != device {
                return Err(io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    format!("{} is still mounted", entry.path().display()),
                ));
            }
            if metadata.is_dir() {
                empty(&entry.path(), device)?;
                std::fs::remove_dir(entry.path())?;
            } else {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    let metadata = std::fs::symlink_metadata(path)?;
    empty(path, metadata.dev())?;
    std::fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            id: "pod".into(),
            guest: "reference".into(),
            launcher: ProcessId::of(std::process::id()),
            qemu: Some(ProcessId { pid: 1, start_time: 2 }),
            helpers: vec![Helper {
                name: "virtiofsd".into(),
                process: ProcessId { pid: 3, start_time: 4 },
            }],
            vsock: Some(VsockAddress::Socket("/run/x".into())),
            acceleration: Some(Acceleration::Tcg),
            acceleration_reason: Some("it was asked for".into()),
            origin: Some(Origin::Boot {
                why: "it was asked for".into(),
            }),
            vcpus: 1,
            memory_mib: 512,
            netns: None,
            cgroup: None,
            uid: Some(2_000_000),
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let root = tempfile::tempdir().unwrap();
        let id: MachineId = "pod".parse().unwrap();
        let state = StateDir::create(root.path(), &id).unwrap();
        assert_eq!(state.read().unwrap(), None);
        state.write(&record()).unwrap();
        assert_eq!(state.read().unwrap(), Some(record()));
        assert_eq!(machines(root.path()).unwrap(), std::slice::from_ref(&id));
        assert_eq!(
            std::fs::metadata(state.path()).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert!(matches!(
            StateDir::create(root.path(), &id),
            Err(StateError::Exists { .. })
        ));
        state.remove().unwrap();
        state.remove().unwrap();
        assert_eq!(machines(root.path()).unwrap(), []);
    }

    #[test]
    fn removal_deletes_links_and_not_what_they_point_to() {
        let root = tempfile::tempdir().unwrap();
        let outside = root.path().join("outside");
        std::fs::write(&outside, "kept").unwrap();
        let state = StateDir::create(&root.path().join("machines"), &"pod".parse().unwrap()).unwrap();
        std::fs::create_dir(state.shared()).unwrap();
        std::os::unix::fs::symlink(&outside, state.shared().join("link")).unwrap();
        std::os::unix::fs::symlink(root.path(), state.shared().join("folder")).unwrap();
        state.remove().unwrap();
        assert_eq!(std::fs::read_to_string(outside).unwrap(), "kept");
    }

    #[test]
    fn a_pid_that_was_taken_over_is_not_the_process() {
        let mine = ProcessId::of(std::process::id()).unwrap();
        assert!(mine.is_alive());
        let other = ProcessId {
            start_time: mine.start_time + 1,
            ..mine
        };
        assert!(!other.is_alive());
        assert!(!other.signal(Signal::SIGKILL).unwrap());
    }

    #[test]
    fn an_ended_process_is_gone_even_before_it_is_waited_for() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.signal(Signal::SIGKILL).unwrap());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while process.is_alive() && std::time::Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(!process.is_alive());
        child.wait().unwrap();
        assert!(!process.signal(Signal::SIGKILL).unwrap());
    }
}
