//! A pod's shim, called directly: what containerd adds to a call is left out.

use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use containerd_shim_protos::api::{DeleteRequest, ExecProcessRequest, StartRequest, WaitRequest};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc::{asynchronous::transport::Socket, context};
use kubeception_tests::node::Node;
use serde_json::{Value, json};
use tokio::net::UnixStream;

/// A call that starts something in an emulated guest.
const CALL: Duration = Duration::from_secs(60);

pub(crate) struct Shim {
    runtime: tokio::runtime::Runtime,
    client: TaskClient,
}

impl Shim {
    /// The shim of a pod of that node.
    pub(crate) fn connect(node: &Node, sandbox: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = node.place().run();
        let bundle = run
            .join("containerd/io.containerd.runtime.v2.task/k8s.io")
            .join(sandbox);
        let address = address(&bundle)?;
        let name = address
            .strip_prefix("unix:///run/")
            .context("the shim's socket is not below /run")?;
        let socket = run.join(name);
        let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
            bail!("{} is no socket", socket.display());
        };
        // By the folder's descriptor, for a path may be too long for a socket: unix(7).
        let folder = File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
        let path = Path::new("/proc/self/fd")
            .join(folder.as_raw_fd().to_string())
            .join(name);
        let client = runtime.block_on(async {
            let stream = UnixStream::connect(path).await?;
            anyhow::Ok(Client::new(Socket::new(stream)))
        });
        let client = client.with_context(|| format!("connecting to {}", socket.display()))?;
        Ok(Self {
            runtime,
            client: TaskClient::new(client),
        })
    }

    /// Runs a command in a container until it has started; its output goes to the FIFO `stdout`. Answers how long that took.
    pub(crate) fn exec(&self, container: &str, exec: &str, command: &[&str], stdout: &Path) -> Result<Duration> {
        let process = json!({
            "args": command,
            "cwd": "/",
            "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"],
            "user": { "uid": 0, "gid": 0 },
        });
        let request = ExecProcessRequest {
            id: container.to_owned(),
            exec_id: exec.to_owned(),
            stdout: stdout.to_string_lossy().into_owned(),
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
                ..Any::default()
            })
            .into(),
            ..ExecProcessRequest::default()
        };
        let start = StartRequest {
            id: container.to_owned(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        let begun = Instant::now();
        self.runtime.block_on(async {
            self.client.exec(context::with_duration(CALL), &request).await?;
            self.client.start(context::with_duration(CALL), &start).await
        })?;
        Ok(begun.elapsed())
    }

    /// Waits for its end and removes it.
    pub(crate) fn finish(&self, container: &str, exec: &str) -> Result<()> {
        let wait = WaitRequest {
            id: container.to_owned(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        };
        let delete = DeleteRequest {
            id: container.to_owned(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        };
        let exit = self.runtime.block_on(async {
            let exit = self.client.wait(context::with_duration(CALL), &wait).await?;
            self.client.delete(context::with_duration(CALL), &delete).await?;
            anyhow::Ok(exit.exit_status)
        })?;
        if exit != 0 {
            bail!("{exec} ended with {exit}");
        }
        Ok(())
    }
}

/// Where a shim serves, as containerd notes it: bootstrap.json since 1.7, a bare address before.
fn address(bundle: &Path) -> Result<String> {
    if let Ok(text) = fs::read(bundle.join("bootstrap.json")) {
        let bootstrap: Value = serde_json::from_slice(&text)?;
        return Ok(bootstrap["address"].as_str().context("no address")?.to_owned());
    }
    let path = bundle.join("address");
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}
