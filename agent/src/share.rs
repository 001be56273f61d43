//! The directory that the host shares. A machine has it by virtiofs; a clone whose memory is shared copy-on-write has no such device,
//! and mounts it by FUSE: this process carries the kernel's requests to a serial port and the host's replies back, and understands
//! neither (linux/fuse.h).

use std::{
    ffi::OsStr,
    fs::{DirBuilder, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt as _, fs::DirBuilderExt},
    },
    path::{Component, Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use coreos_kvm_proto::{SHARE_SERIAL_PORT, SHARED_MOUNT, SHARED_TAG};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use oci_spec::runtime::Spec;
use rustix::fs::{CWD, Mode, OFlags, openat};
use tokio::time::{Instant, sleep};

use crate::{error::AgentError, last_words, serial};

/// The virtiofs device may still be on its way through the kernel.
const DEVICE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(20);

const FUSE: &str = "/dev/fuse";
/// Longest message that the host takes: what virtiofsd lets the kernel write or read at once, and headers. In bytes. The kernel fills
/// as much with what it forgets.
const MESSAGE_MAX: usize = (1 << 20) + 4096;
/// `struct fuse_out_header` of linux/fuse.h: length (u32), error, number of the request.
const REPLY_HEADER: usize = 16;
/// linux/prctl.h; the crate's own constants lack it.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// How the directory comes to the machine: by virtiofs, unless something else is said.
#[derive(Debug, Default)]
pub(crate) struct Share {
    mount: Mutex<Mount>,
    by_serial_port: AtomicBool,
}

/// What there is of a mount by FUSE.
#[derive(Debug, Default)]
enum Mount {
    #[default]
    None,
    /// Its requests wait until it is known who serves them. Whoever would look into it would wait as well.
    Ahead(Waiting),
    Carried,
}

/// Threads that are to begin with a mount's requests and replies.
#[derive(Debug)]
struct Waiting([mpsc::Sender<()>; 2]);

impl Waiting {
    fn begin(&self) {
        for thread in &self.0 {
            // They live as long as the machine.
            let _ = thread.send(());
        }
    }
}

impl Share {
    /// Mounts it, in a template, for those of its clones to which it comes by a serial port: they need not do that any more.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(crate) fn mount_ahead(&self) -> io::Result<()> {
        *self.state() = Mount::Ahead(mount_fuse()?);
        Ok(())
    }

    /// It comes by a serial port.
    pub(crate) fn comes_by_serial_port(&self) {
        self.by_serial_port.store(true, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, Mount> {
        self.mount.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it visible, if it is not; an empty tag shares nothing.
    ///
    /// # Errors
    /// When it cannot be mounted.
    pub(crate) async fn mount(&self, tag: &str) -> Result<(), AgentError> {
        if tag.is_empty() {
            return Ok(());
        }
        let mounted = if self.by_serial_port.load(Ordering::Relaxed) {
            self.carry()
        } else {
            let ahead = std::mem::take(&mut *self.state());
            mount_virtiofs(tag, ahead).await
        };
        mounted.map_err(AgentError::failed(format!(
            "mounting the shared directory {tag} failed"
        )))
    }
}

impl Share {
    fn carry(&self) -> io::Result<()> {
        let mut state = self.state();
        match &*state {
            Mount::None => mount_fuse()?.begin(),
            Mount::Ahead(waiting) => waiting.begin(),
            Mount::Carried => {}
        }
        *state = Mount::Carried;
        Ok(())
    }
}

/// Has the kernel mount here the volumes that a container has in common with others: what it mounts by itself in the mount namespace of
/// one would be another file system than that of the next. Whoever serves the files may not answer, as with [`let_go`].
///
/// # Errors
/// When there is none, or no answer; with its path.
pub(crate) fn mount_volumes(container_id: &str, spec: &Spec) -> Result<(), String> {
    let own = Path::new(SHARED_MOUNT).join(container_id);
    let mounts = spec.mounts().iter().flatten();
    for source in mounts.filter_map(|mount| mount.source().as_ref()) {
        if !source.starts_with(SHARED_MOUNT) || source.starts_with(&own) {
            continue;
        }
        mount_alone(source).map_err(|error| format!("the volume {} cannot be reached: {error}", source.display()))?;
    }
    Ok(())
}

/// Has the kernel mount what is at `path`. What a container mounts in it is not for the others, even if that has the guest's propagation
/// of mounts.
fn mount_alone(path: &Path) -> io::Result<()> {
    // Without reading it, which the host's root may not everywhere (NFS, `root_squash`).
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())?;
    let none = None::<&str>;
    match mount(none, path, none, MsFlags::MS_PRIVATE, none) {
        // It is no mount where all of the share is one, which a container has as its own.
        Ok(()) | Err(nix::Error::EINVAL) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Lets go of what the kernel has mounted by itself at or below folders of the directory: each file system of the host is a mount there, which
/// the host cannot free as long as the guest has it, and which costs time when the guest powers off. Whoever serves the files may not
/// answer: this is nothing for a thread that others wait for. Where nothing is mounted, nobody is asked.
pub(crate) fn let_go(folders: &[PathBuf]) -> io::Result<()> {
    let folders = folders.iter().map(|folder| in_share(folder));
    let folders = folders.collect::<io::Result<Vec<_>>>()?;
    let mounts = std::fs::read("/proc/self/mountinfo")?;
    let lines = mounts.split(|byte| *byte == b'\n');
    // White space is escaped in it (proc_pid_mountinfo(5)). There is none in the names that the host gives, and what is mounted further below
    // goes with what it is below.
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let mut result = Ok(());
    // The last first: to look for one below another that has gone would have the kernel mount that again.
    for point in points
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .map(|point| Path::new(OsStr::from_bytes(point)))
    {
        if !folders.iter().any(|folder| point.starts_with(folder)) {
            continue;
        }
        match umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // It has gone meanwhile, or goes with the one that it is below.
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(error) => result = result.and(Err(error.into())),
        }
    }
    result
}

/// Where a folder of the directory is; the directory itself is none.
fn in_share(folder: &Path) -> io::Result<PathBuf> {
    let is_plain = |part| matches!(part, Component::Normal(_));
    if folder.as_os_str().is_empty() || !folder.components().all(is_plain) {
        let problem = format!("{} is no folder of the shared directory", folder.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, problem));
    }
    Ok(Path::new(SHARED_MOUNT).join(folder))
}

fn make_mount_point() -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(SHARED_MOUNT)
}

/// Mounts virtiofs, in place of what was mounted for those that have none.
async fn mount_virtiofs(tag: &str, in_place_of: Mount) -> io::Result<()> {
    if let Mount::Ahead(_) = in_place_of {
        umount2(SHARED_MOUNT, MntFlags::MNT_DETACH)?;
    }
    make_mount_point()?;
    let deadline = Instant::now() + DEVICE;
    loop {
        match mount(
            Some(tag),
            SHARED_MOUNT,
            Some("virtiofs"),
            MsFlags::empty(),
            None::<&str>,
        ) {
            // No device with that tag, so far.
            Err(nix::Error::EINVAL | nix::Error::ENODEV) if Instant::now() < deadline => sleep(LOOK).await,
            mounted => return Ok(mounted?),
        }
    }
}

/// Mounts with the options that virtiofs has: Documentation/filesystems/fuse.rst.
fn mount_fuse() -> io::Result<Waiting> {
    make_mount_point()?;
    let port = Arc::new(serial::open_port(SHARE_SERIAL_PORT)?);
    let fuse = Arc::new(File::options().read(true).write(true).open(FUSE)?);
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        fuse.as_raw_fd()
    );
    mount(
        Some(SHARED_TAG),
        SHARED_MOUNT,
        Some("fuse"),
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    // Threads of their own, for any other of this process may be the one that waits for a file.
    let [(begin_requests, begun), (begin_replies, replies_begun)] = [mpsc::channel(), mpsc::channel()];
    let (requested, carrier) = (fuse.clone(), port.clone());
    carry("share-requests", move || requests(&requested, &carrier, &begun))?;
    carry("share-replies", move || {
        // Ahead, too.
        let mut buffer = vec![0; MESSAGE_MAX];
        match replies_begun.recv() {
            Ok(()) => replies(&fuse, &port, &mut buffer),
            Err(mpsc::RecvError) => Ok(()),
        }
    })?;
    Ok(Waiting([begin_requests, begin_replies]))
}

fn carry(name: &str, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    let carried = move || {
        // Memory that this thread needs is not to be had by writing files back, which would wait for this thread: prctl(2).
        // SAFETY: prctl(2) with numbers alone. A kernel that does not know it lacks a precaution.
        unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
        if let Err(error) = work() {
            // Whoever waits for a file would wait for ever.
            last_words(&anyhow::Error::new(error).context("carrying the shared directory's files"));
            std::process::exit(1);
        }
    };
    thread.spawn(carried).map(drop)
}

/// Carries requests out, when it is told to begin, until the directory is unmounted.
fn requests(fuse: &File, port: &OwnedFd, begun: &mpsc::Receiver<()>) -> io::Result<()> {
    let mut request = vec![0; MESSAGE_MAX];
    // The first is the kernel's own, made when it mounts.
    let mut next = next_request(fuse, &mut request)?;
    if begun.recv().is_err() {
        return Ok(());
    }
    while let Some(length) = next {
        write_all(port, &request[..length])?;
        next = next_request(fuse, &mut request)?;
    }
    Ok(())
}

/// Reads the next request; None when the directory is unmounted.
fn next_request(mut fuse: &File, request: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match fuse.read(request) {
            Ok(length) => return Ok(Some(length)),
            // Whoever asked does not want to know any more.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

/// Carries replies in. The buffer holds the longest.
fn replies(mut fuse: &File, port: &OwnedFd, buffer: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    loop {
        filled += read(port, &mut buffer[filled..])?;
        let mut begin = 0;
        while let Some(length) = reply(&buffer[begin..filled])? {
            match fuse.write(&buffer[begin..begin + length]) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT)) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(()),
                Err(error) => return Err(error),
            }
            begin += length;
        }
        buffer.copy_within(begin..filled, 0);
        filled -= begin;
    }
}

