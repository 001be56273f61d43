//! The first process of a process namespace that containers of the pod share, there as long as the machine. It takes over the
//! processes whose parents have gone. The containers see it, so there is nothing in it to look into: no file of the guest, no
//! open descriptor, no right.

use std::{convert::Infallible, fs::File, os::fd::BorrowedFd};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    sys::{
        prctl,
        signal::{SigHandler, Signal, signal},
    },
    unistd::{Gid, Uid, chdir, pause, pivot_root, setgroups, setresgid, setresuid, setsid},
};

use super::{
    ROOT, error_line,
    users::{self, IdMappings, NOBODY},
    zygote::branch,
};

/// Has a process become that process of a process namespace that belongs to a user namespace, which nobody else's containers could
/// have in /proc. Answers the report of it. To be called by a process that ends then: there is no way back.
pub(super) fn hold_among(namespace: BorrowedFd<'_>, users: IdMappings, report: &File) -> String {
    let entered = users::enter(namespace).and_then(|()| unshare(CloneFlags::CLONE_NEWPID));
    let (user, group) = users.nobody();
    let work = || error_line(&hold(user, group));
    match entered
        .map_err(std::io::Error::from)
        .and_then(|()| branch(None, report, &[], work))
    {
        Ok(pid) => format!("pid {pid}\n"),
        Err(error) => error_line(&format!("the first process of the pod could not be made: {error}")),
    }
}

/// Becomes that process, as nobody. Returns only with the reason why that failed.
pub(super) fn hold_for_all() -> String {
    hold(Uid::from_raw(NOBODY), Gid::from_raw(NOBODY))
}

fn hold(user: Uid, group: Gid) -> String {
    match try_hold(user, group) {
        Err(error) => format!("the first process of the pod could not be made: {}", error.desc()),
    }
}

fn try_hold(user: Uid, group: Gid) -> nix::Result<Infallible> {
    prctl::set_name(c"pod")?;
    setsid()?;
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), ROOT, Some("tmpfs"), flags, Some("mode=0555"))?;
    // What is mounted last goes on top, so it is the old root that is then taken away: pivot_root(2).
    chdir(ROOT)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;

    setgroups(&[])?;
    setresgid(group, group, group)?;
    setresuid(user, user, user)?;
    prctl::set_no_new_privs()?;
    // The kernel then keeps nothing of those that end: sigaction(2), SIGCHLD.
    // SAFETY: no handler is set.
    unsafe { signal(Signal::SIGCHLD, SigHandler::SigIgn) }?;
    // SAFETY: nothing is done any more that needs one of them.
    unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
    loop {
        pause();
    }
}
