//! What a container finds at /dev/shm: the pod's own, which is in the guest's memory, or a volume.
//!
//! A volume in memory that is mounted there is to hold more than the 64 MiB that a pod has by itself. As files of the host's, shared with the
//! guest, its pages would be there twice, so that it is the pod's own that becomes as large.

use std::{
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path},
};

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::{error::ShimError, volume::EMPTY_DIR};

/// That of the node, which a pod in the node's IPC namespace is given.
const NODE: &str = "/dev/shm";

/// The size in bytes that the pod's own has to have for a mount at /dev/shm whose source on the host is `source`; 0 for the usual one. None for
/// a volume whose files are to be there.
///
/// # Errors
/// When the host cannot tell what is there.
pub(crate) fn size(source: &Path) -> Result<Option<u64>, ShimError> {
    if source == Path::new(NODE) || is_of_sandbox(source) {
        return Ok(Some(0));
    }
    if source.parent().is_none_or(|parent| !parent.ends_with(EMPTY_DIR)) {
        return Ok(None);
    }
    in_memory(source).map_err(ShimError::while_doing(format!("looking at {}", source.display())))
}

/// containerd's, for a pod: `<state>/sandboxes/<id>/shm` (`getSandboxDevShm` in its internal/cri/server).
fn is_of_sandbox(source: &Path) -> bool {
    let mut parts = source.components().rev();
    parts.next() == Some(Component::Normal("shm".as_ref()))
        && parts.nth(1) == Some(Component::Normal("sandboxes".as_ref()))
}

/// The size of what is mounted there, when that is a tmpfs.
fn in_memory(path: &Path) -> io::Result<Option<u64>> {
    let parent = path.parent().unwrap_or(path);
    if std::fs::metadata(path)?.dev() == std::fs::metadata(parent)?.dev() {
        return Ok(None);
    }
    let filesystem = statfs(path)?;
    let block = u64::try_from(filesystem.block_size()).unwrap_or_default();
    Ok((filesystem.filesystem_type() == TMPFS_MAGIC).then(|| filesystem.blocks() * block))
}

#[cfg(test)]
mod tests {
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

    use super::*;

    #[rstest::rstest]
    #[case::of_the_sandbox("/run/containerd/io.containerd.grpc.v1.cri/sandboxes/3f1a/shm", Some(0))]
    #[case::of_the_node("/dev/shm", Some(0))]
    #[case::of_nobody("/srv/shm", None)]
    #[case::a_folder("/srv/sandboxes/one/data", None)]
    fn the_pods_own_is_told_from_volumes(#[case] source: &str, #[case] expected: Option<u64>) {
        assert_eq!(size(Path::new(source)).unwrap(), expected);
    }

    /// On a thread with a mount namespace of its own, which takes the mount with it.
    #[test]
    fn a_volume_in_memory_tells_how_much_it_holds() {
        let root = tempfile::tempdir().unwrap();
        let volume = root.path().join(EMPTY_DIR).join("cache");
        std::fs::create_dir_all(&volume).unwrap();
        assert_eq!(size(&volume).unwrap(), None, "it is on a disk");
        let mounted = move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            mount(Some("none"), &volume, Some("tmpfs"), MsFlags::empty(), Some("size=12m")).unwrap();
            size(&volume).unwrap()
        };
        assert_eq!(std::thread::spawn(mounted).join().unwrap(), Some(12 << 20));
    }

    #[test]
    fn a_volume_that_is_not_there_is_an_error_that_names_it() {
        let error = size(Path::new("/nowhere/kubernetes.io~empty-dir/cache")).unwrap_err();
        assert!(
            error.to_string().contains("/nowhere/kubernetes.io~empty-dir/cache"),
            "{error}"
        );
    }
}
