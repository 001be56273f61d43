//! Mounts that all containers of the pod share.

use std::{fs::DirBuilder, io, os::unix::fs::DirBuilderExt};

use nix::mount::{MsFlags, mount};

use crate::error::AgentError;

/// Where the pod's /dev/shm is; the host's specifications name it.
pub(crate) const SHM: &str = "/run/coreos-kvm/shm";
/// What a container gets where nobody says otherwise, in bytes.
const SHM_SIZE: u64 = 64 * 1024 * 1024;

/// Makes the pod's /dev/shm; a size of 0 is the usual one.
pub(crate) fn shm(size: u64) -> Result<(), AgentError> {
    make(SHM, 0o1777)?;
    let options = format!("mode=1777,size={}", if size == 0 { SHM_SIZE } else { size });
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount(Some("shm"), SHM, Some("tmpfs"), flags, Some(options.as_str()))
        .map_err(AgentError::failed("mounting the pod's /dev/shm failed"))
}

fn make(path: &str, mode: u32) -> Result<(), AgentError> {
    let made: io::Result<()> = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(AgentError::failed(format!("making {path} failed")))
}
