//! A further process of a container.
//!
//! libcontainer has this as well, but what it makes is outside the container's seccomp filter. So what a process needs before
//! it executes its program is put together here, from libcontainer's parts, and in the order of its own init.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{BorrowedFd, IntoRawFd},
        unix::{ffi::OsStrExt, net::UnixStream},
    },
    path::{Path, PathBuf},
};

use libcontainer::{
    capabilities,
    syscall::{Syscall, syscall::create_syscall},
    tty,
};
use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    sys::{prctl, stat},
    unistd::{Gid, Uid, chdir, execve, getcwd, setgroups, setsid},
};
use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::{
    SPEC,
    adapt::adapt_process,
    chain, seccomp,
    users::{IdMappings, become_root, chown_stdin, give_streams},
};
use crate::passwd;

/// Makes the calling process, which is in the container's cgroup and PID namespace, one of the container. Returns only with the
/// reason why that failed.
pub(super) fn join(
    init: BorrowedFd<'_>,
    bundle: &Path,
    process: &Path,
    console: Option<&Path>,
    users: Option<IdMappings>,
) -> String {
    match try_join(init, bundle, process, console, users) {
        Err(error) => error,
    }
}

fn try_join(
    init: BorrowedFd<'_>,
    bundle: &Path,
    process: &Path,
    console: Option<&Path>,
    users: Option<IdMappings>,
) -> Result<Infallible, String> {
    let spec = Spec::load(bundle.join(SPEC)).map_err(|error| chain(&error))?;
    let mut process: Process = std::fs::read(process)
        .and_then(|text| Ok(serde_json::from_slice(&text)?))
        .map_err(|error| format!("the process's specification cannot be read: {error}"))?;
    adapt_process(&mut process, console.is_some());
    let syscall = create_syscall();
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().as_ref());
    let filter = profile.map(|profile| seccomp::filter(bundle, profile)).transpose()?;
    let apply_filter = || filter.as_ref().map_or(Ok(()), seccomp::Filter::apply);
    let unfiltered = "applying the seccomp filter failed";
    let console = console
        .map(UnixStream::connect)
        .transpose()
        .map_err(failed("connecting to the console socket failed"))?;

    // Nobody in the container may look into this process before it is one of them. The kernel forbids what comes first to
    // processes that are so protected.
    if let Some(score) = process.oom_score_adj() {
        std::fs::write("/proc/self/oom_score_adj", score.to_string())
            .map_err(failed("setting the OOM score failed"))?;
    }
    prctl::set_dumpable(false).map_err(failed("protecting the new process failed"))?;
    setsid().map_err(failed("starting a session failed"))?;
    for limit in process.rlimits().iter().flatten() {
        syscall
            .set_rlimit(limit)
            .map_err(|error| format!("setting {:?} failed: {}", limit.typ(), chain(&error)))?;
    }
    give_streams(process.user(), users);
    setns(init, namespaces(&spec)).map_err(failed("entering the container failed"))?;
    if users.is_some() {
        // Who is nobody there would own the terminal.
        become_root().map_err(failed("becoming root of the container failed"))?;
    }
    if let Some(console) = console {
        // It closes the socket itself.
        let console = console.into_raw_fd();
        tty::setup_console(syscall.as_ref(), console, false).map_err(|error| chain(&error))?;
        // Who is not given it can use it all the same, but not open it by its name.
        let _ = chown_stdin(process.user().uid());
    }

    let privileges_stay = process.no_new_privileges() != Some(true);
    if !privileges_stay {
        prctl::set_no_new_privs().map_err(failed("forbidding new privileges failed"))?;
    }
    if let Some(umask) = process.user().umask() {
        stat::umask(stat::Mode::from_bits_truncate(umask));
    }
    // With the rights of root, unless they do not help on the file system at hand.
    let entered = chdir(process.cwd());
    if !matches!(entered, Ok(()) | Err(Errno::EPERM | Errno::EACCES)) {
        enter_folder(process.cwd())?;
    }
    become_user(&process, syscall.as_ref())?;
    syscall.close_range(0).map_err(|error| chain(&error))?;

    // Without no_new_privs it takes a capability that the process is about to lose.
    if privileges_stay {
        apply_filter().map_err(failed(unfiltered))?;
    }
    capabilities::reset_effective(syscall.as_ref()).map_err(|error| chain(&error))?;
    if let Some(wanted) = process.capabilities() {
        capabilities::drop_privileges(wanted, syscall.as_ref()).map_err(|error| chain(&error))?;
    }
    if entered.is_err() {
        enter_folder(process.cwd())?;
    }
    // A folder outside the container has no absolute path in it.
    if !getcwd().is_ok_and(|path| path.is_absolute()) {
        return Err(format!("{} is not in the container", process.cwd().display()));
    }
    let program = Program::new(&process)?;
    if !privileges_stay {
        apply_filter().map_err(failed(unfiltered))?;
    }
    Err(program.execute())
}

