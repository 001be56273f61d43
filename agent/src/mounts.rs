//! Mounts that all containers of the pod share.

use std::{fs::DirBuilder, io, os::unix::fs::DirBuilderExt, time::Duration};

use coreos_kvm_proto::SHARED_MOUNT;
use nix::mount::{MsFlags, mount};
use tokio::time::{Instant, sleep};

use crate::error::AgentError;

/// The device may still be on its way through the kernel.
const DEVICE: Duration = Duration::from_secs(10);
/// Where the pod's /dev/shm is; the host's specifications name it.
pub(crate) const SHM: &str = "/run/coreos-kvm/shm";
/// What a container gets where nobody says otherwise, in bytes.
const SHM_SIZE: u64 = 64 * 1024 * 1024;

/// Mounts the directory that the host shares; an empty tag shares nothing.
pub(crate) async fn share(tag: &str) -> Result<(), AgentError> {
    if tag.is_empty() {
        return Ok(());
    }
    make(SHARED_MOUNT, 0o755)?;
    let deadline = Instant::now() + DEVICE;
    loop {
        match mount(
            Some(tag),
            SHARED_MOUNT,
            Some("virtiofs"),
            MsFlags::empty(),
            None::<&str>,
        ) {
            Ok(()) => return Ok(()),
            // No device with that tag, so far.
            Err(nix::Error::EINVAL | nix::Error::ENODEV) if Instant::now() < deadline => {
                sleep(Duration::from_millis(20)).await;
            }
            Err(error) => {
                return Err(AgentError::failed(format!(
                    "mounting the shared directory {tag} failed"
                ))(error));
            }
        }
    }
}

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
