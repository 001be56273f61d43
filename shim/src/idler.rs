//! Namespaces that nobody is in but a process that does nothing.

use std::io;

use nix::{
    errno::Errno,
    sched::CloneFlags,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, waitpid},
    },
    unistd::Pid,
};

/// A process that does nothing, and holds namespaces of its own. Dropping it ends it.
pub(crate) struct Idler(Pid);

impl Idler {
    /// Starts it, in new namespaces of these kinds. It ends with the thread that calls this, if not before.
    ///
    /// # Errors
    /// When the node has no room for a further process or namespace.
    pub(crate) fn start(namespaces: CloneFlags) -> io::Result<Self> {
        // Nobody is signalled at its end, so that whoever waits for this process's other children does not meet it (wait(2), "__WCLONE").
        let flags = libc::c_long::from(namespaces.bits());
        let parent = nix::unistd::getpid().as_raw();
        // SAFETY: clone(2) without CLONE_VM and with no stack of its own is a fork. The child calls only what signal-safety(7) allows.
        match unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: prctl(2), getppid(2), close_range(2), _exit(2) and pause(2), of numbers alone.
            0 => unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // Whoever is at the other end of one is to see when it is closed. Linux before 5.9 does not know it.
                libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
                if libc::getppid() != parent {
                    libc::_exit(0);
                }
                loop {
                    libc::pause();
                }
            },
            pid => Ok(Self(Pid::from_raw(i32::try_from(pid).map_err(io::Error::other)?))),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.as_raw().unsigned_abs()
    }
}

impl Drop for Idler {
    fn drop(&mut self) {
        // As long as nobody has waited for it, its pid is its own.
        let _ = kill(self.0, Signal::SIGKILL);
        while let Err(Errno::EINTR) = waitpid(self.0, Some(WaitPidFlag::__WALL)) {}
    }
}
