//! `containerd-shim-coreos-kvm-v2`: runs the containers of one pod in one virtual machine.
//!
//! The way of a pod, without turning back: [`bundle`] (the specification that containerd wrote) or [`sandbox`] (the pod's
//! configuration) → [`podspec`] (the description of a machine) → [`hypervisor`] (the machine) → [`pod`] → [`container`] ([`rootfs`] and [`guestspec`]) → [`process`] ([`streams`]).
//! What happens goes back to containerd through [`events`]. [`service`] and [`sandbox`] are containerd's doors, [`bootstrap`], [`cleanup`] and
//! [`info`] are the actions of the command line, [`serve`] is what lives as long as the pod.

use std::{
    env,
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, bail};

mod bootstrap;
mod bundle;
mod cleanup;
mod clock;
mod container;
mod containerd;
mod error;
mod events;
mod facts;
mod guestspec;
mod heap;
mod hypervisor;
mod idler;
mod idmap;
mod info;
mod limits;
mod logging;
mod metrics;
mod options;
mod pod;
mod pod_volumes;
mod podfiles;
mod podspec;
mod portforward;
mod process;
mod rootfs;
mod sandbox;
mod serve;
mod service;
mod shm;
mod streams;
#[cfg(test)]
mod tests;
mod userns;
mod volume;

const USAGE: &str = "containerd starts this program; an admin names it in containerd's configuration:
  runtime_type = \"io.containerd.coreos-kvm.v2\"

Usage: containerd-shim-coreos-kvm-v2 -namespace NS -id ID -address SOCKET [-bundle DIR] [-debug] start|delete
       containerd-shim-coreos-kvm-v2 -info | -v
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&arguments).map_err(|error| anyhow::anyhow!("{error}\n\n{USAGE}"))?;
    if flags.version {
        return answer(concat!("containerd-shim-coreos-kvm-v2 ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
    }
    if flags.info {
        return answer(&info::info()?);
    }
    if flags.namespace.is_empty() || flags.id.is_empty() {
        bail!("-namespace and -id are missing\n\n{USAGE}");
    }
    match flags.action.as_str() {
        "start" => answer(bootstrap::start(&flags)?.as_bytes()),
        "delete" => answer(&cleanup::delete(&flags)?),
        "" => {
            heap::keep_small();
            serve::serve(&flags)
        }
        other => bail!("there is no action {other:?}\n\n{USAGE}"),
    }
}

/// Prints an answer to containerd; nothing else may go to stdout or stderr then.
fn answer(bytes: &[u8]) -> anyhow::Result<()> {
    io::stdout().write_all(bytes).context("answering")
}
