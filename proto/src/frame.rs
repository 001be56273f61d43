//! Frames on a stream connection: a length (u32, big endian, at most [`FRAME_MAX`]) and so many bytes; a length of 0 is the
//! end of the stream. The end travels in band because not every vsock device carries a half-closed connection.

use std::io;

use protobuf::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{FRAME_MAX, agent::StreamHello};

/// Longest [`StreamHello`], in bytes.
const HELLO_MAX: usize = 4096;

/// Reads one frame into `buffer`, whose former content is lost; false at the end of the stream.
///
/// # Errors
/// Of the connection, also when it ends without the frame that says so; `InvalidData` for a frame that is too long.
pub async fn read(reader: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<bool> {
    read_at_most(reader, buffer, FRAME_MAX).await
}

async fn read_at_most(reader: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>, most: usize) -> io::Result<bool> {
    buffer.clear();
    let length = reader.read_u32().await?;
    match usize::try_from(length) {
        Ok(length) if length <= most => {
            buffer.resize(length, 0);
            reader.read_exact(buffer).await?;
            Ok(length > 0)
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a frame of {length} bytes is longer than the {most} that are allowed"),
        )),
    }
}

/// Space for the length before a frame's bytes; see [`write`].
pub const HEADER: usize = 4;

/// Writes one frame. `buffer` begins with [`HEADER`] bytes of space, the frame's bytes follow: header and content thereby go
/// out at once, without being copied.
///
/// # Errors
/// Of the connection; `InvalidInput` for a frame that is too long or has no space for its header.
pub async fn write(writer: &mut (impl AsyncWrite + Unpin), buffer: &mut [u8]) -> io::Result<()> {
    let length = buffer.len().checked_sub(HEADER).filter(|length| *length <= FRAME_MAX);
    let length = length.and_then(|length| u32::try_from(length).ok());
    let length = length.ok_or(io::ErrorKind::InvalidInput)?;
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
    let mut buffer = Vec::new();
    read_at_most(reader, &mut buffer, HELLO_MAX).await?;
    Ok(StreamHello::parse_from_bytes(&buffer)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read_all(bytes: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let (mut reader, mut frames, mut buffer) = (bytes, Vec::new(), Vec::new());
        while read(&mut reader, &mut buffer).await? {
            frames.push(buffer.clone());
        }
        Ok(frames)
    }

    #[tokio::test]
    async fn frames_come_out_as_they_went_in() {
        let mut wire = Vec::new();
        write(&mut wire, &mut b"\0\0\0\0one".to_vec()).await.unwrap();
        write(&mut wire, &mut vec![7; HEADER + FRAME_MAX]).await.unwrap();
        write_end(&mut wire).await.unwrap();
        let frames = read_all(&wire).await.unwrap();
        assert_eq!(frames, [b"one".to_vec(), vec![7; FRAME_MAX]]);
    }

    #[tokio::test]
    async fn an_end_without_a_word_is_an_error() {
        let error = read_all(b"\0\0\0\x03one").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        assert_eq!(
            read_all(&[0xff; 8]).await.unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let mut wire = Vec::new();
        assert!(write(&mut wire, &mut vec![0; HEADER + FRAME_MAX + 1]).await.is_err());
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
