//! All containers of the pod, and the processes in them.

use std::{
    collections::HashMap,
    fs::{DirBuilder, OpenOptions},
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use coreos_kvm_proto::{GUEST_CONTAINER_ID, agent::Streams};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use oci_spec::runtime::{LinuxResources, Process as ProcessSpec};

use crate::{
    cgroup::{self, Others},
    error::AgentError,
    process::Process,
    reaper::{Exit, ExitWatch, Reaper},
    runtime::{
        self, ConsoleSocket, Order, Target,
        users::{IdMappings, Users},
        zygote::Zygote,
    },
};

type Key = (String, String);

/// All processes, by container and exec.
pub(crate) struct Containers {
    reaper: Reaper,
    zygote: Zygote,
    /// The agent's part of the cgroup hierarchy.
    cgroup: PathBuf,
    processes: Mutex<HashMap<Key, Arc<Process>>>,
    /// How many terminals there have been.
    consoles: AtomicU64,
    /// The process namespace that containers share, once there is one.
    shared: tokio::sync::Mutex<Option<SharedProcesses>>,
    /// The user namespace that all containers are in, if they are in one.
    users: OnceLock<Users>,
}

/// A process namespace that lasts as long as its first process.
struct SharedProcesses {
    end: ExitWatch,
    namespace: OwnedFd,
}

/// Whose process namespace a container is in.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Processes<'a> {
    Own,
    Pod,
    Container(&'a str),
}

/// Processes that have not been started: what they are to run.
const PREPARED: &str = "prepared";
const BUNDLES: &str = "bundles";
const CONSOLES: &str = "consoles";

impl Containers {
    pub(crate) fn new(reaper: Reaper, zygote: Zygote, cgroup: PathBuf) -> Self {
        Self {
            reaper,
            zygote,
            cgroup,
            processes: Mutex::default(),
            consoles: AtomicU64::default(),
            shared: tokio::sync::Mutex::default(),
            users: OnceLock::new(),
        }
    }

    /// Makes the user namespace of all containers. Once, before there is one.
    ///
    /// # Errors
    /// When the guest's kernel does not make it.
    pub(crate) async fn make_users(&self, mappings: IdMappings) -> Result<(), AgentError> {
        let users = Users::make(&self.zygote, mappings).await?;
        self.users
            .set(users)
            .map_err(|_| AgentError::AlreadyExists("the pod has a user namespace already".to_owned()))
    }

    /// The user namespace for a process that is to be in it, and who is who there.
    fn users(&self) -> Result<(Option<OwnedFd>, Option<IdMappings>), AgentError> {
        let users = self.users.get();
        Ok((users.map(Users::namespace).transpose()?, users.map(Users::mappings)))
    }

    pub(crate) fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>, AgentError> {
        let found = self.processes().get(&key(container_id, exec_id)).cloned();
        found.ok_or_else(|| {
            AgentError::NotFound(if exec_id.is_empty() {
                format!("there is no container {container_id}")
            } else {
                format!("there is no process {exec_id} in container {container_id}")
            })
        })
    }

    /// Makes a container and its init, which then waits for [`Self::start`].
    pub(crate) async fn create(
        &self,
        id: &str,
        spec: &[u8],
        streams: Streams,
        processes: Processes<'_>,
    ) -> Result<u32, AgentError> {
        check_name(id)?;
        check_json("container", spec)?;
        let process = self.insert(id, "", streams)?;
        let result = self.create_with(id, spec, &process, processes).await;
        if result.is_err() {
            if let Err(error) = self.unmake(id).await {
                tracing::warn!(container_id = id, %error, "something stays of a container that could not be made");
            }
            self.remove(id, "");
        }
        result
    }

    async fn create_with(
        &self,
        id: &str,
        spec: &[u8],
        process: &Process,
        processes: Processes<'_>,
    ) -> Result<u32, AgentError> {
        let processes = match processes {
            Processes::Own => None,
            Processes::Pod => Some(self.shared_processes().await?),
            Processes::Container(id) => Some(runtime::process_namespace(self.running(id)?)?),
        };
        let bundle = folder(BUNDLES)?.join(id);
        DirBuilder::new()
            .mode(0o700)
            .create(&bundle)
            .map_err(AgentError::failed("making the bundle's folder failed"))?;
        make_folder(&runtime::records())?;
        write_secret(&bundle.join(runtime::SPEC), spec)?;
        let since = Instant::now();
        let (users, mappings) = self.users()?;
        let has_processes = processes.is_some();
        let order = |console| Order::Create {
            id: id.to_owned(),
            bundle,
            cgroup: self.cgroup.join(id),
            console,
            processes: has_processes,
            users: mappings,
        };
        let target = Target::Namespaces { processes, users };
        let pid = self.run(order, process, Some(target)).await?;
        process.made(pid, &self.reaper, since, false);
        Ok(pid.as_raw().unsigned_abs())
    }

    /// The process namespace that containers share.
    async fn shared_processes(&self) -> Result<OwnedFd, AgentError> {
        let failed = AgentError::failed::<io::Error>("the pod's process namespace cannot be used");
        let mut shared = self.shared.lock().await;
        // One whose first process has been killed is of no more use.
        if let Some(shared) = shared.as_ref().filter(|shared| shared.end.borrow().is_none()) {
            return shared.namespace.try_clone().map_err(failed);
        }
        make_folder(Path::new(runtime::ROOT))?;
        let since = Instant::now();
        let (users, mappings) = self.users()?;
        let target = Target::Namespaces { processes: None, users };
        let pid = runtime::run(&self.zygote, &Order::Hold { users: mappings }, None, Some(target)).await?;
        let made = SharedProcesses {
            end: self.reaper.watch(pid, since),
            namespace: runtime::process_namespace(pid)?,
        };
        shared.insert(made).namespace.try_clone().map_err(failed)
    }

    /// The pid of a container's init.
    fn running(&self, id: &str) -> Result<Pid, AgentError> {
        let init = self.process(id, "")?;
        match init.pid() {
            Some(pid) if init.is_running() => Ok(pid),
            _ => Err(AgentError::FailedPrecondition(format!("container {id} does not run"))),
        }
    }

    /// Has `process` made by the runtime, and connects its streams.
    async fn run(
        &self,
        order: impl FnOnce(Option<PathBuf>) -> Order,
        process: &Process,
        target: Option<Target>,
    ) -> Result<Pid, AgentError> {
        let console = if process.has_terminal() {
            // Names may be too long for the path of a socket.
            let number = self.consoles.fetch_add(1, Ordering::Relaxed);
            let path = folder(CONSOLES)?.join(number.to_string());
            Some(ConsoleSocket::bind(path).map_err(AgentError::failed("making the console socket failed"))?)
        } else {
            None
        };
        let stdio = process
            .make_pipes()
            .map_err(AgentError::failed("making the streams' pipes failed"))?;
        let order = order(console.as_ref().map(|console| console.path().to_owned()));
        let pid = runtime::run(&self.zygote, &order, Some(stdio), target).await?;
        if let Some(console) = console {
            let master = console
                .receive()
                .map_err(AgentError::failed("the terminal did not arrive"))?;
            process
                .take_terminal(master)
                .map_err(AgentError::failed("taking the terminal failed"))?;
        }
        Ok(pid)
    }

    /// Prepares a further process of a running container.
    pub(crate) fn prepare(
        &self,
        container_id: &str,
        exec_id: &str,
        spec: &[u8],
        streams: Streams,
    ) -> Result<(), AgentError> {
        check_name(exec_id)?;
        if container_id != GUEST_CONTAINER_ID && !self.process(container_id, "")?.is_running() {
            return Err(AgentError::FailedPrecondition(format!(
                "container {container_id} does not run"
            )));
        }
        check_json("process", spec)?;
        self.insert(container_id, exec_id, streams)?;
        let written = prepared(container_id, exec_id).and_then(|path| write_secret(&path, spec));
        if written.is_err() {
            self.remove(container_id, exec_id);
        }
        written
    }

    /// Runs what was created or prepared.
    pub(crate) async fn start(&self, container_id: &str, exec_id: &str) -> Result<u32, AgentError> {
        let process = self.process(container_id, exec_id)?;
        if process.has_started() {
            return Err(AgentError::FailedPrecondition(
                "the process has been started already".to_owned(),
            ));
        }
        if exec_id.is_empty() {
            let order = Order::Start {
                id: container_id.to_owned(),
            };
            runtime::run(&self.zygote, &order, None, None).await?;
            process.started();
        } else {
            let path = prepared(container_id, exec_id)?;
            let since = Instant::now();
            let pid = if container_id == GUEST_CONTAINER_ID {
                spawn_in_guest(&path, &process)?
            } else {
                self.join(container_id, &path, &process).await?
            };
            process.made(pid, &self.reaper, since, true);
            let _ = std::fs::remove_file(path);
        }
        Ok(process.pid().map_or(0, |pid| pid.as_raw().unsigned_abs()))
    }

    async fn join(&self, id: &str, spec: &Path, process: &Process) -> Result<Pid, AgentError> {
        let target = runtime::target(self.running(id)?, &self.cgroup_directory(id))?;
        let bundle = folder(BUNDLES)?.join(id);
        let order = |console| Order::Join {
            bundle,
            process: spec.to_owned(),
            console,
            users: self.users.get().map(Users::mappings),
        };
        self.run(order, process, Some(target)).await
    }

    /// How the process ended, and whether its container has seen an OOM kill. With an init end all processes of its container, be
    /// it in a process namespace of its own or not.
    pub(crate) async fn wait(&self, container_id: &str, exec_id: &str) -> Result<(Exit, bool), AgentError> {
        let exit = self.process(container_id, exec_id)?.wait().await?;
        if exec_id.is_empty()
            && let Err(error) = cgroup::kill(&self.cgroup_directory(container_id))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(container_id, %error, "processes of a container outlive its init");
        }
        Ok((exit, cgroup::oom_killed(&self.cgroup_directory(container_id))))
    }

    pub(crate) fn signal(&self, container_id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), AgentError> {
        let process = self.process(container_id, exec_id)?;
        if !all {
            return process.signal(signal);
        }
        let signal = i32::try_from(signal)
            .ok()
            .and_then(|number| Signal::try_from(number).ok());
        let signal = signal.ok_or_else(|| AgentError::InvalidArgument("this is no signal".to_owned()))?;
        for pid in self.pids(container_id)? {
            match kill(Pid::from_raw(pid.cast_signed()), signal) {
                Ok(()) | Err(nix::Error::ESRCH) => {}
                Err(error) => return Err(AgentError::failed("a signal could not be sent")(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn resize(&self, container_id: &str, exec_id: &str, columns: u32, rows: u32) -> Result<(), AgentError> {
        self.process(container_id, exec_id)?.resize(columns, rows)
    }

    /// Forgets a process that has ended or never ran; with an init goes its container.
    pub(crate) async fn delete(&self, container_id: &str, exec_id: &str) -> Result<Exit, AgentError> {
        let process = self.process(container_id, exec_id)?;
        if process.is_running() {
            return Err(AgentError::FailedPrecondition("the process still runs".to_owned()));
        }
        if exec_id.is_empty() {
            self.unmake(container_id).await?;
        } else if let Ok(path) = prepared(container_id, exec_id) {
            let _ = std::fs::remove_file(path);
        }
        process.forgotten().cancel();
        self.remove(container_id, exec_id);
        Ok(process.exit().unwrap_or_else(|| Exit::now(0)))
    }

    /// Removes what there is of a container.
    async fn unmake(&self, id: &str) -> Result<(), AgentError> {
        let order = Order::Delete { id: id.to_owned() };
        let unmade = runtime::run(&self.zygote, &order, None, None).await;
        remove_files(id);
        unmade.map(drop)
    }

    /// Processes of a container, as pids of the guest.
    pub(crate) fn pids(&self, container_id: &str) -> Result<Vec<u32>, AgentError> {
        self.process(container_id, "")?;
        cgroup::pids(&self.cgroup_directory(container_id))
            .map_err(AgentError::failed("listing the container's processes failed"))
    }

    pub(crate) fn freeze(&self, container_id: &str, frozen: bool) -> Result<(), AgentError> {
        self.process(container_id, "")?;
        cgroup::freeze(&self.cgroup_directory(container_id), frozen).map_err(AgentError::failed(
            "the container's processes could not be halted or released",
        ))
    }

    pub(crate) fn update(&self, container_id: &str, resources: &[u8]) -> Result<(), AgentError> {
        self.process(container_id, "")?;
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| AgentError::InvalidArgument(format!("the limits cannot be read: {error}")))?;
        let config = libcgroups::common::CgroupConfig {
            cgroup_path: self.cgroup.join(container_id),
            systemd_cgroup: false,
            container_name: container_id.to_owned(),
        };
        let options = libcgroups::common::ControllerOpt {
            resources: &resources,
            disable_oom_killer: false,
            oom_score_adj: None,
            freezer_state: None,
        };
        use libcgroups::common::CgroupManager as _;
        libcgroups::common::create_cgroup_manager(config)
            .map_err(|error| failed("the container's cgroup is not there", &error))?
            .apply(&options)
            .map_err(|error| failed("the limits could not be set", &error))
    }

    /// Sets aside whatever else the guest runs.
    pub(crate) fn set_others_aside(&self) -> Others {
        Others::set_aside(&self.cgroup)
    }

    /// The directory of a container's cgroup.
    pub(crate) fn cgroup_directory(&self, container_id: &str) -> PathBuf {
        cgroup::directory(&self.cgroup.join(container_id))
    }

    fn insert(&self, container_id: &str, exec_id: &str, streams: Streams) -> Result<Arc<Process>, AgentError> {
        let mut processes = self.processes();
        let key = key(container_id, exec_id);
        if processes.contains_key(&key) {
            return Err(AgentError::AlreadyExists(format!(
                "{} exists already",
                if exec_id.is_empty() { container_id } else { exec_id }
            )));
        }
        let process = Arc::new(Process::new(streams));
        processes.insert(key, process.clone());
        Ok(process)
    }

    fn remove(&self, container_id: &str, exec_id: &str) {
        self.processes().remove(&key(container_id, exec_id));
    }

    fn processes(&self) -> MutexGuard<'_, HashMap<Key, Arc<Process>>> {
        // Every change leaves the map whole.
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(container_id: &str, exec_id: &str) -> Key {
    (container_id.to_owned(), exec_id.to_owned())
}

/// Names become files' names.
fn check_name(name: &str) -> Result<(), AgentError> {
    let valid = name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+'));
    if valid && !name.starts_with('.') && !name.is_empty() && name.len() <= 128 && name != GUEST_CONTAINER_ID {
        Ok(())
    } else {
        Err(AgentError::InvalidArgument(format!("{name:?} cannot be a name")))
    }
}

fn failed(what: &str, error: &dyn std::error::Error) -> AgentError {
    AgentError::Failed {
        what: what.to_owned(),
        cause: runtime::chain(error),
    }
}

/// Whoever runs it reads it for what it says; here it only has to be JSON.
fn check_json(what: &str, text: &[u8]) -> Result<(), AgentError> {
    serde_json::from_slice(text)
        .map(|serde::de::IgnoredAny| ())
        .map_err(|error| AgentError::InvalidArgument(format!("the {what}'s specification cannot be read: {error}")))
}

fn make_folder(path: &Path) -> Result<(), AgentError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(AgentError::failed("making a folder failed"))
}

fn folder(name: &str) -> Result<PathBuf, AgentError> {
    let path = Path::new(runtime::ROOT).join(name);
    make_folder(&path)?;
    Ok(path)
}

fn prepared(container_id: &str, exec_id: &str) -> Result<PathBuf, AgentError> {
    Ok(folder(PREPARED)?.join(format!("{container_id}:{exec_id}.json")))
}

/// A specification may hold secrets in its environment.
fn write_secret(path: &Path, bytes: &[u8]) -> Result<(), AgentError> {
    let write = || -> io::Result<()> {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path)?
            .write_all(bytes)
    };
    write().map_err(AgentError::failed(format!("writing {} failed", path.display())))
}

fn remove_files(id: &str) {
    for path in [
        Path::new(runtime::ROOT).join(BUNDLES).join(id),
        runtime::records().join(id),
    ] {
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a container's files stay");
            }
            _ => {}
        }
    }
}

/// A process in the guest's own namespaces, for whoever looks after the guest.
fn spawn_in_guest(path: &Path, process: &Process) -> Result<Pid, AgentError> {
    let text = std::fs::read(path).map_err(AgentError::failed("reading the prepared process failed"))?;
    let spec: ProcessSpec =
        serde_json::from_slice(&text).map_err(AgentError::failed("reading the prepared process failed"))?;
    let arguments = spec.args().clone().unwrap_or_default();
    let Some((program, arguments)) = arguments.split_first() else {
        return Err(AgentError::InvalidArgument("the process has no program".to_owned()));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(if spec.cwd().as_os_str().is_empty() {
            Path::new("/")
        } else {
            spec.cwd()
        });
    command.env_clear();
    command.envs(
        spec.env()
            .iter()
            .flatten()
            .filter_map(|variable| variable.split_once('=')),
    );

    let terminal = if process.has_terminal() {
        let pty = nix::pty::openpty(None, None).map_err(AgentError::failed("making a terminal failed"))?;
        let slave = || {
            pty.slave
                .try_clone()
                .map_err(AgentError::failed("making a terminal failed"))
        };
        command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
        // SAFETY: only setsid(2) and ioctl(2) between fork and exec.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                if libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(())
                }
            });
        }
        Some(pty.master)
    } else {
        let stdio = process
            .make_pipes()
            .map_err(AgentError::failed("making the streams' pipes failed"))?;
        command.stdin(stdio.stdin).stdout(stdio.stdout).stderr(stdio.stderr);
        None
    };
    let child = command
        .spawn()
        .map_err(AgentError::failed(format!("{program} could not be started")))?;
    if let Some(master) = terminal {
        process
            .take_terminal(master)
            .map_err(AgentError::failed("taking the terminal failed"))?;
    }
    i32::try_from(child.id())
        .map(Pid::from_raw)
        .map_err(AgentError::failed("the process has no pid"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_folder() {
        for name in ["", "..", ".hidden", "a/b", "a b", GUEST_CONTAINER_ID] {
            assert!(check_name(name).is_err(), "{name}");
        }
        check_name("0af3-exec_1.b").unwrap();
    }
}
