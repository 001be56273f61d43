//! A container's files on the host: its root file system and its volumes, mounted where the guest sees them, and nowhere else.

use std::{
    ffi::OsString,
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStringExt, fs::DirBuilderExt},
    },
    path::{Path, PathBuf},
};

use containerd_shim::mount::mount_rootfs;
use containerd_shim_protos::api::Mount;
use nix::mount::{MntFlags, umount2};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::{
    error::ShimError,
    guestspec::{Access, ROOTFS, Volume},
};

/// The two sides of the directory that pod and guest share: the guest can write to neither, only to what is mounted there.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    /// Where mount points are made.
    pub(crate) points: PathBuf,
    /// The same, read-only, as the guest sees it: where things are mounted.
    pub(crate) shared: PathBuf,
}

/// The mounts of one container. Dropping it unmounts them.
#[derive(Debug)]
pub(crate) struct ContainerFiles {
    points: PathBuf,
    shared: PathBuf,
    mounted: Vec<PathBuf>,
}

impl ContainerFiles {
    /// Mounts the root file system (`rootfs` as containerd describes it, or else the directory `root`) and the volumes below
    /// the container's part of the share.
    ///
    /// # Errors
    /// When something cannot be mounted; what was mounted before is unmounted.
    pub(crate) fn mount(
        share: &Share,
        id: &str,
        rootfs: &[Mount],
        root: &Path,
        volumes: &[Volume],
    ) -> Result<Self, ShimError> {
        let mut files = Self {
            points: share.points.join(id),
            shared: share.shared.join(id),
            mounted: Vec::new(),
        };
        make_directory(&files.points, 0o755)?;
        files.mount_root(rootfs, root)?;
        for volume in volumes {
            files.mount_volume(volume)?;
        }
        Ok(files)
    }

    fn mount_root(&mut self, rootfs: &[Mount], root: &Path) -> Result<(), ShimError> {
        make_directory(&self.points.join(ROOTFS), 0o755)?;
        let target = self.shared.join(ROOTFS);
        if rootfs.is_empty() {
            bind(root, &target, Access::Write)
                .map_err(ShimError::while_doing(format!("sharing {}", root.display())))?;
            self.mounted.push(target);
            return Ok(());
        }
        for mount in rootfs {
            let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
            mount_rootfs(kind, Some(&mount.source), &mount.options, &target)
                .map_err(|error| ShimError::Internal(format!("mounting the container's root file system: {error}")))?;
            self.mounted.push(target.clone());
        }
        Ok(())
    }

    fn mount_volume(&mut self, volume: &Volume) -> Result<(), ShimError> {
        let point = self.points.join(&volume.name);
        if let Some(parent) = point.parent() {
            make_directory(parent, 0o755)?;
        }
        let sharing = || format!("sharing {}", volume.source.display());
        let is_directory = std::fs::metadata(&volume.source)
            .map_err(ShimError::while_doing(sharing()))?
            .is_dir();
        if is_directory {
            make_directory(&point, 0o755)?;
        } else {
            File::create(&point).map_err(ShimError::while_doing(format!("making {}", point.display())))?;
        }
        let target = self.shared.join(&volume.name);
        bind(&volume.source, &target, volume.access).map_err(ShimError::while_doing(sharing()))?;
        self.mounted.push(target);
        Ok(())
    }

    /// Unmounts everything and removes the mount points.
    ///
    /// # Errors
    /// The first thing that stays, all having been tried.
    pub(crate) fn unmount(mut self) -> Result<(), ShimError> {
        self.release()
    }

    fn release(&mut self) -> Result<(), ShimError> {
        let mut result = Ok(());
        for target in self.mounted.drain(..).rev() {
            // Lazily: virtiofsd holds files that the guest has open, and forgets them when the guest does.
            let unmounted = umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
            let unmounted = unmounted.map_err(ShimError::while_doing(format!("unmounting {}", target.display())));
            result = result.and(unmounted);
        }
        if result.is_ok() {
            result = remove_mount_points(&self.points)
                .map_err(ShimError::while_doing(format!("removing {}", self.points.display())));
        }
        result
    }
}

impl Drop for ContainerFiles {
    fn drop(&mut self) {
        if self.points.exists()
            && let Err(error) = self.release()
        {
            tracing::warn!(%error, "a container's files stay mounted until its machine ends");
        }
    }
}

/// Binds `source`, with all that is mounted below it, to `target`; it never shows there writable if it is not to be.
fn bind(source: &Path, target: &Path, access: Access) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, source, flags)?;
    match access {
        Access::Write => {}
        Access::Read => set_read_only(&tree, 0)?,
        Access::ReadAll => set_read_only(&tree, libc::AT_RECURSIVE)?,
    }
    Ok(move_mount(
        tree.as_fd(),
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

/// Makes a detached tree read-only, with AT_RECURSIVE all its mounts: mount_setattr(2), which neither rustix nor nix has.
fn set_read_only(tree: &OwnedFd, recursive: libc::c_int) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | recursive;
    // SAFETY: the descriptor is open, the path is an empty C string, and the structure is as long as the size says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Where something is mounted, as this process sees it.
pub(crate) fn mount_points() -> Vec<PathBuf> {
    // Without it nothing can be mounted either.
    let mounts = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    mounts.split(|byte| *byte == b'\n').filter_map(mount_point).collect()
}

/// The fifth field of a line of mountinfo, in which blanks and backslashes are octal: proc(5).
fn mount_point(line: &[u8]) -> Option<PathBuf> {
    let field = line.split(|byte| *byte == b' ').nth(4)?;
    let mut path = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        path.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    Some(OsString::from_vec(path).into())
}

/// Whether one of the mount points is below the path, wherever that leads.
pub(crate) fn is_above(path: &Path, mount_points: &[PathBuf]) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    mount_points
        .iter()
        .any(|point| *point != path && point.starts_with(&path))
}

fn make_directory(path: &Path, mode: u32) -> Result<(), ShimError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(ShimError::while_doing(format!(
            "making the directory {}",
            path.display()
        )))
}

/// Removes what [`ContainerFiles::mount`] has made, level by level: no directory that still has something in it goes, so that
/// no file of a mount is ever taken for a mount point.
fn remove_mount_points(directory: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if !entry.file_type()?.is_dir() {
            std::fs::remove_file(path)?;
            continue;
        }
        if entry.file_name() == "volumes" {
            for volume in std::fs::read_dir(&path)? {
                let volume = volume?;
                if volume.file_type()?.is_dir() {
                    std::fs::remove_dir(volume.path())?;
                } else {
                    std::fs::remove_file(volume.path())?;
                }
            }
        }
        std::fs::remove_dir(path)?;
    }
    std::fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_below_a_path_but_not_at_it() {
        let line = br"36 35 98:0 / /srv/with\040blank/tmpfs rw,noatime master:1 - tmpfs none rw";
        assert_eq!(mount_point(line), Some("/srv/with blank/tmpfs".into()));
        assert_eq!(mount_point(b""), None);
        let there = tempfile::tempdir().unwrap();
        let below = there.path().canonicalize().unwrap().join("below");
        std::fs::create_dir(&below).unwrap();
        let points = [PathBuf::from("/"), below.clone()];
        assert!(is_above(there.path(), &points));
        assert!(!is_above(&below, &points));
        assert!(mount_points().contains(&PathBuf::from("/")));
    }
}
