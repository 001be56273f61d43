//! What the trials have in common: mounts of their own, the program at work, FUSE messages.
#![allow(dead_code, reason = "each trial uses its own part")]

pub(crate) mod guest;

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tempfile::TempDir;

/// Bytes of the headers of requests and replies.
pub(crate) const IN_HEADER: usize = 40;
pub(crate) const OUT_HEADER: usize = 16;
pub(crate) const ROOT: u64 = 1;

/// Operations, from linux/fuse.h.
pub(crate) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const LSEEK: u32 = 46;
}

/// Runs a trial in a thread with mounts of its own, which end with it and with the processes it has started.
pub(crate) fn with_own_mounts(trial: impl FnOnce() + Send + 'static) {
    let trial = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).expect("the trials need root");
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        trial();
    });
    if let Err(panic) = trial.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A shared directory as the launcher prepares it, with one mount in it: `files`, writable.
pub(crate) struct Directory {
    root: TempDir,
    /// Where the host makes mount points.
    pub(crate) points: PathBuf,
    /// The same, as it is served: read-only.
    pub(crate) shared: PathBuf,
}

impl Directory {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        std::fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let [points, shared, files] = ["points", "shared", "files"].map(|name| root.path().join(name));
        for directory in [&points, &shared, &files] {
            std::fs::create_dir(directory).unwrap();
        }
        let none: Option<&str> = None;
        mount(Some(&points), &shared, none, MsFlags::MS_BIND, none).unwrap();
        mount(none, &shared, none, MsFlags::MS_SHARED, none).unwrap();
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, &shared, none, read_only, none).unwrap();
        let directory = Self { root, points, shared };
        directory.bind(&files, "files");
        directory
    }

    /// A place outside of what is shared.
    pub(crate) fn outside(&self) -> &Path {
        self.root.path()
    }

    /// The files of the mount `files`, on the host.
    pub(crate) fn files(&self) -> PathBuf {
        self.root.path().join("files")
    }

    pub(crate) fn bind(&self, source: &Path, name: &str) {
        let none: Option<&str> = None;
        if source.is_dir() {
            std::fs::create_dir(self.points.join(name)).unwrap();
        } else {
            std::fs::write(self.points.join(name), "").unwrap();
        }
        mount(Some(source), &self.shared.join(name), none, MsFlags::MS_BIND, none).unwrap();
    }

    /// An empty file system of its own.
    pub(crate) fn tmpfs(&self, name: &str, flags: MsFlags) -> PathBuf {
        let target = self.shared.join(name);
        std::fs::create_dir(self.points.join(name)).unwrap();
        mount(Some("tmpfs"), &target, Some("tmpfs"), flags, None::<&str>).unwrap();
        target
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = umount2(&self.shared, MntFlags::MNT_DETACH);
    }
}

/// The program at work, and the guest's end of its socket.
pub(crate) struct Served {
    pub(crate) child: Child,
    pub(crate) socket: UnixStream,
    unique: u64,
}

