//! Mounts that all containers of the pod share.

use std::{
    fs::DirBuilder,
    io,
    os::unix::fs::{DirBuilderExt, chown},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::mount::{MsFlags, mount};

use crate::{error::AgentError, size};

/// Where the pod's /dev/shm is; the host's specifications name it.
pub(crate) const SHM: &str = "/run/coreos-kvm/shm";
/// Where the pod's /dev/mqueue is, for containers that cannot mount it.
pub(crate) const MQUEUE: &str = "/run/coreos-kvm/mqueue";
/// What a container gets where nobody says otherwise, in bytes.
const SHM_SIZE: u64 = 64 * 1024 * 1024;

const FLAGS: MsFlags = MsFlags::MS_NODEV.union(MsFlags::MS_NOSUID).union(MsFlags::MS_NOEXEC);

/// The pod's /dev/shm.
#[derive(Debug, Default)]
pub(crate) struct Shm {
    /// The size that it is mounted with, in bytes.
    mounted: Mutex<Option<u64>>,
}

impl Shm {
    /// Mounts it; a size of 0 is the usual one. One that is there already gets the size. Most have it then, and systemd, which
    /// reads the list of mounts at each change, needs not look.
    pub(crate) fn mount(&self, size: u64) -> Result<(), AgentError> {
        let size = if size == 0 { SHM_SIZE } else { size };
        let mut mounted = self.mounted();
        if *mounted == Some(size) {
            return Ok(());
        }
        set_size(&mut mounted, size)
    }

    /// Has it hold so many bytes at least, as far as the guest's memory reaches.
    pub(crate) fn hold(&self, size: u64) -> Result<(), AgentError> {
        // What is in it stays when its container is killed, and the guest has to live.
        let size = match size > SHM_SIZE {
            true => size.min((size::total_mib()? << 20) / 4 * 3),
            false => size,
        };
        let mut mounted = self.mounted();
        if mounted.is_some_and(|there| there >= size) {
            return Ok(());
        }
        set_size(&mut mounted, size.max(SHM_SIZE))
    }

    fn mounted(&self) -> MutexGuard<'_, Option<u64>> {
        self.mounted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it belong to this user and this group, rather than to the guest's root.
    pub(crate) fn give(&self, (user, group): (u32, u32)) -> Result<(), AgentError> {
        chown(SHM, Some(user), Some(group)).map_err(AgentError::failed("giving the pod its /dev/shm failed"))
    }
}

fn set_size(mounted: &mut Option<u64>, size: u64) -> Result<(), AgentError> {
    let again = match mounted {
        Some(_) => MsFlags::MS_REMOUNT,
        None => {
            make(SHM, 0o1777)?;
            MsFlags::empty()
        }
    };
    let options = format!("mode=1777,size={size}");
    mount(Some("shm"), SHM, Some("tmpfs"), FLAGS | again, Some(options.as_str()))
        .map_err(AgentError::failed("mounting the pod's /dev/shm failed"))?;
    *mounted = Some(size);
    Ok(())
}

/// Makes the pod's /dev/mqueue, which is the guest's.
pub(crate) fn mqueue() -> Result<(), AgentError> {
    make(MQUEUE, 0o755)?;
    mount(Some("mqueue"), MQUEUE, Some("mqueue"), FLAGS, None::<&str>)
        .map_err(AgentError::failed("mounting the pod's /dev/mqueue failed"))
}

fn make(path: &str, mode: u32) -> Result<(), AgentError> {
    let made: io::Result<()> = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(AgentError::failed(format!("making {path} failed")))
}
