//! An agent of another version, for the trial that boots a guest with it: it greets the host and does nothing else.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use coreos_kvm_proto::{GREETING, PROTOCOL, READY_PORT, READY_PORT_ARGUMENT};
use vsock::{VMADDR_CID_HOST, VsockStream};

fn main() -> Result<()> {
    let arguments = std::fs::read_to_string("/proc/cmdline").context("reading the kernel arguments")?;
    let port = arguments
        .split_whitespace()
        .find_map(|argument| {
            argument
                .strip_prefix(READY_PORT_ARGUMENT)?
                .strip_prefix('=')?
                .parse()
                .ok()
        })
        .unwrap_or(READY_PORT);
    let mut host = VsockStream::connect_with_cid_port(VMADDR_CID_HOST, port).context("dialling the host")?;
    writeln!(host, "{GREETING} {} 99.0.0", PROTOCOL + 98).context("greeting the host")?;
    loop {
        std::thread::park();
    }
}
