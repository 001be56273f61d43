//! A container's task, made past the CRI as `ctr` makes one: with an output that is the trial's own, and calls that end when the trial
//! wants them to.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::snapshots::{MountsRequest, snapshots_client::SnapshotsClient};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{
    CreateTaskRequest, DeleteTaskRequest, GetContainerRequest, GetRequest, KillRequest, StartRequest,
};
use containerd_client::types::v1::Status;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tonic::Request;
use tonic::transport::Channel;

use crate::cri::{CALL_BOUND, Cri};
use crate::node::Place;

/// The task of a container that the CRI has created and not started. To the CRI it stays created.
#[derive(Debug)]
pub struct Task<'a> {
    cri: &'a Cri,
    container: String,
}

impl<'a> Task<'a> {
    /// Creates it. Without an output nobody hears what it says.
    pub fn create(cri: &'a Cri, container: &str, output: Option<&Output>) -> Result<Self> {
        let id = container.to_owned();
        let request = in_namespace(GetContainerRequest { id })?;
        let mut containers = ContainersClient::new(cri.channel.clone());
        let described = cri.call("container", CALL_BOUND, containers.get(request))?;
        let described = described.container.context("container: none")?;
        let request = in_namespace(MountsRequest {
            snapshotter: described.snapshotter,
            key: described.snapshot_key,
        })?;
        let mut snapshots = SnapshotsClient::new(cri.channel.clone());
        let mounts = cri.call("mounts", CALL_BOUND, snapshots.mounts(request))?;
        let task = Self {
            cri,
            container: container.to_owned(),
        };
        let request = in_namespace(CreateTaskRequest {
            container_id: container.to_owned(),
            rootfs: mounts.mounts,
            stdout: output.map_or_else(String::new, |output| output.inside.clone()),
            ..CreateTaskRequest::default()
        })?;
        cri.call("task create", CALL_BOUND, task.client().create(request))?;
        Ok(task)
    }

    pub fn start(&self) -> Result<()> {
        self.start_within(CALL_BOUND)
    }

    /// A start by a client that gives up after so long.
    pub fn start_within(&self, bound: Duration) -> Result<()> {
        let mut request = in_namespace(StartRequest {
            container_id: self.container.clone(),
            exec_id: String::new(),
        })?;
        request.set_timeout(bound);
        self.cri
            .call("task start", bound, self.client().start(request))
            .map(drop)
    }

    pub fn kill(&self, signal: Signal) -> Result<()> {
        self.kill_within(signal, CALL_BOUND)
    }

    /// A signal of a client that gives up after so long.
    pub fn kill_within(&self, signal: Signal, bound: Duration) -> Result<()> {
        let mut request = in_namespace(KillRequest {
            container_id: self.container.clone(),
            signal: (signal as i32).cast_unsigned(),
            ..KillRequest::default()
        })?;
        request.set_timeout(bound);
        self.cri.call("task kill", bound, self.client().kill(request)).map(drop)
    }

    pub fn status(&self) -> Result<Status> {
        let request = in_namespace(GetRequest {
            container_id: self.container.clone(),
            exec_id: String::new(),
        })?;
        let task = self.cri.call("task", CALL_BOUND, self.client().get(request))?;
        Ok(task.process.context("task: none")?.status())
    }

    /// Waits for its end and deletes it; answers its exit code.
    pub fn ended(self, bound: Duration) -> Result<u32> {
        let deadline = Instant::now() + bound;
        loop {
            let status = self.status()?;
            if status == Status::Stopped {
                break;
            }
            if Instant::now() >= deadline {
                bail!("after {} s the task is still {}", bound.as_secs(), status.as_str_name());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let container_id = self.container.clone();
        let request = in_namespace(DeleteTaskRequest { container_id })?;
        let deleted = self
            .cri
            .call("task delete", CALL_BOUND, self.client().delete(request))?;
        Ok(deleted.exit_status)
    }

    fn client(&self) -> TasksClient<Channel> {
        TasksClient::new(self.cri.channel.clone())
    }
}

fn in_namespace<T>(message: T) -> Result<Request<T>> {
    let mut request = Request::new(message);
    let namespace = "k8s.io".parse().context("naming the namespace")?;
    request.metadata_mut().insert("containerd-namespace", namespace);
    Ok(request)
}

/// Where a process's output goes: a FIFO that the trial reads, or does not. Removed when dropped.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// Its path inside the node.
    inside: String,
    fifo: File,
}

impl Output {
    pub fn make(place: &Place, name: &str) -> Result<Self> {
        let path = place.run().join(name);
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).with_context(|| format!("making {}", path.display()))?;
        let fifo = File::options()
            .read(true)
            .custom_flags(OFlag::O_NONBLOCK.bits())
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        Ok(Self {
            path,
            inside: format!("/run/{name}"),
            fifo,
        })
    }

    /// Reads some bytes, and waits for them; none at the end.
    pub fn read(&mut self, buffer: &mut [u8], bound: Duration) -> Result<usize> {
        let deadline = Instant::now() + bound;
        loop {
            match self.fifo.read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                outcome => return outcome.context("reading a process's output"),
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut waited = [PollFd::new(self.fifo.as_fd(), PollFlags::POLLIN)];
            if poll(&mut waited, timeout).context("waiting for a process's output")? == 0 {
                bail!("nothing came of a process's output for {} s", bound.as_secs());
            }
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            eprintln!("{} cannot be removed: {error}", self.path.display());
        }
    }
}
