//! A process's standard streams: between the FIFOs that containerd made and the connections to the guest. Nothing here ever
//! blocks a thread, and a slow reader holds back its writer alone.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    time::Duration,
};

use coreos_kvm_launcher::agent::{AgentClient, ProcessName, Stream, StreamReader, StreamWriter};
use coreos_kvm_proto::agent::Streams as Wanted;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::error::ShimError;

/// How much of stdin is taken at a time, in bytes: what a pipe holds by default (pipe(7)).
const CHUNK: usize = 64 * 1024;
/// How long the rest of a dead process's output may take before its container is removed without it.
const DRAIN: Duration = Duration::from_secs(10);

/// Which streams a process has and where containerd wants them: paths of FIFOs, `file://` for a file, empty for none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Stdio {
    /// The streams that the agent has to provide.
    pub(crate) fn wanted(&self) -> Wanted {
        Wanted {
            stdin: !self.stdin.is_empty(),
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr.is_empty() && !self.terminal,
            terminal: self.terminal,
            ..Default::default()
        }
    }

    /// Opens what containerd has made.
    ///
    /// # Errors
    /// When something is not there, or of a kind that is not known.
    pub(crate) async fn open(&self) -> Result<OpenStdio, ShimError> {
        let wanted = self.wanted();
        Ok(OpenStdio {
            stdin: if wanted.stdin {
                Some(open_input(&self.stdin)?)
            } else {
                None
            },
            stdout: if wanted.stdout {
                Some(Sink::open(&self.stdout).await?)
            } else {
                None
            },
            stderr: if wanted.stderr {
                Some(Sink::open(&self.stderr).await?)
            } else {
                None
            },
        })
    }
}

/// The host's ends.
#[derive(Debug, Default)]
pub(crate) struct OpenStdio {
    stdin: Option<pipe::Receiver>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

/// Where output goes.
#[derive(Debug)]
enum Sink {
    Fifo(pipe::Sender),
    File(File),
}

impl Sink {
    async fn open(target: &str) -> Result<Self, ShimError> {
        let opening = ShimError::while_doing(format!("opening {target}"));
        match target.split_once("://") {
            Some(("file", path)) => {
                let file = File::options().append(true).create(true).open(path).await;
                file.map(Self::File).map_err(opening)
            }
            Some(("fifo", path)) => open_output(Path::new(path)).map(Self::Fifo).map_err(opening),
            Some((scheme, _)) => Err(ShimError::Unimplemented(format!(
                "output cannot be sent to {target}: the scheme {scheme} is not known, those of FIFOs (a path) and of files \
                 (file://) are"
            ))),
            None => open_output(Path::new(target)).map(Self::Fifo).map_err(opening),
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.write_all(bytes).await,
            Self::File(file) => {
                file.write_all(bytes).await?;
                // tokio's files keep what was written until asked for.
                file.flush().await
            }
        }
    }
}

/// With both ends open, the output waits in the FIFO while containerd is being restarted, instead of breaking it.
fn open_output(path: &Path) -> io::Result<pipe::Sender> {
    pipe::OpenOptions::new().read_write(true).open_sender(path)
}

/// With both ends open, stdin does not end when a client goes away that may come back: CloseIO ends it.
fn open_input(path: &str) -> Result<pipe::Receiver, ShimError> {
    let path = PathBuf::from(path.strip_prefix("fifo://").unwrap_or(path));
    pipe::OpenOptions::new()
        .read_write(true)
        .open_receiver(&path)
        .map_err(ShimError::while_doing(format!("opening {}", path.display())))
}

/// The guest's ends, of which it does not know yet whose they are.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
}

impl Connections {
    /// Connects as many as `stdio` needs.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub(crate) async fn dial(agent: &AgentClient, stdio: &Stdio) -> Result<Self, ShimError> {
        let wanted = stdio.wanted();
        let dial = async |wanted: bool| match wanted {
            true => agent.stream().await.map(Some),
            false => Ok(None),
        };
        let (stdin, stdout, stderr) =
            tokio::try_join!(dial(wanted.stdin), dial(wanted.stdout), dial(wanted.stderr)).map_err(not_connected)?;
        Ok(Self { stdin, stdout, stderr })
    }
}

