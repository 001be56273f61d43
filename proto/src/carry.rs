//! A connection to a port of the guest's loopback, carried to whoever asked for it on the host.
//!
//! The host connects to [`FORWARD_PORT`](crate::FORWARD_PORT) and says which port it wants (u16, big endian). The agent answers one
//! byte: [`CONNECTED`], or anything else and nothing more. What follows are [frames](crate::frame), both ways.

use std::{
    io,
    pin::pin,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    time::timeout,
};

use crate::frame::{self, Frames};

/// The agent's answer when there is a connection.
pub const CONNECTED: u8 = 1;
/// The answer when nobody listens at the port.
pub const REFUSED: u8 = 0;

/// How much is read at a time, in bytes.
const CHUNK: usize = 32 * 1024;
/// How long one way may be silent once the other is at its end: whoever has closed both cannot be told from whoever has closed one.
const SILENCE: Duration = Duration::from_secs(60);
/// The same when the other way leads nowhere any more: what has been said already still arrives.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// How a way ended before its end.
enum Broken {
    /// Nothing more can come on it, and nobody knows what is missing.
    Source(io::Error),
    /// Nobody takes any more what comes.
    Sink,
}

/// Carries what comes on `connection` in frames on `stream`, and the other way round, until both ways are at their end or lead nowhere. A
/// way that leads nowhere does not keep the other from saying what it has to say.
///
/// # Errors
/// When something may be missing: of reading either, or `TimedOut` after a minute of silence on the way that is left. The other is then
/// not to be closed as if all had been said.
pub async fn carry(
    connection: &mut (impl AsyncRead + AsyncWrite + Unpin),
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
) -> io::Result<()> {
    let (mut input, mut output) = split(connection);
    let (mut from, mut to) = split(stream);
    let carried = AtomicU64::new(0);
    let mut there = pin!(async {
        let mut buffer = vec![0; frame::HEADER + CHUNK];
        loop {
            let count = input.read(&mut buffer[frame::HEADER..]).await.map_err(Broken::Source)?;
            let written = match count {
                0 => frame::write_end(&mut to).await,
                count => frame::write(&mut to, &mut buffer[..frame::HEADER + count]).await,
            };
            written.map_err(|_| Broken::Sink)?;
            if count == 0 {
                return Ok(());
            }
            carried.fetch_add(1, Ordering::Relaxed);
        }
    });
    let mut back = pin!(async {
        let mut frames = Frames::new(&mut from);
        while let Some(bytes) = frames.next().await.map_err(Broken::Source)? {
            output.write_all(bytes).await.map_err(|_| Broken::Sink)?;
            carried.fetch_add(1, Ordering::Relaxed);
        }
        output.shutdown().await.map_err(|_| Broken::Sink)
    });
    let (first, there_is_left) = tokio::select! {
        ended = &mut there => (ended, false),
        ended = &mut back => (ended, true),
    };
    let bound = match first {
        Ok(()) => SILENCE,
        Err(Broken::Sink) => LAST_WORDS,
        Err(Broken::Source(error)) => return Err(error),
    };
    loop {
        let before = carried.load(Ordering::Relaxed);
        let left = async {
            if there_is_left {
                (&mut there).await
            } else {
                (&mut back).await
            }
        };
        match timeout(bound, left).await {
            Ok(Ok(()) | Err(Broken::Sink)) => return Ok(()),
            Ok(Err(Broken::Source(error))) => return Err(error),
            Err(_) if carried.load(Ordering::Relaxed) == before => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
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
        let (mut near, mut host, mut far, mut guest) = (near, host, far, guest);
        let here = carry(&mut near, &mut host);
        let there = carry(&mut far, &mut guest);
        let (answer, heard, (), ()) = tokio::try_join!(asked, answered, here, there).unwrap();
        assert!(heard == question);
        assert_eq!(answer, b"so it is");
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_is_an_error() {
        let (_client, mut near) = duplex(100);
        let (mut host, guest) = duplex(100);
        drop(guest);
        assert!(carry(&mut near, &mut host).await.is_err());
    }

    #[tokio::test]
    async fn an_answer_arrives_although_the_question_is_not_heard_to_its_end() {
        let (client, mut near) = duplex(100);
        let (mut host, mut guest) = duplex(1000);
        let (mut far, mut server) = duplex(100);
        let asked = async {
            let (mut read, mut write) = split(client);
            let mut answer = Vec::new();
            let ask = async {
                // Until nobody takes it any more.
                while write.write_all(&[b'?'; 1000]).await.is_ok() {}
            };
            let hear = async {
                read.read_to_end(&mut answer).await.unwrap();
            };
            tokio::select! {
                () = ask => {}
                () = hear => {}
            }
            answer
        };
        let answered = async {
            server.read_exact(&mut [0; 10]).await.unwrap();
            server.write_all(b"that is too much").await.unwrap();
            drop(server);
        };
        let there = async {
            let carried = carry(&mut far, &mut guest).await;
            drop(guest);
            carried
        };
        let (answer, (), here, there) = tokio::join!(asked, answered, carry(&mut near, &mut host), there);
        assert_eq!(String::from_utf8_lossy(&answer), "that is too much");
        // Whether the end was reached before the break was seen differs; nothing is missing either way.
        drop((here, there));
    }

    #[tokio::test(start_paused = true)]
    async fn a_way_that_is_silent_after_the_end_of_the_other_is_given_up() {
        let (client, mut near) = duplex(100);
        let (mut host, _guest) = duplex(100);
        drop(client);
        let error = carry(&mut near, &mut host).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
