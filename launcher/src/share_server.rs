//! The process that serves the shared directory of a clone without virtiofs: FUSE requests come on a connection that QEMU has as the
//! other end of a serial port of the guest. It is confined as virtiofsd is, whose code it has.

use std::{
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
};

use crate::{
    process::{Confinement, Process, ProcessError},
    program::{self, ProgramError},
};

/// The name of the program, and of the key in the configuration.
pub const PROGRAM: &str = "coreos-kvm-share";

/// Name of folders that nobody on the host changes, each in a folder of the shared directory: of what is in them the guest's kernel keeps
/// what it has seen.
pub const OWN: &str = "rootfs";

/// The share cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("making the connection of the shared directory failed")]
    Connection(#[source] io::Error),
}

/// Finds the program.
///
/// # Errors
/// When it is not there.
pub fn find(program: &Path) -> Result<PathBuf, ProgramError> {
    program::find(PROGRAM, "share_server", program)
}

/// A running server.
#[derive(Debug)]
pub struct ShareServer {
    pub process: Process,
    /// The other end of its connection, for QEMU; it ends when that is closed.
    pub connection: OwnedFd,
}

impl ShareServer {
    /// Starts `program`, the configuration's, on the directory `shared`, prepared by [`crate::virtiofs::prepare`]. The confinement's
    /// uid is to be None, as virtiofsd's.
    ///
    /// # Errors
    /// When the program is missing or does not start.
    pub fn start(program: &Path, shared: &Path, confinement: Confinement) -> Result<Self, ShareError> {
        let program = find(program)?;
        let (ours, theirs) = UnixStream::pair().map_err(ShareError::Connection)?;
        let connection = OwnedFd::from(theirs);
        let arguments = [
            format!("--fd={}", connection.as_raw_fd()),
            format!("--shared-dir={}", shared.display()),
            format!("--own={OWN}"),
        ];
        let process = Process::start(&program, &arguments.map(Into::into), vec![connection], confinement)?;
        Ok(Self {
            process,
            connection: ours.into(),
        })
    }
}
