//! What stands in a container's bundle, the directory that containerd makes for it: the specification, and what a later process
//! needs to end the container's machine.

use std::{
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use coreos_kvm_launcher::{
    state::{ProcessId, StateDir},
    vm,
};
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::error::{ShimError, sentence};

const SPEC: &str = "config.json";
const RECORD: &str = "coreos-kvm.json";
const ADDRESS: &str = "address";

/// Whether it is that of a sandbox which has no specification, and so of the Sandbox API.
pub(crate) fn is_sandbox(bundle: &Path) -> bool {
    !bundle.join(SPEC).exists()
}

/// Where containerd has a folder for the bundle on disk, which goes with it; the bundle itself is in memory.
pub(crate) fn work(bundle: &Path) -> PathBuf {
    bundle.join("work")
}

/// Reads `config.json`.
///
/// # Errors
/// When it cannot be read or is no OCI specification.
pub(crate) fn spec(bundle: &Path) -> Result<Spec, ShimError> {
    let path = bundle.join(SPEC);
    let reading = || format!("reading {}", path.display());
    let text = std::fs::read(&path).map_err(ShimError::while_doing(reading()))?;
    serde_json::from_slice(&text).map_err(ShimError::while_doing(reading()))
}

/// Which machine stands behind a sandbox's bundle. There is none beside a mere container.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) machine: String,
    pub(crate) state_dir: PathBuf,
    /// The shim that was to start it: another's machine may have the name, for ids are unique in a namespace of containerd alone.
    pub(crate) shim: Option<ProcessId>,
}

impl Record {
    pub(crate) fn write(&self, bundle: &Path) -> Result<(), ShimError> {
        let path = bundle.join(RECORD);
        let write = || -> io::Result<()> {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)?;
            Ok(serde_json::to_writer(file, self)?)
        };
        write().map_err(|error| {
            // Half of it is no record, and there is no machine yet that one would have to name.
            let _ = std::fs::remove_file(&path);
            ShimError::while_doing(format!("writing {}", path.display()))(error)
        })
    }

    /// Ends the machine, if it is still there, and frees what it held.
    ///
    /// # Errors
    /// When something of it is left.
    pub(crate) async fn end_machine(&self) -> Result<(), ShimError> {
        let id = self.machine.parse().map_err(ShimError::invalid)?;
        // A record that cannot be read is for `destroy` to tell, which frees what it can without one.
        if let Ok(Some(found)) = StateDir::of(&self.state_dir, &id).read()
            && found.launcher != self.shim
        {
            return Ok(());
        }
        let ended = vm::destroy(&self.state_dir, &id).await;
        ended.map_err(|error| ShimError::Internal(sentence(&error)))
    }

    /// None where no machine was ever to be.
    pub(crate) fn read(bundle: &Path) -> Result<Option<Self>, ShimError> {
        let path = bundle.join(RECORD);
        let reading = || format!("reading {}", path.display());
        match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(ShimError::while_doing(reading())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(ShimError::while_doing(reading())(error)),
        }
    }
}

/// Writes down where the shim is reached: containerd 1.6 and 1.7 look there after their own restart.
pub(crate) fn write_address(bundle: &Path, address: &str) -> io::Result<()> {
    std::fs::write(bundle.join(ADDRESS), address)
}
