//! `ignition-validate` of Debian's package, the version that the reference guest boots with.

use std::io::Write;
use std::process::{Command, Stdio};

use crate::tools;

/// Ignition's specs that Debian's package knows.
pub(crate) const KNOWN: [&str; 4] = ["3.0.0", "3.1.0", "3.2.0", "3.3.0"];

/// The warnings, or everything that is wrong with it.
pub(crate) fn validate(config: &str) -> Result<String, String> {
    let mut child = Command::new(tools::ignition_validate())
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("ignition-validate starts");
    // It reads all of its input before it says anything, so the pipes cannot fill up against each other.
    let mut pipe = child.stdin.take().expect("a pipe was asked for");
    pipe.write_all(config.as_bytes()).expect("ignition-validate reads");
    drop(pipe);
    let output = child.wait_with_output().expect("ignition-validate ends");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(said) } else { Err(said) }
}
