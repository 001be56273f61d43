//! Messages on the agent's serial port of templates and clones: the length, 4 bytes, big-endian, and the message.

use std::io;

use coreos_kvm_proto::WAKE_MAX;
use protobuf::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

pub(super) async fn send(port: &mut UnixStream, message: &impl Message) -> io::Result<()> {
    let message = message.write_to_bytes().map_err(io::Error::other)?;
    let length = u32::try_from(message.len()).map_err(io::Error::other)?;
    port.write_all(&[&length.to_be_bytes(), message.as_slice()].concat())
        .await
}

/// Receives a message.
///
/// # Errors
/// Of the port; `InvalidData` when it is longer than an agent's, or another one.
pub(super) async fn receive<M: Message>(port: &mut UnixStream) -> io::Result<M> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let length = port.read_u32().await? as usize;
    if length > WAKE_MAX {
        return Err(invalid(format!("{length} bytes are too many")));
    }
    let mut message = vec![0; length];
    port.read_exact(&mut message).await?;
    M::parse_from_bytes(&message).map_err(|_| invalid("it is no message of an agent".to_owned()))
}
