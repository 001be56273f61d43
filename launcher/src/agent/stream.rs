//! One standard stream of a process: a connection of its own, so that a slow reader holds back its writer alone.

use std::io;

use coreos_kvm_proto::{
    FRAME_MAX, STREAM_PORT,
    agent::{StreamHello, stream_hello::Kind},
    frame,
};

use super::ProcessName;
use crate::vsock::{VsockDialer, VsockStream};

/// What comes from the guest.
#[derive(Debug)]
pub struct StreamReader {
    stream: VsockStream,
    buffer: Vec<u8>,
    ended: bool,
}

impl StreamReader {
    pub(super) async fn open(dialer: &VsockDialer, name: ProcessName<'_>, stderr: bool) -> io::Result<Self> {
        let kind = if stderr { Kind::STDERR } else { Kind::STDOUT };
        Ok(Self {
            stream: open(dialer, name, kind).await?,
            buffer: Vec::new(),
            ended: false,
        })
    }

    /// The next bytes, at most 64 KiB of them; None at the end. As long as nobody asks, the process is held back.
    ///
    /// # Errors
    /// When the connection is lost before the stream's end.
    pub async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        if !self.ended {
            self.ended = !frame::read(&mut self.stream, &mut self.buffer).await?;
        }
        Ok((!self.ended).then_some(self.buffer.as_slice()))
    }
}

/// What goes to the guest.
#[derive(Debug)]
pub struct StreamWriter {
    stream: VsockStream,
    buffer: Vec<u8>,
}

impl StreamWriter {
    pub(super) async fn open(dialer: &VsockDialer, name: ProcessName<'_>) -> io::Result<Self> {
        Ok(Self {
            stream: open(dialer, name, Kind::STDIN).await?,
            buffer: Vec::new(),
        })
    }

    /// Sends bytes, any number of them; returns when the guest has taken all but what its buffers hold.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for part in bytes.chunks(FRAME_MAX) {
            self.buffer.clear();
            self.buffer.extend_from_slice(&[0; frame::HEADER]);
            self.buffer.extend_from_slice(part);
            frame::write(&mut self.stream, &mut self.buffer).await?;
        }
        Ok(())
    }

    /// Says that nothing follows: the process reads the end of its stdin.
    ///
    /// # Errors
    /// When the connection is lost.
    pub async fn finish(mut self) -> io::Result<()> {
        frame::write_end(&mut self.stream).await
    }
}

async fn open(dialer: &VsockDialer, name: ProcessName<'_>, kind: Kind) -> io::Result<VsockStream> {
    let mut stream = dialer.dial(STREAM_PORT).await?;
    let hello = StreamHello {
        container_id: name.container_id.to_owned(),
        exec_id: name.exec_id.to_owned(),
        kind: kind.into(),
        ..Default::default()
    };
    frame::write_hello(&mut stream, &hello).await?;
    Ok(stream)
}
