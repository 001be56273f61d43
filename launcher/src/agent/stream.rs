//! One standard stream of a process: a connection of its own, so that a slow reader holds back its writer alone.

use std::io;

use coreos_kvm_proto::{
    STREAM_PORT,
    agent::{StreamHello, stream_hello::Kind},
    frame,
};

use super::{
    ProcessName,
    output::{OutputWindow, StreamReader},
};
use crate::vsock::{VsockDialer, VsockStream};

/// A connection of which the guest has not been told yet which stream it is for.
#[derive(Debug)]
pub struct Stream {
    connection: VsockStream,
    window: Option<OutputWindow>,
}

impl Stream {
    pub(super) async fn dial(dialer: &VsockDialer, window: Option<OutputWindow>) -> io::Result<Self> {
        let connection = dialer.dial(STREAM_PORT).await?;
        Ok(Self { connection, window })
    }

    /// It is what the process writes to its stdout or stderr.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn output(mut self, name: ProcessName<'_>, stderr: bool) -> io::Result<StreamReader> {
        let kind = if stderr { Kind::STDERR } else { Kind::STDOUT };
        self.say(name, kind).await?;
        Ok(StreamReader::new(self.connection, self.window))
    }

    /// It is the process's stdin.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn input(mut self, name: ProcessName<'_>) -> io::Result<StreamWriter> {
        self.say(name, Kind::STDIN).await?;
        Ok(StreamWriter {
            stream: self.connection,
            buffer: Vec::new(),
        })
    }

    async fn say(&mut self, name: ProcessName<'_>, kind: Kind) -> io::Result<()> {
        let hello = StreamHello {
            container_id: name.container_id.to_owned(),
            exec_id: name.exec_id.to_owned(),
            kind: kind.into(),
            output_window: self.window.is_some(),
            ..Default::default()
        };
        frame::write_hello(&mut self.connection, &hello).await
    }
}

/// What goes to the guest.
#[derive(Debug)]
pub struct StreamWriter {
    stream: VsockStream,
    buffer: Vec<u8>,
}

impl StreamWriter {
    /// Sends bytes, any number of them; returns when the guest has taken all but what its buffers hold.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.extend_from_slice(&[0; frame::HEADER]);
        self.buffer.extend_from_slice(bytes);
        frame::write(&mut self.stream, &mut self.buffer).await
    }

    /// Says that nothing follows: the process reads the end of its stdin.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn finish(mut self) -> io::Result<()> {
        frame::write_end(&mut self.stream).await
    }
}
