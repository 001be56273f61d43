//! A new container, by libcontainer.

use std::path::Path;

use libcontainer::{container::builder::ContainerBuilder, syscall::syscall::SyscallType};

use super::{chain, records};

/// Makes the container with its init, which then waits; answers the init's pid.
pub(super) fn create(id: &str, bundle: &Path, console: Option<&Path>) -> Result<i32, String> {
    let container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_root_path(records())
        .and_then(ContainerBuilder::validate_id)
        .map_err(|error| chain(&error))?
        .with_console_socket(console)
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .map_err(|error| chain(&error))?;
    container
        .pid()
        .map(|pid| pid.as_raw())
        .ok_or_else(|| "the container has no process".to_owned())
}
