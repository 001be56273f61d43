//! The unprivileged user of one machine's processes. Each machine has one of its own, from the range that the configuration
//! gives, so that a guest that broke out of its QEMU could still not touch another's.
//!
//! A uid is taken by a file `<state_dir>/.uid-<number>` that holds the machine's name. Nothing else on the node has to know
//! the users: no line in /etc/passwd is needed.

use std::{
    fs::{self, File, OpenOptions},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use crate::machine::MachineId;

/// No user for a machine.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    #[error(
        "all {count} users from uid {first} on are taken: end machines, or widen the range by `vm_uid_count` in the configuration"
    )]
    Exhausted { first: u32, count: u32 },
    #[error("{what} {} failed", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl UserError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// Takes a uid for the machine `id`, whose folder in `state_dir` exists already: a uid whose machine has no folder any more
/// is free again. Blocks as long as another process is doing the same, which is a matter of microseconds.
///
/// # Errors
/// When all are taken, or files cannot be written.
pub fn allocate(state_dir: &Path, first: u32, count: u32, id: &MachineId) -> Result<u32, UserError> {
    let _lock = lock(state_dir)?;
    let mut hasher = DefaultHasher::new();
    id.as_str().hash(&mut hasher);
    let start = u32::try_from(hasher.finish() % u64::from(count.max(1))).unwrap_or_default();
    for offset in 0..count {
        let uid = first.saturating_add((start + offset) % count);
        let path = path_of(state_dir, uid);
        if let Ok(owner) = fs::read_to_string(&path) {
            if state_dir.join(&owner).exists() {
                continue;
            }
            fs::remove_file(&path).map_err(UserError::io("removing the file", &path))?;
        }
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(UserError::io("making the file", &path))?;
        return match file.write_all(id.as_str().as_bytes()) {
            Ok(()) => Ok(uid),
            Err(error) => {
                // Without a name in it, it would be taken for ever.
                let _ = fs::remove_file(&path);
                Err(UserError::io("writing the file", &path)(error))
            }
        };
    }
    Err(UserError::Exhausted { first, count })
}

/// Gives the uid back; one that is free already is no error.
///
/// # Errors
/// When its file cannot be removed.
pub fn release(state_dir: &Path, uid: u32) -> Result<(), UserError> {
    let path = path_of(state_dir, uid);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(UserError::io("removing the file", &path)(error)),
        _ => Ok(()),
    }
}

/// A machine's name, which names a folder here, never begins with a dot.
fn path_of(state_dir: &Path, uid: u32) -> PathBuf {
    state_dir.join(format!(".uid-{uid}"))
}

fn lock(state_dir: &Path) -> Result<Flock<File>, UserError> {
    let file = File::open(state_dir).map_err(UserError::io("opening the directory", state_dir))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| UserError::io("locking the directory", state_dir)(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(state_dir: &Path, name: &str) -> MachineId {
        fs::create_dir_all(state_dir.join(name)).unwrap();
        name.parse().unwrap()
    }

    #[test]
    fn no_two_machines_share_a_user() {
        let root = tempfile::tempdir().unwrap();
        let mut uids: Vec<u32> = (0..4)
            .map(|n| allocate(root.path(), 1000, 4, &machine(root.path(), &format!("m{n}"))).unwrap())
            .collect();
        uids.sort_unstable();
        assert_eq!(uids, [1000, 1001, 1002, 1003]);
        let error = allocate(root.path(), 1000, 4, &machine(root.path(), "m4")).unwrap_err();
        assert!(error.to_string().contains("vm_uid_count"), "{error}");
    }

    #[test]
    fn a_user_is_free_again_when_released_or_when_its_machine_is_gone() {
        let root = tempfile::tempdir().unwrap();
        let first = allocate(root.path(), 1000, 1, &machine(root.path(), "a")).unwrap();
        release(root.path(), first).unwrap();
        release(root.path(), first).unwrap();
        allocate(root.path(), 1000, 1, &machine(root.path(), "b")).unwrap();
        fs::remove_dir(root.path().join("b")).unwrap();
        allocate(root.path(), 1000, 1, &machine(root.path(), "c")).unwrap();
    }
}
