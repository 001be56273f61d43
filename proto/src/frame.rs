//! Frames on a stream connection: a length (u32, big endian) and so many bytes; a length of 0 is the end of the stream, and 2^32 - 1 that
//! it goes on elsewhere ([`crate::output_window`]). The end travels in band because not every vsock device carries a half-closed connection.

use std::io;

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::agent::StreamHello;

/// Longest [`StreamHello`], in bytes.
const HELLO_MAX: usize = 4096;
/// How much is read at a time, in bytes: what a pipe holds by default (pipe(7)).
const CHUNK: usize = 64 * 1024;
/// Length of a frame that is [`Step::Turn`].
const TURN: u32 = u32::MAX;

/// The bytes of a stream that comes in frames, as they arrive: how long a frame is says its sender, and costs its reader nothing.
#[derive(Debug)]
pub struct Frames<R> {
    reader: R,
    buffer: Vec<u8>,
    /// What has arrived of the next frame's length.
    header: [u8; HEADER],
    header_read: usize,
    /// Bytes of the frame that have not been read.
    rest: u32,
    ended: bool,
}

/// What comes next in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// [`Frames::bytes`].
    Bytes,
    /// The stream goes on elsewhere.
    Turn,
    /// Nothing follows, nor will it.
    End,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// Of a connection on which nothing but frames follows.
    pub fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            header: [0; HEADER],
            header_read: 0,
            rest: 0,
            ended: false,
        }
    }

    /// The next bytes, at most 64 KiB of them; None at the end of the stream.
    ///
    /// # Errors
    /// Of the connection, also when it ends without the frame that says so; `InvalidData` when the stream is to go on elsewhere.
    pub async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        match self.step().await? {
            Step::Bytes => Ok(Some(self.bytes())),
            Step::End => Ok(None),
            Step::Turn => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Reads on. Nothing is lost when it is not waited for to the end.
    ///
    /// # Errors
    /// Of the connection, also when it ends without the frame that says so.
    pub async fn step(&mut self) -> io::Result<Step> {
        if self.rest == 0 && !self.ended {
            match self.read_length().await? {
                TURN => return Ok(Step::Turn),
                length => self.rest = length,
            }
            self.ended = self.rest == 0;
        }
        if self.ended {
            return Ok(Step::End);
        }
        self.buffer.clear();
        self.buffer.reserve(CHUNK);
        let mut frame = (&mut self.reader).take(u64::from(self.rest).min(CHUNK as u64));
        match frame.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                // As long as `rest` at most.
                self.rest -= count as u32;
                Ok(Step::Bytes)
            }
        }
    }

    /// What the last step has read, at most 64 KiB.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer
    }

    /// What the frames come from.
    pub fn get_mut(&mut self) -> &mut R {
        &mut self.reader
    }

    async fn read_length(&mut self) -> io::Result<u32> {
        while self.header_read < HEADER {
            match self.reader.read(&mut self.header[self.header_read..]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.header_read += count,
            }
        }
        self.header_read = 0;
        Ok(u32::from_be_bytes(self.header))
    }
}

/// Space for the length before a frame's bytes; see [`write`].
pub const HEADER: usize = 4;

/// Writes one frame. `buffer` begins with [`HEADER`] bytes of space, the frame's bytes follow: header and content thereby go
/// out at once, without being copied.
///
/// # Errors
/// Of the connection; `InvalidInput` for a frame of 4 GiB - 1 or more, or one that has no space for its header.
pub async fn write(writer: &mut (impl AsyncWrite + Unpin), buffer: &mut [u8]) -> io::Result<()> {
    let length = buffer.len().checked_sub(HEADER);
    let length = length.and_then(|length| u32::try_from(length).ok());
    let length = length
        .filter(|length| *length != TURN)
        .ok_or(io::ErrorKind::InvalidInput)?;
    buffer[..HEADER].copy_from_slice(&length.to_be_bytes());
    writer.write_all(buffer).await
}

/// Writes the end of the stream.
///
/// # Errors
/// Of the connection.
pub async fn write_end(writer: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    write(writer, &mut [0; HEADER]).await
}

/// Writes that the stream goes on elsewhere.
///
/// # Errors
/// Of the connection.
pub async fn write_turn(writer: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    writer.write_all(&TURN.to_be_bytes()).await
}

