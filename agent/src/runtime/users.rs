//! The user namespace of the pod's containers (user_namespaces(7)): there as long as the agent has it open, whoever is in it.
//!
//! Network, IPC and UTS namespaces of the pod are the guest's own and so not of this user namespace, which is why a container cannot
//! mount what belongs to them and gets the guest's instead.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use coreos_kvm_proto::agent as proto;
use libcontainer::syscall::syscall::create_syscall;
use nix::{
    sched::{CloneFlags, setns},
    unistd::{Gid, Pid, Uid, chown, setgroups, setresgid, setresuid},
};
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec, User};
use rustix::fs::{FileType, fchown, fstat};
use serde::{Deserialize, Serialize};

use super::{Order, Target, chain, namespace, run, zygote::Zygote};
use crate::{error::AgentError, mounts};

/// Whom nothing belongs to: `nobody`.
pub(super) const NOBODY: u32 = 65534;

/// One piece of ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdMapping {
    inside: u32,
    outside: u32,
    length: u32,
}

impl IdMapping {
    fn of(message: &proto::IdMapping) -> Result<Self, AgentError> {
        let ends = [message.inside, message.outside].map(|first| first.checked_add(message.length));
        if message.length == 0 || message.inside != 0 || ends.contains(&None) {
            return Err(AgentError::InvalidArgument(format!(
                "{} ids from {} on cannot be those from {} on",
                message.length, message.outside, message.inside
            )));
        }
        Ok(Self {
            inside: message.inside,
            outside: message.outside,
            length: message.length,
        })
    }

    /// What an id is in the guest.
    fn outside(self, inside: u32) -> Option<u32> {
        let offset = inside.checked_sub(self.inside).filter(|offset| *offset < self.length)?;
        self.outside.checked_add(offset)
    }

    /// As uid_map and gid_map of /proc have it.
    fn line(self) -> String {
        format!("{} {} {}\n", self.inside, self.outside, self.length)
    }
}

/// Who is who in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IdMappings {
    uids: IdMapping,
    gids: IdMapping,
}

impl IdMappings {
    /// # Errors
    /// When it cannot be.
    pub(crate) fn of(message: &proto::UserNamespace) -> Result<Self, AgentError> {
        Ok(Self {
            uids: IdMapping::of(&message.uids)?,
            gids: IdMapping::of(&message.gids)?,
        })
    }

    /// Its root, as the guest has it: user and group.
    pub(crate) fn root(self) -> (u32, u32) {
        (self.uids.outside, self.gids.outside)
    }

    /// Gives it to the namespace of a process.
    pub(super) fn write(self, pid: libc::pid_t) -> io::Result<()> {
        std::fs::write(format!("/proc/{pid}/uid_map"), self.uids.line())?;
        std::fs::write(format!("/proc/{pid}/gid_map"), self.gids.line())
    }

    /// Who nobody is in it: the last one, where so many are not mapped.
    pub(super) fn nobody(self) -> (Uid, Gid) {
        let of = |mapping: IdMapping| NOBODY.min(mapping.length - 1);
        (Uid::from_raw(of(self.uids)), Gid::from_raw(of(self.gids)))
    }
}

/// The namespace, kept open.
#[derive(Debug)]
pub(crate) struct Users {
    namespace: OwnedFd,
    mappings: IdMappings,
}

impl Users {
    /// # Errors
    /// When the guest's kernel does not make it.
    pub(crate) async fn make(zygote: &Zygote, mappings: IdMappings) -> Result<Self, AgentError> {
        let failed = |error: io::Error| AgentError::failed("making the pod's user namespace failed")(error);
        let (theirs, ours) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|error| failed(error.into()))?;
        let pid: Pid = run(zygote, &Order::Users(mappings), None, Some(Target::Until(theirs))).await?;
        let namespace = namespace(pid, "user").map_err(failed)?;
        drop(ours);
        Ok(Self { namespace, mappings })
    }

    pub(crate) fn mappings(&self) -> IdMappings {
        self.mappings
    }

    /// The namespace, for who is to be in it.
    pub(crate) fn namespace(&self) -> Result<OwnedFd, AgentError> {
        let namespace = self.namespace.try_clone();
        namespace.map_err(AgentError::failed("the pod's user namespace cannot be used"))
    }
}

/// Becomes the root of a user namespace.
pub(super) fn enter(namespace: BorrowedFd<'_>) -> nix::Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWUSER)?;
    setgroups(&[])?;
    become_root()
}

/// Becomes root of the user namespace that the process is in. It keeps its rights.
pub(super) fn become_root() -> nix::Result<()> {
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}

/// Gives stdin, a terminal, to this user.
pub(super) fn chown_stdin(user: u32) -> rustix::io::Result<()> {
    fchown(io::stdin(), Some(rustix::process::Uid::from_raw(user)), None)
}