/// The running copies of one process's streams.
#[derive(Debug, Default)]
pub(crate) struct Copies {
    outputs: TaskTracker,
    stdin_closed: CancellationToken,
    /// The process takes no more input, or its output is given up.
    stop_input: CancellationToken,
    stop_output: CancellationToken,
}

impl Copies {
    /// Starts to copy. The process has been created, but may not have been started yet.
    ///
    /// # Errors
    /// When the guest cannot be reached.
    pub(crate) async fn start(
        &self,
        name: ProcessName<'_>,
        stdio: OpenStdio,
        connections: Connections,
    ) -> Result<(), ShimError> {
        let output = async |sink: Option<Sink>, stream: Option<Stream>, stderr| match sink.zip(stream) {
            Some((sink, stream)) => Ok(Some((stream.output(name, stderr).await?, sink))),
            None => Ok(None),
        };
        let input = async |stdin: Option<pipe::Receiver>, stream: Option<Stream>| match stdin.zip(stream) {
            Some((stdin, stream)) => Ok(Some((stdin, stream.input(name).await?))),
            None => Ok(None),
        };
        let (input, output, errors) = tokio::try_join!(
            input(stdio.stdin, connections.stdin),
            output(stdio.stdout, connections.stdout, false),
            output(stdio.stderr, connections.stderr, true),
        )
        .map_err(not_connected)?;
        for (from, to) in [output, errors].into_iter().flatten() {
            let stop = self.stop_output.clone();
            self.outputs.spawn(async move {
                tokio::select! {
                    result = copy_output(from, to) => {
                        if let Err(error) = result {
                            tracing::debug!(%error, "a process's output ends early");
                        }
                    }
                    () = stop.cancelled() => {}
                }
            });
        }
        self.outputs.close();
        if let Some((from, to)) = input {
            let (closed, stop) = (self.stdin_closed.clone(), self.stop_input.clone());
            tokio::spawn(async move {
                tokio::select! {
                    result = copy_input(from, to, closed) => {
                        if let Err(error) = result {
                            tracing::debug!(%error, "a process's input ends early");
                        }
                    }
                    () = stop.cancelled() => {}
                }
            });
        }
        Ok(())
    }

    /// Nothing follows on stdin. May be said at any time, also before the streams are there.
    pub(crate) fn close_stdin(&self) {
        self.stdin_closed.cancel();
    }

    /// The process has ended: whatever is still on its way to it is for nobody.
    pub(crate) fn stop_input(&self) {
        self.stop_input.cancel();
    }

    /// Waits until all output has been handed over; gives up on what nobody takes.
    pub(crate) async fn drain(&self) {
        self.stop_input();
        self.outputs.close();
        if tokio::time::timeout(DRAIN, self.outputs.wait()).await.is_err() {
            tracing::warn!("output of a process is given up: nobody takes it, or somebody still holds it open");
            self.stop_output.cancel();
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.stop_input.cancel();
        self.stop_output.cancel();
    }
}

fn not_connected(error: io::Error) -> ShimError {
    ShimError::while_doing("connecting the process's streams")(error)
}

async fn copy_output(mut from: StreamReader, mut to: Sink) -> io::Result<()> {
    while let Some(bytes) = from.next().await? {
        to.write(bytes).await?;
    }
    Ok(())
}

async fn copy_input(mut from: pipe::Receiver, mut to: StreamWriter, closed: CancellationToken) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        tokio::select! {
            count = from.read(&mut buffer) => to.write(&buffer[..count?]).await?,
            () = closed.cancelled() => break,
        }
    }
    // Whoever closes stdin has written everything before. The kernel is asked, not tokio, which may not know yet.
    loop {
        match nix::unistd::read(from.as_fd(), &mut buffer) {
            Ok(0) | Err(nix::Error::EAGAIN) => return to.finish().await,
            Ok(count) => to.write(&buffer[..count]).await?,
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