/// Opens a stream connection.
///
/// # Errors
/// Of the connection.
pub async fn write_hello(writer: &mut (impl AsyncWrite + Unpin), hello: &StreamHello) -> io::Result<()> {
    let mut buffer = vec![0; HEADER];
    hello.write_to_vec(&mut buffer)?;
    write(writer, &mut buffer).await
}

/// Reads what opens a stream connection.
///
/// # Errors
/// Of the connection; `InvalidData` for anything else than a [`StreamHello`] of at most 4 KiB.
pub async fn read_hello(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<StreamHello> {
    let length = reader.read_u32().await?;
    let length = usize::try_from(length).ok().filter(|length| *length <= HELLO_MAX);
    let length = length.ok_or(io::ErrorKind::InvalidData)?;
    let mut buffer = vec![0; length];
    reader.read_exact(&mut buffer).await?;
    Ok(StreamHello::parse_from_bytes(&buffer)?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    async fn read_all(bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let (mut frames, mut all) = (Frames::new(bytes), Vec::new());
        while let Some(bytes) = frames.next().await? {
            all.push(bytes.to_vec());
        }
        Ok(all)
    }

    #[tokio::test]
    async fn frames_come_out_as_they_went_in() {
        let mut wire = Vec::new();
        write(&mut wire, &mut b"\0\0\0\0one".to_vec()).await.unwrap();
        write(&mut wire, &mut vec![7; HEADER + CHUNK]).await.unwrap();
        write_end(&mut wire).await.unwrap();
        assert_eq!(read_all(&wire).await.unwrap(), [b"one".to_vec(), vec![7; CHUNK]]);
    }

    #[tokio::test]
    async fn a_turn_is_told_from_bytes_and_from_the_end() {
        let mut wire = Vec::new();
        write(&mut wire, &mut b"\0\0\0\0one".to_vec()).await.unwrap();
        write_turn(&mut wire).await.unwrap();
        write_end(&mut wire).await.unwrap();
        let mut frames = Frames::new(wire.as_slice());
        for expected in [Step::Bytes, Step::Turn, Step::End, Step::End] {
            assert_eq!(frames.step().await.unwrap(), expected);
        }
        let error = read_all(&TURN.to_be_bytes()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_step_that_is_given_up_loses_nothing() {
        let (host, mut guest) = tokio::io::duplex(64);
        let (mut frames, mut received) = (Frames::new(host), Vec::new());
        for byte in *b"\0\0\0\x03one" {
            guest.write_u8(byte).await.unwrap();
            if let Ok(step) = timeout(Duration::ZERO, frames.step()).await {
                assert_eq!(step.unwrap(), Step::Bytes);
                received.extend_from_slice(frames.bytes());
            }
        }
        assert_eq!(received, b"one");
    }

    #[tokio::test]
    async fn a_long_frame_comes_in_pieces_before_all_of_it_is_there() {
        let (host, mut guest) = tokio::io::duplex(3 * CHUNK);
        let sent: Vec<u8> = (0..=255).cycle().take(3 * CHUNK).collect();
        let (mut frames, mut received) = (Frames::new(host), Vec::new());
        guest.write_u32(sent.len().try_into().unwrap()).await.unwrap();
        for piece in sent.chunks(100_000) {
            guest.write_all(piece).await.unwrap();
            let before = received.len();
            while received.len() < before + piece.len() {
                received.extend_from_slice(frames.next().await.unwrap().unwrap());
            }
        }
        assert!(received == sent);
        write_end(&mut guest).await.unwrap();
        assert_eq!(frames.next().await.unwrap(), None);
        assert_eq!(frames.next().await.unwrap(), None, "the end stays the end");
    }

    #[tokio::test]
    async fn an_end_without_a_word_is_an_error() {
        for cut_short in [&b""[..], b"\0\0", b"\0\0\0\x03", b"\0\0\0\x03one"] {
            let error = read_all(cut_short).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{cut_short:?}");
        }
    }

    #[tokio::test]
    async fn a_hello_that_is_too_long_is_refused_before_it_is_read() {
        let error = read_hello(&mut [0xff; 8].as_slice()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_hello_survives_the_way() {
        let hello = StreamHello {
            container_id: "a".to_owned(),
            exec_id: "b".to_owned(),
            ..Default::default()
        };
        let mut wire = Vec::new();
        write_hello(&mut wire, &hello).await.unwrap();
        assert_eq!(read_hello(&mut wire.as_slice()).await.unwrap(), hello);
    }
}