fn failed<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {}", error.into())
}

/// All namespaces that the container has of its own; the PID namespace has been entered by being forked.
fn namespaces(spec: &Spec) -> CloneFlags {
    let all = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    all.into_iter()
        .flatten()
        .map(|namespace| match namespace.typ() {
            LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
            LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
            LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
            LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
            LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
            LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
            LinuxNamespaceType::Time => CloneFlags::from_bits_retain(libc::CLONE_NEWTIME),
            LinuxNamespaceType::Pid => CloneFlags::empty(),
        })
        .collect()
}

fn enter_folder(path: &Path) -> Result<(), String> {
    chdir(path).map_err(|error| {
        format!(
            "the working directory {} cannot be entered: {}",
            path.display(),
            error.desc()
        )
    })
}

/// Takes on user and groups, and keeps the capabilities, of which the process gets its own only then.
fn become_user(process: &Process, syscall: &dyn Syscall) -> Result<(), String> {
    let user = process.user();
    let groups: Vec<Gid> = user
        .additional_gids()
        .iter()
        .flatten()
        .copied()
        .map(Gid::from_raw)
        .collect();
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setgroups(&groups).map_err(failed("setting the supplementary groups failed"))?;
    prctl::set_keepcaps(true).map_err(failed("keeping the capabilities failed"))?;
    nix::unistd::setresgid(gid, gid, gid).map_err(failed("setting the group failed"))?;
    nix::unistd::setresuid(uid, uid, uid).map_err(failed("setting the user failed"))?;
    if !uid.is_root() {
        capabilities::reset_effective(syscall).map_err(|error| chain(&error))?;
    }
    prctl::set_keepcaps(false).map_err(failed("the capabilities cannot be given up"))
}

/// What is executed in the end.
struct Program {
    name: String,
    /// Where it may be, in order.
    paths: Vec<CString>,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Program {
    fn new(process: &Process) -> Result<Self, String> {
        let arguments = process.args().clone().unwrap_or_default();
        let Some(name) = arguments.first().cloned() else {
            return Err("the process has no program".to_owned());
        };
        let mut environment = process.env().clone().unwrap_or_default();
        let has_home = environment
            .iter()
            .any(|variable| variable.strip_prefix("HOME=").is_some_and(|home| !home.is_empty()));
        if !has_home {
            environment.retain(|variable| !variable.starts_with("HOME="));
            environment.push(format!("HOME={}", passwd::home(Path::new("/"), process.user().uid())));
        }
        let search = environment.iter().find_map(|variable| variable.strip_prefix("PATH="));
        let paths: Vec<PathBuf> = if name.contains('/') {
            vec![PathBuf::from(&name)]
        } else {
            let folders = search
                .unwrap_or_default()
                .split(':')
                .filter(|folder| !folder.is_empty());
            folders.map(|folder| Path::new(folder).join(&name)).collect()
        };
        let text = |bytes: &OsStr| {
            CString::new(bytes.as_bytes()).map_err(|_| "an argument or a variable contains a NUL".to_owned())
        };
        let texts = |all: &[String]| all.iter().map(|one| text(one.as_ref())).collect::<Result<Vec<_>, _>>();
        Ok(Self {
            paths: paths
                .iter()
                .map(|path| text(path.as_os_str()))
                .collect::<Result<_, _>>()?,
            arguments: texts(&arguments)?,
            environment: texts(&environment)?,
            name,
        })
    }

    /// Returns only with the reason why that failed.
    fn execute(&self) -> String {
        let mut denied = None;
        for path in &self.paths {
            match execve(path, &self.arguments, &self.environment) {
                Ok(never) => match never {},
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(error) => denied = denied.or(Some(error)),
            }
        }
        let reason = match denied {
            Some(error) => error.desc(),
            None if self.name.contains('/') => Errno::ENOENT.desc(),
            None => "executable file not found in $PATH",
        };
        format!("exec: {:?}: {reason}", self.name)
    }
}
