//! The shim's log: containerd reads it from the FIFO `log` in the bundle and writes it into its own.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::{Arc, OnceLock},
};

use coreos_kvm_launcher::config::LogLevel;
use tracing::{Level, Metadata, level_filters::LevelFilter};
use tracing_subscriber::{Layer, Registry, filter::filter_fn, layer::SubscriberExt, reload, util::SubscriberInitExt};

static LEVEL: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

/// Starts to log into the bundle's FIFO. Errors are left aside: a shim without a log still runs its pod.
pub(crate) fn init(bundle: &Path, debug: bool) {
    // Both ends, so that neither the opening nor a write waits for or depends on a reader.
    let fifo = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"));
    let Ok(fifo) = fifo else { return };
    let level = if debug { LevelFilter::DEBUG } else { LevelFilter::INFO };
    let (level, handle) = reload::Layer::new(level);
    let fifo = Arc::new(fifo);
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .with_target(false)
        .with_writer(move || Lossy(fifo.clone()));
    if tracing_subscriber::registry()
        .with(level.and_then(lines.with_filter(filter_fn(is_of_the_pod))))
        .try_init()
        .is_ok()
    {
        let _ = LEVEL.set(handle);
    }
    std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the shim panics")));
}

/// The libraries' own debugging, such as each frame of a connection with containerd, says nothing about the pod.
fn is_of_the_pod(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO || metadata.target().contains("coreos_kvm")
}

/// Logs what the admin wants to have logged; a shim started for debugging logs at least that.
pub(crate) fn set_level(level: LogLevel) {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    if let Some(handle) = LEVEL.get() {
        let debugging = handle
            .with_current(|now| *now == LevelFilter::DEBUG)
            .unwrap_or_default();
        if !debugging || level > LevelFilter::DEBUG {
            let _ = handle.reload(level);
        }
    }
}

/// Drops what does not fit: when containerd is down nobody reads the log, and the pod must not wait for that.
struct Lossy(Arc<File>);

impl Write for Lossy {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match (&*self.0).write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(bytes.len()),
            result => result,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
