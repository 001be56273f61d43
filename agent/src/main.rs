//! The agent inside the guest: runs the containers of one pod, told what to do by the host over vsock.
//!
//! - [`service`]: the calls of the protocol, thin
//! - [`containers`]: all containers, and [`process`]: one process with its streams
//! - [`runtime`]: how processes come to be in containers, by a zygote and libcontainer
//! - [`reaper`]: the one owner of exits
//! - [`connections`]: the ways to the host, by vsock or by a [`serial`] port; [`streams`]: what carries stdin, stdout and stderr, and
//!   [`output_window`]: what carries much output
//! - [`forward`]: connections to the guest's loopback
//! - [`cgroup`], [`stats`]: the containers' cgroups and what they say; [`passwd`] and [`workdir`]: their users' homes
//!   and the folders they start in
//! - [`heap`]: what the allocator keeps
//! - [`share`], [`mounts`], [`network`], [`identity`], [`size`]: making the guest the pod's
//! - [`template`], [`quiet`], [`free_memory`], [`rehearsal`]: being saved, and waking up as another machine
//! - [`greeting`]: telling the host that all this is there

mod cgroup;
mod connections;
mod containers;
mod devices;
mod error;
mod forward;
mod free_memory;
mod greeting;
mod heap;
mod identity;
mod mounts;
mod network;
mod output_pipe;
mod output_window;
mod passwd;
mod process;
mod quiet;
mod reaper;
mod rehearsal;
mod runtime;
mod serial;
mod service;
mod share;
mod size;
mod stats;
mod streams;
mod template;
mod terminal;
mod workdir;

use std::{sync::Arc, time::Instant};

use anyhow::{Context as _, Result, bail};
use connections::{Connections, Host};
use coreos_kvm_proto::{MESSAGE_MAX, NETWORK_DONE, SANDBOX_DONE, agent_ttrpc};
use template::{Awake, Template};
use ttrpc::asynchronous::transport::Listener;

/// Logs go to the journal by stderr; `coreos_kvm.agent_log=debug` on the kernel's command line shows more.
fn start_logging() {
    let level = greeting::kernel_argument("coreos_kvm.agent_log").and_then(|level| level.parse().ok());
    let level = level.unwrap_or(tracing::Level::INFO);
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .without_time()
        .with_writer(std::io::stderr)
        .init();
}

fn main() -> Result<()> {
    heap::keep();
    // Containers' processes outlive the process that made them, and become this one's children.
    nix::sys::prctl::set_child_subreaper(true).context("becoming the subreaper of containers")?;
    // SAFETY: nothing has started a thread so far.
    let zygote = unsafe { runtime::zygote::start() }.context("starting the zygote")?;
    // The zygote has no log: what it forks has a container's streams.
    start_logging();
    // A panic is its end as well.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        last_words(panic);
        print(panic);
    }));
    let served = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(serve(zygote));
    if let Err(error) = &served {
        last_words(&format_args!("{error:#}"));
    }
    served
}

/// The guest ends with its agent, and its journal with it: why is said on the console, which the host keeps.
fn last_words(words: &impl std::fmt::Display) {
    // Critical, for consoles show no less: syslog(2). Nobody is left to hear that this failed.
    let _ = std::fs::write("/dev/kmsg", format!("<2>coreos-kvm-agent: {words}"));
}

async fn serve(zygote: runtime::zygote::Zygote) -> Result<()> {
    let share = Arc::new(share::Share::default());
    let shm = Arc::new(mounts::Shm::default());
    let template = match template::kind() {
        Some(kind) => {
            let template = Template::prepare(kind, &share, &shm).await;
            Some(template.context("making the guest quiet")?)
        }
        None => None,
    };
    let reaper = reaper::start().context("watching for the end of processes")?;
    let zygote_end = reaper::exited(reaper.watch(zygote.pid(), Instant::now()));
    let cgroup = cgroup::own(&[nix::unistd::getpid(), zygote.pid()]).context("taking over the service's cgroup")?;
    let containers = Arc::new(containers::Containers::new(reaper, zygote, cgroup));

    let (mut connections, calls) = Connections::listen(containers.clone()).context("listening for the host")?;
    let service = Arc::new(service::Service::new(containers.clone(), share.clone(), shm));
    let mut server = ttrpc::asynchronous::Server::new()
        .add_listener(Listener::new(calls))
        .register_service(agent_ttrpc::create_agent(service.clone()));
    server.start().await.context("serving calls")?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        message_max = MESSAGE_MAX,
        "agent serves"
    );
    let (host, ready_port, done) = match template {
        Some(template) => {
            let awake = template.sleep(&containers).await;
            let mut awake = awake.context("becoming a machine of its own")?;
            let host = match awake.connections.take() {
                Some(port) => {
                    share.comes_by_serial_port();
                    connections.serve(port)
                }
                None => Host::Vsock,
            };
            let done = configure(&service, &awake).await;
            (host, awake.ready_port, done)
        }
        None => (Host::Vsock, greeting::port(), Vec::new()),
    };
    greeting::greet(&host, ready_port, &done)
        .await
        .context("greeting the host")?;
    tokio::select! {
        result = connections.ended() => result.context("serving the host"),
        exit = zygote_end => bail!("the zygote has ended with code {}", exit.status),
    }
}

/// What a clone is told to do before it greets; answers what of it is done. The host asks for the rest, and hears why it is not.
async fn configure(service: &service::Service, awake: &Awake) -> Vec<&'static str> {
    let mut done = Vec::new();
    if let Some(network) = &awake.network {
        if let Err(error) = network::configure(network).await {
            tracing::warn!(%error, "the guest has no network yet");
            return done;
        }
        done.push(NETWORK_DONE);
    }
    if let Some(sandbox) = &awake.sandbox
        && service.configure_ahead(sandbox).await
    {
        done.push(SANDBOX_DONE);
    }
    done
}
