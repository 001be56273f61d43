//! Serves one directory of the host to one guest by FUSE messages on a stream socket.
//!
//! For machines that cannot have virtiofs: a clone has its memory copy-on-write, and a vhost-user device needs memory that is
//! shared. In the guest somebody opens /dev/fuse, mounts it, and carries what the kernel asks to this program, and its
//! replies back. The file system is virtiofsd's own, in its own sandbox, with the options that the launcher gives virtiofsd
//! (launcher/src/virtiofs.rs), so that a pod finds the same files whatever its machine is.
//!
//! Whoever carries reads the device into a buffer no longer than a request may be ([`connection::LONGEST`]), for the kernel fills
//! it with what it forgets; and mounts with `default_permissions`, which the kernel has to check, as it does on virtiofs.
//!
//! - [`confinement`]: the process's namespaces, root directory, system calls and capabilities;
//! - [`connection`]: requests and replies on the socket;
//! - [`share`]: the file system as the guest sees it;
//! - [`inode_numbers`]: which number a file has in the guest;
//! - [`nodes`]: what is known of the files that the guest remembers.

mod confinement;
mod connection;
mod inode_numbers;
mod nodes;
mod share;

use std::{ffi::CString, os::fd::RawFd, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use virtiofsd::server::Server;

use crate::{connection::Connection, share::Share};

/// Serves one directory to one guest by FUSE messages on a socket, until the socket is closed
#[derive(Debug, Parser)]
#[command(name = "coreos-kvm-share", version)]
struct Arguments {
    /// Number of the inherited descriptor: a connected stream socket
    #[arg(long, value_parser = clap::value_parser!(RawFd).range(0..))]
    fd: RawFd,
    /// The directory that is served
    #[arg(long)]
    shared_dir: String,
    /// Name of folders that nobody but the guest changes, each in a folder of the directory: the guest remembers what it has seen in them
    #[arg(long, value_name = "NAME")]
    own: Option<CString>,
}

fn main() -> ExitCode {
    match serve(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("coreos-kvm-share: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(arguments: &Arguments) -> anyhow::Result<()> {
    let socket = connection::inherited(arguments.fd)?;
    let (socket, config) = confinement::enter(socket, &arguments.shared_dir)?;
    let share =
        Share::new(config, arguments.own.clone()).with_context(|| format!("opening {}", arguments.shared_dir))?;
    Connection::new(socket)?.serve(&Server::new(share))?;
    Ok(())
}
