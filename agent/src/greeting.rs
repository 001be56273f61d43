//! Telling the host that the agent serves, so that it need not ask again and again.

use std::time::Duration;

use anyhow::{Context as _, Result};
use coreos_kvm_proto::{GREETING, PROTOCOL, READY_PORT, READY_PORT_ARGUMENT};
use tokio::io::AsyncWriteExt;

use crate::connections::Host;

/// The host listens before it starts the guest, so a connection is a matter of moments.
const GREET: Duration = Duration::from_secs(30);

/// The value of an argument on the kernel's command line, the last one if there are several.
pub(crate) fn kernel_argument(name: &str) -> Option<String> {
    let line = std::fs::read_to_string("/proc/cmdline").ok()?;
    line.split_ascii_whitespace()
        .rev()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        .map(str::to_owned)
}

/// Port of the host's vsock at which the greeting is waited for, in a machine that has booted.
pub(crate) fn port() -> u32 {
    kernel_argument(READY_PORT_ARGUMENT)
        .and_then(|port| port.parse().ok())
        .unwrap_or(READY_PORT)
}

/// Dials the host at `port` and says who is there.
pub(crate) async fn greet(host: &Host, port: u32) -> Result<()> {
    let greet = async {
        let mut stream = host.dial(port).await?;
        let line = format!("{GREETING} {PROTOCOL} {}\n", env!("CARGO_PKG_VERSION"));
        stream.write_all(line.as_bytes()).await?;
        stream.shutdown().await
    };
    tokio::time::timeout(GREET, greet)
        .await
        .context("the host does not answer")?
        .with_context(|| format!("dialing port {port} of the host"))
}
