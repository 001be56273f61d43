//! A container from its beginning to its end, by libcontainer.

use std::{fmt::Write as _, fs::File, io::Write as _, os::fd::BorrowedFd, path::Path};

use libcontainer::{
    container::{Container, builder::ContainerBuilder},
    syscall::syscall::SyscallType,
};
use oci_spec::runtime::Spec;
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

use super::{
    REPORT_MAX, SPEC,
    adapt::{adapt, enter_processes},
    chain, records,
    users::{self, IdMappings},
};
use crate::{share, workdir};

/// The namespaces that a container enters.
pub(super) struct Entered<'a> {
    pub(super) processes: Option<BorrowedFd<'a>>,
    pub(super) users: Option<(BorrowedFd<'a>, IdMappings)>,
}

/// Makes the container with its init, which then waits; answers the init's pid. What libcontainer has to say about errors goes
/// to `report`, from all its processes.
pub(super) fn create(
    report: &File,
    id: &str,
    bundle: &Path,
    cgroup: &Path,
    console: Option<&Path>,
    entered: &Entered<'_>,
) -> Result<i32, String> {
    if let Ok(report) = report.try_clone() {
        // The only one: this process has just come into being.
        let _ = tracing::subscriber::set_global_default(Errors(report));
    }
    let mut spec = Spec::load(bundle.join(SPEC)).map_err(|error| chain(&error))?;
    let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
    let folder = spec
        .process()
        .as_ref()
        .map(|process| process.cwd().clone())
        .unwrap_or_default();
    if let Err(error) = std::fs::read_dir(&root) {
        return Err(format!(
            "the root file system {} cannot be read: {error}",
            root.display()
        ));
    }
    share::mount_volumes(id, &spec)?;
    let mappings = entered.users.map(|(_, mappings)| mappings);
    if let Err(error) = workdir::make(&root, &folder, mappings.map(IdMappings::root)) {
        // It may be on a volume, which is not seen from here; libcontainer fails if it is nowhere.
        tracing::error!("the working directory {} cannot be made: {error}", folder.display());
    }
    adapt(&mut spec, cgroup, console.is_some())?;
    if let Some(namespace) = entered.processes {
        enter_processes(&mut spec, namespace);
    }
    if let Some((namespace, _)) = entered.users {
        users::adapt(&mut spec, namespace)?;
    }
    if let Some(process) = spec.process() {
        users::give_streams(process.user(), mappings);
    }
    spec.save(bundle.join("config.json")).map_err(|error| chain(&error))?;
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
    if console.is_some()
        && let (Some(init), Some(process)) = (container.pid(), spec.process())
    {
        users::give_terminal(init.as_raw(), process.user(), mappings);
    }
    Ok(container.pid().map_or(0, |pid| pid.as_raw()))
}

/// Lets the container's init execute its program.
pub(super) fn start(id: &str) -> Result<i32, String> {
    let mut container = Container::load(records().join(id)).map_err(|error| chain(&error))?;
    container.start().map_err(|error| chain(&error))?;
    Ok(container.pid().map_or(0, |pid| pid.as_raw()))
}

/// Ends what is left of the container and removes its cgroup, its record and its mounts.
pub(super) fn delete(id: &str) -> Result<i32, String> {
    let record = records().join(id);
    let deleted = if record.exists() {
        Container::load(record).and_then(|mut container| container.delete(true))
    } else {
        Ok(())
    };
    if let Err(error) = share::let_go(&[id.into()]) {
        tracing::warn!(container_id = id, %error, "a container's files stay mounted");
    }
    deleted.map(|()| 0).map_err(|error| chain(&error))
}

/// Writes errors that are logged to the report, a line each.
struct Errors(File);

impl Subscriber for Errors {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line("log".to_owned());
        event.record(&mut line);
        let mut text = line.0.replace(['\n', '\0'], " ").into_bytes();
        text.truncate(REPORT_MAX / 4);
        text.push(b'\n');
        // What is lost here is only the cause of an error that is told anyway.
        let _ = (&self.0).write_all(&text);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// An event as text: its message, and what belongs to it.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        // Writing to a string does not fail.
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
