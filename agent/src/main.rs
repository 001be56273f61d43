//! The agent inside the guest: runs the containers of one pod, told what to do by the host over vsock.
//!
//! - [`service`]: the calls of the protocol, thin
//! - [`containers`]: all containers, and [`process`]: one process with its streams
//! - [`runtime`]: libcontainer, in a short-lived process of its own
//! - [`reaper`]: the one owner of exits
//! - [`streams`]: the connections that carry stdin, stdout and stderr
//! - [`cgroup`], [`stats`]: the containers' cgroups and what they say
//! - [`mounts`], [`network`], [`identity`]: making the guest the pod's
//! - [`greeting`]: telling the host that all this is there

mod cgroup;
mod containers;
mod error;
mod greeting;
mod identity;
mod mounts;
mod network;
mod process;
mod reaper;
mod runtime;
mod service;
mod stats;
mod streams;
mod terminal;

use std::sync::Arc;

use anyhow::{Context as _, Result};
use coreos_kvm_proto::{AGENT_PORT, MESSAGE_MAX, agent_ttrpc};

/// Logs go to the journal by stderr; `coreos_kvm.agent_log=debug` on the kernel's command line shows more.
fn start_logging() {
    let level = greeting::kernel_argument("coreos_kvm.agent_log").unwrap_or_else(|| "info".to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(level))
        .with_ansi(false)
        .without_time()
        .with_writer(std::io::stderr)
        .init();
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == runtime::WORD) {
        // libcontainer forks without exec, so this process has one thread and nothing else to do.
        std::process::exit(runtime::helper());
    }
    start_logging();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?
        .block_on(serve())
}

async fn serve() -> Result<()> {
    // Containers' processes outlive the helper that made them, and become this process's children.
    nix::sys::prctl::set_child_subreaper(true).context("becoming the subreaper of containers")?;
    let reaper = reaper::start().context("watching for the end of processes")?;
    let cgroup = cgroup::own().context("taking over the service's cgroup")?;
    let containers = Arc::new(containers::Containers::new(reaper, cgroup));

    let streams = streams::listen(containers.clone()).context("listening for streams")?;
    let service = agent_ttrpc::create_agent(Arc::new(service::Service::new(containers)));
    let mut server = ttrpc::asynchronous::Server::new()
        .bind(&format!("vsock://-1:{AGENT_PORT}"))
        .context("listening for calls")?
        .register_service(service);
    server.start().await.context("serving calls")?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        message_max = MESSAGE_MAX,
        "agent serves"
    );
    greeting::greet().await.context("greeting the host")?;
    streams.await.context("serving streams")?
}