/// Has a container be in the namespace, with what it then cannot have of its own. The descriptor has to stay open until it is.
///
/// # Errors
/// When the container is not to be in one, or the calling process cannot take on its limits.
pub(super) fn adapt(spec: &mut Spec, users: BorrowedFd<'_>) -> Result<(), String> {
    let mut linux = spec.linux().clone().unwrap_or_default();
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let own = namespaces
        .iter_mut()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::User);
    let Some(own) = own else {
        return Err("the container is to be outside of the pod's user namespace".to_owned());
    };
    own.set_path(Some(format!("/proc/self/fd/{}", users.as_raw_fd()).into()));
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    let mounts = spec.mounts().clone().unwrap_or_default();
    spec.set_mounts(Some(mounts.into_iter().map(of_the_guest).collect()));
    // libcontainer sets them when it may not raise them any more: setrlimit(2).
    if let Some(mut process) = spec.process().clone() {
        let syscall = create_syscall();
        for limit in process.rlimits().iter().flatten() {
            let set = syscall.set_rlimit(limit);
            set.map_err(|error| format!("setting {:?} failed: {}", limit.typ(), chain(&error)))?;
        }
        process.set_rlimits(None);
        spec.set_process(Some(process));
    }
    Ok(())
}

/// What is of the network and IPC namespaces only who owns those may mount: sysfs(5), mq_overview(7).
fn of_the_guest(mut mount: Mount) -> Mount {
    let (source, read_only) = match mount.typ().as_deref() {
        // With what is mounted below it, which cannot be taken apart: mount_namespaces(7).
        Some("sysfs") => (Path::new("/sys"), "rro"),
        Some("mqueue") => (Path::new(mounts::MQUEUE), "ro"),
        _ => return mount,
    };
    let options = mount.options().clone().unwrap_or_default();
    let options = options.into_iter().map(|option| match option.as_str() {
        "ro" => read_only.to_owned(),
        _ => option,
    });
    mount.set_options(Some(["rbind".to_owned()].into_iter().chain(options).collect()));
    mount
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_owned()));
    mount
}

/// Has the standard streams that are pipes belong to who reads and writes them, who could else not open them by their names,
/// /dev/stdin and the like.
pub(super) fn give_streams(user: &User, users: Option<IdMappings>) {
    let Some(owner) = owner(user, users) else {
        return;
    };
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let is_pipe = fstat(stream).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo);
        // Who is given no stream can use it all the same.
        if is_pipe {
            let _ = fchown(stream, Some(rustix::process::Uid::from_raw(owner)), None);
        }
    }
}

/// The same with the terminal of a container's init that has not been started.
pub(super) fn give_terminal(init: i32, user: &User, users: Option<IdMappings>) {
    if let Some(owner) = owner(user, users) {
        let _ = chown(format!("/proc/{init}/fd/0").as_str(), Some(Uid::from_raw(owner)), None);
    }
}

/// Who the user is in the guest; None for its root, to whom all belongs anyway.
fn owner(user: &User, users: Option<IdMappings>) -> Option<u32> {
    let owner = match users {
        None => Some(user.uid()),
        Some(mappings) => mappings.uids.outside(user.uid()),
    };
    owner.filter(|owner| *owner != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(inside: u32, outside: u32, length: u32) -> proto::IdMapping {
        proto::IdMapping {
            inside,
            outside,
            length,
            ..Default::default()
        }
    }

    #[test]
    fn ids_are_others_outside() {
        let mapping = IdMapping::of(&message(0, 65536, 1000)).unwrap();
        assert_eq!(mapping.outside(0), Some(65536));
        assert_eq!(mapping.outside(999), Some(66535));
        assert_eq!(mapping.outside(1000), None);
        for (inside, outside, length) in [(0, 0, 0), (1, 65536, 10), (0, u32::MAX, 1)] {
            assert!(IdMapping::of(&message(inside, outside, length)).is_err());
        }
    }

    #[test]
    fn nobody_is_somebody_who_is_mapped() {
        let mappings = |length| IdMappings {
            uids: IdMapping::of(&message(0, 65536, length)).unwrap(),
            gids: IdMapping::of(&message(0, 65536, 65536)).unwrap(),
        };
        let nobody = |uid| (Uid::from_raw(uid), Gid::from_raw(NOBODY));
        assert_eq!(mappings(65536).nobody(), nobody(NOBODY));
        assert_eq!(mappings(1000).nobody(), nobody(999));
    }

    #[test]
    fn what_a_container_cannot_mount_is_the_guests() {
        let mount = |kind: &str| {
            let mount = serde_json::json!({
                "destination": "/there", "type": kind, "source": kind, "options": ["nosuid", "ro"],
            });
            serde_json::to_value(of_the_guest(serde_json::from_value(mount).unwrap())).unwrap()
        };
        assert_eq!(mount("proc")["type"], "proc");
        let sys = mount("sysfs");
        assert_eq!((&sys["type"], &sys["source"]), (&"bind".into(), &"/sys".into()));
        assert_eq!(sys["options"], serde_json::json!(["rbind", "nosuid", "rro"]));
        assert_eq!(mount("mqueue")["source"], mounts::MQUEUE);
    }
}
