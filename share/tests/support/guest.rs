//! The share, mounted by this machine's kernel: two threads carry messages between /dev/fuse and the socket, as the agent does in the guest.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::{fd::AsRawFd, unix::net::UnixStream},
    path::PathBuf,
    thread::JoinHandle,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::{Directory, OUT_HEADER, Served, u32_at, with_own_mounts};

/// The share, mounted as in a guest.
pub(crate) struct Guest {
    served: Option<Served>,
    root: PathBuf,
    carriers: Vec<JoinHandle<()>>,
}

impl Guest {
    fn new(directory: &Directory) -> Self {
        let root = directory.outside().join("guest");
        fs::create_dir(&root).unwrap();
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .expect("this trial needs the kernel's /dev/fuse: modprobe fuse");
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
            device.as_raw_fd()
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("share"), &root, Some("fuse"), flags, Some(options.as_str())).unwrap();
        let served = Served::start(&directory.shared);
        served.socket.set_read_timeout(None).unwrap();
        let carriers = vec![
            carry_requests(device.try_clone().unwrap(), served.socket.try_clone().unwrap()),
            carry_replies(device, served.socket.try_clone().unwrap(), root.clone()),
        ];
        Self {
            served: Some(served),
            root,
            carriers,
        }
    }

    /// A path in the guest.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// Unmounted: the connection is closed, and the program ends without a word.
    fn end(mut self) {
        umount2(&self.root, MntFlags::empty()).unwrap();
        let served = self.served.take().unwrap();
        for carrier in self.carriers.drain(..) {
            carrier.join().unwrap();
        }
        let (status, said) = served.end();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(served) = &mut self.served {
            let _ = umount2(&self.root, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
            let _ = served.child.kill();
            let _ = served.child.wait();
        }
    }
}

fn carry_requests(mut device: File, mut socket: UnixStream) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut request = vec![0; (1 << 20) + 0x2000];
        loop {
            match device.read(&mut request) {
                Ok(length) => {
                    if socket.write_all(&request[..length]).is_err() {
                        return;
                    }
                }
                // A request that was taken back.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                // Unmounted.
                Err(_) => {
                    let _ = socket.shutdown(std::net::Shutdown::Write);
                    return;
                }
            }
        }
    })
}

fn carry_replies(mut device: File, mut socket: UnixStream, root: PathBuf) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut reply = vec![0; OUT_HEADER];
        while socket.read_exact(&mut reply[..OUT_HEADER]).is_ok() {
            let length = u32_at(&reply, 0) as usize;
            reply.resize(length.max(reply.len()), 0);
            socket.read_exact(&mut reply[OUT_HEADER..length]).unwrap();
            // Fails for a request that was taken back.
            let _ = device.write(&reply[..length]);
        }
        // Whoever waits for a reply is to fail, and not to wait for ever.
        let _ = umount2(&root, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
    })
}

/// Runs a trial on a directory with a mount `files`, in the guest and on the host.
pub(crate) fn in_guest(trial: impl FnOnce(&Directory, &Guest) + Send + 'static) {
    with_own_mounts(|| {
        let directory = Directory::new();
        let guest = Guest::new(&directory);
        trial(&directory, &guest);
        guest.end();
    });
}
