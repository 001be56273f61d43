//! Connections to the guest's loopback.

use std::{io, time::Duration};

use coreos_kvm_proto::{FORWARD_PORT, carry::CONNECTED};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use super::AgentClient;
use crate::vsock::VsockStream;

/// Longest time for the guest's answer: it asks at two addresses, each with a bound of 10 s.
const ANSWER: Duration = Duration::from_secs(25);

impl AgentClient {
    /// Connects to a TCP port of the guest's loopback. What follows on the stream is for [`coreos_kvm_proto::carry::carry`].
    ///
    /// # Errors
    /// `ConnectionRefused` when nobody listens there; else of the connection to the agent.
    pub async fn forward(&self, port: u16) -> io::Result<VsockStream> {
        let mut stream = self.dialer.dial(FORWARD_PORT).await?;
        let asked = async {
            stream.write_u16(port).await?;
            stream.flush().await?;
            stream.read_u8().await
        };
        match timeout(ANSWER, asked).await {
            Ok(Ok(CONNECTED)) => Ok(stream),
            Ok(Ok(_)) => Err(io::Error::new(
                io::ErrorKind::ConnectionRefused,
                format!("nothing in the guest listens at port {port}"),
            )),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
