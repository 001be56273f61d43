//! A connection to a port of the guest's loopback, carried to whoever asked for it on the host.
//!
//! The host connects to [`FORWARD_PORT`](crate::FORWARD_PORT) and says which port it wants (u16, big endian). The agent answers one
//! byte: [`CONNECTED`], or anything else and nothing more. What follows are [frames](crate::frame), both ways.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split};

use crate::frame;

/// The agent's answer when there is a connection.
pub const CONNECTED: u8 = 1;
/// The answer when nobody listens at the port.
pub const REFUSED: u8 = 0;

/// How much is read at a time, in bytes.
const CHUNK: usize = 32 * 1024;

/// Carries what comes on `connection` in frames on `stream`, and the other way round, until both ways are at their end.
///
/// # Errors
/// Of either; the other is then to be closed, too.
pub async fn carry(
    connection: impl AsyncRead + AsyncWrite + Unpin,
    stream: impl AsyncRead + AsyncWrite + Unpin,
) -> io::Result<()> {
    let (mut input, mut output) = split(connection);
    let (mut from, mut to) = split(stream);
    let there = async {
        let mut buffer = vec![0; frame::HEADER + CHUNK];
        loop {
            match input.read(&mut buffer[frame::HEADER..]).await? {
                0 => return frame::write_end(&mut to).await,
                count => frame::write(&mut to, &mut buffer[..frame::HEADER + count]).await?,
            }
        }
    };
    let back = async {
        let mut buffer = Vec::new();
        while frame::read(&mut from, &mut buffer).await? {
            output.write_all(&buffer).await?;
        }
        output.shutdown().await
    };
    tokio::try_join!(there, back).map(drop)
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    #[tokio::test]
    async fn each_way_ends_by_itself() {
        let (client, near) = duplex(100);
        let (host, guest) = duplex(100);
        let (far, server) = duplex(100);
        let question = vec![b'?'; 100_000];
        let asked = async {
            let (mut read, mut write) = split(client);
            let ask = async {
                write.write_all(&question).await?;
                write.shutdown().await
            };
            let mut answer = Vec::new();
            tokio::try_join!(ask, read.read_to_end(&mut answer)).map(|_| answer)
        };
        let answered = async {
            let (mut read, mut write) = split(server);
            let mut heard = Vec::new();
            // Answers only once the question is at its end.
            read.read_to_end(&mut heard).await?;
            write.write_all(b"so it is").await?;
            write.shutdown().await?;
            io::Result::Ok(heard)
        };
        let (answer, heard, (), ()) = tokio::try_join!(asked, answered, carry(near, host), carry(far, guest)).unwrap();
        assert!(heard == question);
        assert_eq!(answer, b"so it is");
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_is_an_error() {
        let (_client, near) = duplex(100);
        let (host, guest) = duplex(100);
        drop(guest);
        assert!(carry(near, host).await.is_err());
    }
}
