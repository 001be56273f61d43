//! `start`: finds the pod's shim, or starts one, and answers its address.
//!
//! containerd runs this in the container's bundle and takes stdout and stderr together for the answer: the bare address, which
//! every containerd from 1.6 on understands as the Task API of version 2.

use std::{
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use containerd_shim::{Flags, socket_address};
use nix::sys::stat::{Mode, umask};

use crate::{bundle, options, podspec};

/// Answers the address of the shim that looks after the sandbox or container `flags.id`.
pub(crate) fn start(flags: &Flags) -> anyhow::Result<String> {
    let bundle = std::env::current_dir().context("the bundle, the current directory, is gone")?;
    let (group, config) = if bundle::is_sandbox(&bundle) {
        // Its creation comes with the pod's configuration in place of the runtime's options.
        (flags.id.clone(), options::at_start(flags)?)
    } else {
        let spec = bundle::spec(&bundle)?;
        (podspec::sandbox_id(&spec).unwrap_or(&flags.id).to_owned(), None)
    };
    let address = socket_address(&flags.address, &flags.namespace, &group);
    let socket = socket_path(&address);
    if UnixStream::connect(&socket).is_err() {
        if group != flags.id {
            bail!("the shim of the pod {group} does not run any more, and its machine with it");
        }
        serve_in_background(flags, config.as_deref(), listen(&socket)?)?;
    }
    bundle::write_address(&bundle, &address).context("writing the shim's address into the bundle")?;
    Ok(address)
}

/// The path in an address: `unix:///run/containerd/s/...`.
pub(crate) fn socket_path(address: &str) -> PathBuf {
    address.strip_prefix("unix://").unwrap_or(address).into()
}

fn listen(socket: &Path) -> anyhow::Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    // Nobody answered there: what is there is the socket of a shim that is no more.
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old socket {}", socket.display()));
        }
        _ => {}
    }
    let before = umask(Mode::S_IRWXG | Mode::S_IRWXO);
    let listener = UnixListener::bind(socket);
    umask(before);
    listener.with_context(|| format!("listening on {}", socket.display()))
}

/// Runs this program once more, without an action: it serves on the socket that is its stdin, and lives as long as the pod.
/// containerd may connect at once; who comes before the shim is up waits in the socket's queue.
fn serve_in_background(flags: &Flags, config: Option<&Path>, listener: UnixListener) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(program);
    command
        .args(["-namespace", &flags.namespace])
        .args(["-id", &flags.id])
        .args(["-address", &flags.address]);
    if flags.debug {
        command.arg("-debug");
    }
    if let Some(config) = config {
        command.env(options::CONFIG, config);
    }
    command
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("starting the pod's shim")?;
    Ok(())
}
