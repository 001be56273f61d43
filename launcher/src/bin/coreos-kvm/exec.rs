//! `coreos-kvm exec`: a command in the guest's own namespaces, as if one stood at the machine.

use std::{
    io::{self, IsTerminal, Read, Write},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use clap::Args;
use coreos_kvm_launcher::{
    agent::{AgentClient, ProcessName, StreamReader, StreamWriter},
    config::Config,
    machine::MachineId,
    state::StateDir,
    vsock::VsockDialer,
};
use coreos_kvm_proto::{GUEST_CONTAINER_ID, agent::Streams};
use nix::{
    pty::Winsize,
    sys::termios::{self, SetArg, Termios},
};
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

#[derive(Args)]
pub(crate) struct Exec {
    machine: MachineId,
    /// The command and its arguments, after `--`.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Bytes that are read from stdin at a time.
const CHUNK: usize = 16 * 1024;

impl Exec {
    pub(crate) async fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let Some(record) = StateDir::of(&config.state_dir, &self.machine).read()? else {
            bail!("there is no machine {}", self.machine)
        };
        let Some(address) = record.vsock else {
            bail!("the machine {} is still starting", self.machine)
        };
        let agent = AgentClient::new(VsockDialer::new(address), None);

        // Two commands of one process id never run at the same time, but may after one another.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let exec_id = format!("exec-{}-{}", std::process::id(), now.as_nanos());
        let name = ProcessName {
            container_id: GUEST_CONTAINER_ID,
            exec_id: &exec_id,
        };
        let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
        let streams = Streams {
            stdin: true,
            stdout: true,
            stderr: !terminal,
            terminal,
            ..Default::default()
        };
        let process = serde_json::to_vec(&process(&self.command, terminal))?;
        agent.create_guest_exec(&exec_id, process, streams).await?;
        let outcome = attended(&agent, name, terminal).await;
        // Forgotten by the agent whatever came of it; one that still runs is then left to the guest.
        if let Err(error) = agent.delete_process(name).await {
            tracing::debug!(%error, "the agent still knows the process");
        }
        outcome
    }
}

/// The `process` object of the OCI runtime specification.
fn process(command: &[String], terminal: bool) -> serde_json::Value {
    let mut environment = vec![
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        "HOME=/root".to_owned(),
    ];
    if let (true, Ok(kind)) = (terminal, std::env::var("TERM")) {
        environment.push(format!("TERM={kind}"));
    }
    json!({
        "terminal": terminal,
        "user": { "uid": 0, "gid": 0 },
        "args": command,
        "env": environment,
        "cwd": "/",
    })
}

/// Runs the prepared process to its end, its streams being this process's.
async fn attended(agent: &AgentClient, name: ProcessName<'_>, terminal: bool) -> anyhow::Result<ExitCode> {
    let stdin = agent.input(name).await.context("connecting stdin")?;
    let stdout = agent.output(name, false).await.context("connecting stdout")?;
    let stderr = match terminal {
        true => None,
        false => Some(agent.output(name, true).await.context("connecting stderr")?),
    };
    agent.start_process(name).await?;
    let _raw = if terminal { Some(RawTerminal::enter()?) } else { None };
    if terminal {
        resize(agent, name).await;
    }

    // stdin goes on by itself: the process may end without having read it.
    let feeding = tokio::spawn(feed(stdin));
    let ended = async {
        let printed = async {
            tokio::try_join!(copy(stdout, io::stdout()), async {
                match stderr {
                    Some(stderr) => copy(stderr, io::stderr()).await,
                    None => Ok(()),
                }
            })
        };
        let (exit, printed) = tokio::join!(agent.wait_process(name), printed);
        let exit = exit?;
        printed?;
        anyhow::Ok(exit)
    };
    let exit = tokio::select! {
        exit = ended => exit,
        error = forward_signals(agent, name, terminal) => Err(error),
    };
    feeding.abort();
    Ok(ExitCode::from(u8::try_from(exit?.status).unwrap_or(u8::MAX)))
}

async fn copy(mut from: StreamReader, mut to: impl Write) -> anyhow::Result<()> {
    while let Some(bytes) = from.next().await.context("reading what the process prints")? {
        to.write_all(bytes).and_then(|()| to.flush()).context("printing")?;
    }
    Ok(())
}

/// Takes stdin to the process. Reading is left to a thread: a terminal must not be made non-blocking, for others share it.
async fn feed(mut to: StreamWriter) -> anyhow::Result<()> {
    let (chunks, mut read) = mpsc::channel::<Vec<u8>>(1);
    std::thread::spawn(move || {
        let mut stdin = io::stdin().lock();
        loop {
            let mut chunk = vec![0; CHUNK];
            match stdin.read(&mut chunk) {
                Ok(count @ 1..) => {
                    chunk.truncate(count);
                    if chunks.blocking_send(chunk).is_err() {
                        return;
                    }
                }
                _ => return,
            }
        }
    });
    while let Some(chunk) = read.recv().await {
        to.write(&chunk).await?;
    }
    Ok(to.finish().await?)
}

/// Takes signals to the process; returns only when that cannot be done.
async fn forward_signals(agent: &AgentClient, name: ProcessName<'_>, terminal: bool) -> anyhow::Error {
    let forward = async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let mut window = signal(SignalKind::window_change())?;
        loop {
            let number = tokio::select! {
                _ = interrupt.recv() => libc::SIGINT,
                _ = terminate.recv() => libc::SIGTERM,
                _ = hang_up.recv() => libc::SIGHUP,
                _ = window.recv() => {
                    if terminal {
                        resize(agent, name).await;
                    }
                    continue;
                }
            };
            agent.signal_process(name, u32::try_from(number)?, false).await?;
        }
    };
    match forward.await {
        Ok(never) => never,
        Err(error) => error,
    }
}

/// Gives the process's terminal the size of this one.
async fn resize(agent: &AgentClient, name: ProcessName<'_>) {
    nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, Winsize);

    let mut size = Winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: ioctl_tty(2), TIOCGWINSZ fills in the structure.
    if unsafe { window_size(libc::STDIN_FILENO, &mut size) }.is_err() {
        return;
    }
    if let Err(error) = agent.resize_pty(name, size.ws_col.into(), size.ws_row.into()).await {
        tracing::debug!(%error, "the size of the terminal is not told");
    }
}

/// A terminal that hands over every key, until this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    fn enter() -> anyhow::Result<Self> {
        let before = termios::tcgetattr(io::stdin()).context("asking the terminal for its settings")?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).context("setting the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // There is nobody to tell: the terminal is the place to tell it.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}