impl Served {
    pub(crate) fn start(shared: &Path) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // A request that is never answered fails the trial.
        ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        Self {
            child: Self::spawn(theirs.into(), shared),
            socket: ours,
            unique: 0,
        }
    }

    pub(crate) fn spawn(theirs: OwnedFd, shared: &Path) -> Child {
        let number = theirs.as_raw_fd();
        // Or another build: that of a release is what is installed.
        let program = std::env::var_os("COREOS_KVM_SHARE");
        let mut command = Command::new(program.unwrap_or_else(|| env!("CARGO_BIN_EXE_coreos-kvm-share").into()));
        command
            .arg(format!("--fd={number}"))
            .arg(format!("--shared-dir={}", shared.display()))
            .arg("--own=own")
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let inherit = move || {
            // SAFETY: a system call on a number.
            match unsafe { libc::fcntl(number, libc::F_SETFD, 0) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: it makes one system call.
        unsafe { command.pre_exec(inherit) };
        command.spawn().unwrap()
    }

    /// Started, and INIT done.
    pub(crate) fn ready(shared: &Path) -> Self {
        let mut served = Self::start(shared);
        served.init();
        served
    }

    pub(crate) fn init(&mut self) -> Vec<u8> {
        self.call(opcode::INIT, 0, &init()).unwrap()
    }

    pub(crate) fn send(&mut self, message: &[u8]) {
        self.socket.write_all(message).unwrap();
    }

    /// The next reply: its unique number, and its body or error number.
    pub(crate) fn reply(&mut self) -> (u64, Result<Vec<u8>, i32>) {
        let mut header = [0; OUT_HEADER];
        self.socket
            .read_exact(&mut header)
            .expect("the program ended or does not answer");
        let (length, error, unique) = (u32_at(&header, 0), u32_at(&header, 4).cast_signed(), u64_at(&header, 8));
        let mut body = vec![0; length as usize - OUT_HEADER];
        self.socket.read_exact(&mut body).unwrap();
        (unique, if error == 0 { Ok(body) } else { Err(-error) })
    }

    pub(crate) fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.call_as(0, opcode, node, body)
    }

    /// Sends a request of the user and group `id`, and waits for its reply.
    pub(crate) fn call_as(&mut self, id: u32, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        self.unique += 2;
        let message = message(opcode, self.unique, node, id, body);
        self.send(&message);
        let (unique, reply) = self.reply();
        assert_eq!(unique, self.unique);
        reply
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        let reply = self.call(opcode::LOOKUP, parent, &named(&[], &[name]))?;
        Ok(Entry::read(&reply))
    }

    /// Looks up a path below the root.
    pub(crate) fn walk(&mut self, path: &str) -> u64 {
        path.split('/')
            .fold(ROOT, |node, name| self.lookup(node, name).unwrap().node)
    }

    /// Opens what is there, by OPEN or OPENDIR.
    pub(crate) fn open(&mut self, opcode: u32, node: u64, flags: i32) -> Result<u64, i32> {
        let reply = self.call(opcode, node, &words(&[flags.cast_unsigned(), 0]))?;
        Ok(u64_at(&reply, 0))
    }

    /// Closes the connection, and waits: how the program ended, and all it said.
    pub(crate) fn end(self) -> (ExitStatus, String) {
        drop(self.socket);
        ended(self.child)
    }

    /// Waits for the program's end that it has cause for.
    pub(crate) fn ended(self) -> (ExitStatus, String) {
        ended(self.child)
    }
}

fn ended(mut child: Child) -> (ExitStatus, String) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the program does not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status, String::from_utf8(said).unwrap())
}

/// What LOOKUP and its kin tell of a file.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) node: u64,
    /// How long the guest's kernel may take the name, and the attributes, for true, in seconds.
    pub(crate) valid: [u64; 2],
    pub(crate) ino: u64,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
}

impl Entry {
    pub(crate) const SIZE: usize = 128;

    pub(crate) fn read(reply: &[u8]) -> Self {
        Self {
            node: u64_at(reply, 0),
            valid: [u64_at(reply, 16), u64_at(reply, 24)],
            ino: u64_at(reply, 40),
            mode: u32_at(reply, 40 + 60),
            uid: u32_at(reply, 40 + 68),
        }
    }
}

pub(crate) fn message(opcode: u32, unique: u64, node: u64, id: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(IN_HEADER + body.len()).unwrap();
    let mut message = words(&[length, opcode]);
    message.extend(longs(&[unique, node]));
    message.extend(words(&[id, id, std::process::id(), 0]));
    message.extend(body);
    message
}

/// The body of INIT as Linux 6.1 sends it to /dev/fuse.
pub(crate) fn init() -> Vec<u8> {
    let mut body = words(&[7, 37, 0x20000, 0x73ff_fffb]);
    body.resize(64, 0);
    body
}

pub(crate) fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_le_bytes()).collect()
}

/// A structure, followed by names.
pub(crate) fn named(head: &[u8], names: &[&str]) -> Vec<u8> {
    let mut body = head.to_vec();
    for name in names {
        body.extend(name.as_bytes());
        body.push(0);
    }
    body
}

/// `fuse_read_in`, for READ, READDIR and READDIRPLUS.
pub(crate) fn read_in(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [longs(&[handle, offset]), words(&[size, 0, 0, 0, 0, 0])].concat()
}

/// `fuse_write_in`, and data.
pub(crate) fn write_in(handle: u64, offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
    [longs(&[handle, offset]), words(&[size, 0, 0, 0, 0, 0]), data.to_vec()].concat()
}

/// `fuse_create_in`, and the name.
pub(crate) fn create_in(name: &str, flags: i32, mode: u32) -> Vec<u8> {
    named(&words(&[flags.cast_unsigned(), mode, 0, 0]), &[name])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
