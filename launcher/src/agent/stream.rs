//! One standard stream of a process: a connection of its own, so that a slow reader holds back its writer alone.

use std::io;

use coreos_kvm_proto::{
    STREAM_PORT,
    agent::{StreamHello, stream_hello::Kind},
    frame::{self, Frames},
};

use super::ProcessName;
use crate::vsock::{VsockDialer, VsockStream};

/// A connection of which the guest has not been told yet which stream it is for.
#[derive(Debug)]
pub struct Stream(VsockStream);

impl Stream {
    pub(super) async fn dial(dialer: &VsockDialer) -> io::Result<Self> {
        dialer.dial(STREAM_PORT).await.map(Self)
    }

    /// It is what the process writes to its stdout or stderr.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn output(self, name: ProcessName<'_>, stderr: bool) -> io::Result<StreamReader> {
        let kind = if stderr { Kind::STDERR } else { Kind::STDOUT };
        Ok(StreamReader(Frames::new(self.named(name, kind).await?)))
    }

    /// It is the process's stdin.
    ///
    /// # Errors
    /// Of the connection.
    pub async fn input(self, name: ProcessName<'_>) -> io::Result<StreamWriter> {
        Ok(StreamWriter {
            stream: self.named(name, Kind::STDIN).await?,
            buffer: Vec::new(),
        })
    }

    async fn named(self, name: ProcessName<'_>, kind: Kind) -> io::Result<VsockStream> {
        let Self(mut stream) = self;
        let hello = StreamHello {
            container_id: name.container_id.to_owned(),
            exec_id: name.exec_id.to_owned(),
            kind: kind.into(),
            ..Default::default()
        };
        frame::write_hello(&mut stream, &hello).await?;
        Ok(stream)
    }
}

/// What comes from the guest.
#[derive(Debug)]
pub struct StreamReader(Frames<VsockStream>);

impl StreamReader {
    /// The next bytes, at most 64 KiB of them; None at the end. As long as nobody asks, the process is held back.
    ///
    /// # Errors
    /// When the connection is lost before the stream's end.
    pub async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        self.0.next().await
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