/// Length of the reply at the beginning of `bytes`; None as long as it is not there in full.
fn reply(bytes: &[u8]) -> io::Result<Option<usize>> {
    let Some(length) = bytes.first_chunk().map(|length| u32::from_ne_bytes(*length)) else {
        return Ok(None);
    };
    match usize::try_from(length) {
        Ok(length) if (REPLY_HEADER..=MESSAGE_MAX).contains(&length) => Ok((length <= bytes.len()).then_some(length)),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a reply of {length} bytes is none"),
        )),
    }
}

fn read(port: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::read(port, buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => return Ok(count),
            Err(nix::Error::EAGAIN) => wait(port, PollFlags::POLLIN)?,
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_all(port: &OwnedFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match nix::unistd::write(port, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(nix::Error::EAGAIN) => wait(port, PollFlags::POLLOUT)?,
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits as long as the host has nothing to say or takes nothing: its own bounds are what ends a machine that hangs.
fn wait(port: &OwnedFd, event: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::new(port.as_fd(), event)], PollTimeout::NONE) {
        Ok(_) | Err(nix::Error::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_the_directory_is_below_it() {
        let volume = in_share(Path::new(".volumes/3")).unwrap();
        assert_eq!(volume, Path::new(SHARED_MOUNT).join(".volumes/3"));
        for other in ["", "/", "/etc", "..", "a/../..", "./"] {
            assert!(in_share(Path::new(other)).is_err(), "{other}");
        }
    }

    #[test]
    fn a_reply_is_carried_when_it_is_there_in_full() {
        let mut bytes = 20_u32.to_ne_bytes().to_vec();
        assert_eq!(reply(&bytes[..3]).unwrap(), None);
        assert_eq!(reply(&bytes).unwrap(), None);
        bytes.resize(30, 0);
        assert_eq!(reply(&bytes).unwrap(), Some(20));
        assert!(reply(&15_u32.to_ne_bytes()).is_err());
        assert!(reply(&u32::MAX.to_ne_bytes()).is_err());
    }
}
