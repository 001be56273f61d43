//! What a guest has printed, on stdout.

use std::io::{self, IsTerminal, Write};

use coreos_kvm_launcher::console::harmless;

/// A line longer than this is shown in pieces.
const LINE: usize = 4096;

/// stdout: a terminal gets text that cannot move its cursor, for the guest chose it; a file gets every byte.
pub(crate) struct Output {
    stdout: io::Stdout,
    terminal: bool,
    /// The beginning of a line of which the end has not come yet.
    line: Vec<u8>,
}

impl Output {
    pub(crate) fn new() -> Self {
        let stdout = io::stdout();
        Self {
            terminal: stdout.is_terminal(),
            stdout,
            line: Vec::new(),
        }
    }

    /// # Errors
    /// When stdout cannot be written to.
    pub(crate) fn print(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.terminal {
            self.show(bytes)?;
        } else {
            self.stdout.write_all(bytes)?;
        }
        self.stdout.flush()
    }

    fn show(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.line.extend(bytes);
        while let Some(end) = self
            .line
            .iter()
            .position(|byte| *byte == b'\n')
            .or((self.line.len() > LINE).then_some(LINE))
        {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            write!(self.stdout, "{}", harmless(&String::from_utf8_lossy(&line)))?;
        }
        Ok(())
    }
}
