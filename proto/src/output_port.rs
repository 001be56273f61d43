//! How a process's output comes when there is much of it: not on its own connection, but on a serial port of the machine's
//! ([`OUTPUT_SERIAL_PORT`](crate::OUTPUT_SERIAL_PORT)), on which bytes cost guest and host less. One stream has the port at a time.
//!
//! The host says in a stream's hello that it takes output there. Then:
//!
//! 1. The agent says on the connection that the stream turns away ([`Step::Turn`](crate::frame::Step::Turn)).
//! 2. The host says [`Word::Go`] on the connection. What follows are frames on the port.
//! 3. The agent says on the port that the stream turns back, and the host [`Word::Done`] on the connection. What follows are frames there, and
//!    the port is free.
//!
//! A host that wants no more output says [`Word::Stop`] at any time after the first turn, and reads on until the stream has turned back, so that
//! nothing of it is left on the port for the next one. If the connection ends before the first word, nothing has come on the port.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// What the host says on the connection of a stream of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Word {
    /// The port is read.
    Go = 1,
    /// Whatever follows is for nobody.
    Stop = 2,
    /// All that came on the port has been read.
    Done = 3,
}

impl Word {
    /// # Errors
    /// Of the connection.
    pub async fn say(self, connection: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
        connection.write_u8(self as u8).await?;
        connection.flush().await
    }

    /// Waits for a word. Nothing is lost when it is not waited for to the end.
    ///
    /// # Errors
    /// Of the connection, also when it has ended; `InvalidData` for what is no word.
    pub async fn hear(connection: &mut (impl AsyncRead + Unpin)) -> io::Result<Self> {
        let mut word = [0];
        match connection.read(&mut word).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => [Self::Go, Self::Stop, Self::Done]
                .into_iter()
                .find(|known| *known as u8 == word[0])
                .ok_or(io::ErrorKind::InvalidData.into()),
        }
    }
}
