//! The directory that pod and guest share: its host side, and virtiofsd that serves it.
//!
//! virtiofsd runs as root, for the files of containers have any owner; it has left all capabilities but those for that, sits in
//! namespaces and a root directory of its own, and its seccomp filter kills it at the first call that it should not make.
//! Names from the guest never lead out: it walks them relative to the directory and follows no link.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use crate::{
    program::{self, ProgramError},
    qemu::process::{Confinement, Process, ProcessError},
};

/// The share cannot be provided.
#[derive(Debug, thiserror::Error)]
pub enum VirtioFsError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("{what} {} failed", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl VirtioFsError {
    fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            what,
            path,
            source: source.into(),
        }
    }
}

/// Makes the two sides of the share: `points`, in which the host makes mount points, and `shared`, the same directory as the
/// guest sees it: read-only, lest the guest put a link where the host is about to mount something. What is mounted below
/// `shared` later shows in virtiofsd's namespace as well, and is writable or not as it was mounted.
///
/// # Errors
/// Of mkdir(2) and mount(2).
pub fn prepare(points: &Path, shared: &Path) -> Result<(), VirtioFsError> {
    for directory in [points, shared] {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(VirtioFsError::io("making the directory", directory))?;
    }
    let none: Option<&str> = None;
    mount(Some(points), shared, none, MsFlags::MS_BIND, none)
        .map_err(VirtioFsError::io("making a mount of", shared))?;
    // Private first, so that the mount leaves the peer group of whatever it was bound from.
    for propagation in [MsFlags::MS_PRIVATE, MsFlags::MS_SHARED] {
        mount(none, shared, none, propagation, none)
            .map_err(VirtioFsError::io("setting the propagation of", shared))?;
    }
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, shared, none, read_only, none).map_err(VirtioFsError::io("making read-only", shared))?;
    Ok(())
}

/// A running virtiofsd.
#[derive(Debug)]
pub struct VirtioFs {
    pub process: Process,
    /// A connection to it that QEMU takes over; virtiofsd ends when it is closed.
    pub connection: OwnedFd,
}

impl VirtioFs {
    /// Starts `program`, the configuration's virtiofsd, on the prepared directory `shared`. `socket` is a path that is free, for
    /// a moment. The confinement's uid is to be None: see above.
    ///
    /// # Errors
    /// When the program is missing or does not start.
    pub fn start(
        program: &Path,
        shared: &Path,
        socket: &Path,
        confinement: Confinement,
    ) -> Result<Self, VirtioFsError> {
        let program = program::find("virtiofsd", "virtiofsd", program)?;
        let listener = UnixListener::bind(socket).map_err(VirtioFsError::io("listening at", socket))?;
        // It waits in the listener's queue until virtiofsd takes it.
        let connection = UnixStream::connect(socket);
        std::fs::remove_file(socket).map_err(VirtioFsError::io("removing", socket))?;
        let connection = connection.map_err(VirtioFsError::io("connecting to", socket))?;

        let listener = OwnedFd::from(listener);
        let arguments = [
            format!("--fd={}", listener.as_raw_fd()),
            format!("--shared-dir={}", shared.display()),
            "--sandbox=namespace".to_owned(),
            "--seccomp=kill".to_owned(),
            // The host changes files under the guest (ConfigMaps), so the guest asks again after a second.
            "--cache=auto".to_owned(),
            "--xattr".to_owned(),
            // Each mount keeps its own device number: without it, equal inode numbers of two layers would be one file.
            "--announce-submounts".to_owned(),
            "--log-level=warn".to_owned(),
        ];
        let process = Process::start(&program, &arguments.map(Into::into), vec![listener], confinement)?;
        Ok(Self {
            process,
            connection: connection.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::mount::{MntFlags, umount2};

    #[test]
    fn mounts_below_the_directory_show_in_another_mount_namespace() {
        let root = tempfile::tempdir().unwrap();
        let (points, shared) = (root.path().join("points"), root.path().join("shared"));
        prepare(&points, &shared).unwrap();
        assert!(
            std::fs::create_dir(shared.join("inside")).is_err(),
            "the share itself is writable"
        );
        // A namespace that receives mounts, as virtiofsd's does, held by a process that waits for its stdin to end.
        let mut holder = std::process::Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "slave",
                "sh",
                "-c",
                "echo; cat; cat /proc/self/mountinfo",
            ])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = holder.stdout.take().unwrap();
        std::io::Read::read_exact(&mut stdout, &mut [0]).unwrap();
        let inside = shared.join("inside");
        std::fs::create_dir(points.join("inside")).unwrap();
        mount(Some("tmpfs"), &inside, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        drop(holder.stdin.take());
        let mut seen = String::new();
        std::io::Read::read_to_string(&mut stdout, &mut seen).unwrap();
        holder.wait().unwrap();
        umount2(&inside, MntFlags::MNT_DETACH).unwrap();
        umount2(&shared, MntFlags::MNT_DETACH).unwrap();
        assert!(seen.contains(&format!(" {} ", inside.display())), "{seen}");
    }
}
