//! Telling the host that the agent serves, so that it need not ask again and again.

use std::{io, time::Duration};

use anyhow::{Context as _, Result};
use coreos_kvm_proto::{GREETING, PROTOCOL, READY_PORT, READY_PORT_ARGUMENT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{connections::Host, identity};

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

/// Dials the host at `port` and says who is there, and what is done already. What the host answers about the clock is done before
/// anything that the host asks for later.
pub(crate) async fn greet(host: &Host, port: u32, done: &[&str]) -> Result<()> {
    let mut greeting = format!("{GREETING} {PROTOCOL} {}", env!("CARGO_PKG_VERSION"));
    for what in done {
        greeting = greeting + " " + what;
    }
    let mut greeting = (greeting + "\n").into_bytes();
    let greet = async {
        let mut stream = host.dial(port).await?;
        // Nothing before and after it that takes long: for the host it is some time between taking the connection and hearing this.
        let clock = identity::adjust_clock(0, false).map_err(io::Error::other)?;
        greeting.extend_from_slice(&clock.to_be_bytes());
        stream.write_all(&greeting).await?;
        stream.flush().await?;
        Ok::<_, io::Error>(stream)
    };
    let mut stream = tokio::time::timeout(GREET, greet)
        .await
        .context("the host does not answer")?
        .with_context(|| format!("dialing port {port} of the host"))?;
    tokio::spawn(async move {
        // The host closes without an answer when it is going to ask.
        let answer = tokio::time::timeout(GREET, stream.read_i64()).await;
        if let Ok(Ok(behind)) = answer
            && let Err(error) = identity::adjust_clock(behind, false)
        {
            tracing::warn!(%error, "the clock is not set");
        }
    });
    Ok(())
}
