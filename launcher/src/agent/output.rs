//! What a process of the guest writes: it comes on a connection of its own, and, when there is much of it, on a serial port of the
//! machine ([`coreos_kvm_proto::output_port`]).

use std::{io, sync::Arc};

use coreos_kvm_proto::{
    frame::{Frames, Step},
    output_port::Word,
};
use tokio::{
    net::UnixStream,
    sync::{Mutex, OwnedMutexGuard},
};

use crate::vsock::VsockStream;

/// The host's end of the port, which one stream has at a time.
#[derive(Debug, Clone)]
pub struct OutputPort(Arc<Mutex<Frames<UnixStream>>>);

/// What comes from the guest. Dropping it while it comes on the port has the rest of it read for nobody, so that the next stream finds the
/// port as it should be.
#[derive(Debug)]
pub struct StreamReader(Option<Ways>);

/// Where it comes from.
#[derive(Debug)]
struct Ways {
    connection: Frames<VsockStream>,
    port: Option<OutputPort>,
    /// The port while it is this stream's.
    held: Option<OwnedMutexGuard<Frames<UnixStream>>>,
}

impl OutputPort {
    pub(crate) fn new(port: UnixStream) -> Self {
        Self(Arc::new(Mutex::new(Frames::new(port))))
    }
}

impl StreamReader {
    pub(super) fn new(connection: VsockStream, port: Option<OutputPort>) -> Self {
        Self(Some(Ways {
            connection: Frames::new(connection),
            port,
            held: None,
        }))
    }

    /// The next bytes, at most 64 KiB of them; None at the end. As long as nobody asks, the process is held back. When this is not waited for to its
    /// end, the stream is to be dropped.
    ///
    /// # Errors
    /// When the connection is lost before the stream's end; `InvalidData` when the guest turns to a port that the machine has not.
    pub async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        match &mut self.0 {
            Some(ways) => ways.next().await,
            None => Ok(None),
        }
    }
}

impl Ways {
    async fn next(&mut self) -> io::Result<Option<&[u8]>> {
        loop {
            match &mut self.held {
                None => match self.connection.step().await? {
                    Step::Bytes => return Ok(Some(self.connection.bytes())),
                    Step::End => return Ok(None),
                    Step::Turn => {
                        let OutputPort(port) = self.port.clone().ok_or_else(nonsense)?;
                        // Mostly free: the guest waits for the host's word before it turns again.
                        self.held = Some(port.lock_owned().await);
                        Word::Go.say(self.connection.get_mut()).await?;
                    }
                },
                Some(held) => match held.step().await? {
                    Step::Bytes => break,
                    Step::End => return Err(nonsense()),
                    Step::Turn => {
                        self.held = None;
                        Word::Done.say(self.connection.get_mut()).await?;
                    }
                },
            }
        }
        Ok(self.held.as_deref().map(Frames::bytes))
    }

    /// Reads for nobody, until the port is free. The connection stays meanwhile: the guest must not take the port for free before.
    async fn free_port(mut self) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        // Also when the guest does not hear it.
        let _ = Word::Stop.say(self.connection.get_mut()).await;
        while let Ok(Step::Bytes) = held.step().await {}
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        if let (Some(ways), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current())
            && ways.held.is_some()
        {
            runtime.spawn(ways.free_port());
        }
    }
}

fn nonsense() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the guest's output turns to where it cannot come from",
    )
}

#[cfg(test)]
mod tests {
    use coreos_kvm_proto::frame;

    use super::*;

    /// A stream, its connection as the guest has it, and the guest's end of the port.
    fn stream(port: &OutputPort) -> (StreamReader, Frames<UnixStream>) {
        let (host, guest) = UnixStream::pair().unwrap();
        (
            StreamReader::new(VsockStream::from(host), Some(port.clone())),
            Frames::new(guest),
        )
    }

    fn port() -> (OutputPort, UnixStream) {
        let (host, guest) = UnixStream::pair().unwrap();
        (OutputPort::new(host), guest)
    }

    async fn send(to: &mut UnixStream, bytes: &[u8]) {
        frame::write(to, &mut [&[0; frame::HEADER], bytes].concat())
            .await
            .unwrap();
    }

    /// A stream that has turned to the port, where `bytes` have been read, and its connection as the guest has it.
    async fn turned(port: &OutputPort, serial: &mut UnixStream, bytes: &[u8]) -> (StreamReader, Frames<UnixStream>) {
        let (mut reader, mut guest) = stream(port);
        frame::write_turn(guest.get_mut()).await.unwrap();
        send(serial, bytes).await;
        assert_eq!(reader.next().await.unwrap(), Some(bytes));
        (reader, guest)
    }

    #[tokio::test]
    async fn a_stream_goes_to_the_port_and_comes_back() {
        let (port, mut serial) = port();
        for _ in 0..2 {
            let (mut reader, mut guest) = stream(&port);
            let guest = async {
                send(guest.get_mut(), b"one ").await;
                frame::write_turn(guest.get_mut()).await.unwrap();
                assert_eq!(Word::hear(guest.get_mut()).await.unwrap(), Word::Go);
                send(&mut serial, b"two ").await;
                send(&mut serial, b"three ").await;
                frame::write_turn(&mut serial).await.unwrap();
                assert_eq!(Word::hear(guest.get_mut()).await.unwrap(), Word::Done);
                send(guest.get_mut(), b"four").await;
                frame::write_end(guest.get_mut()).await.unwrap();
            };
            let host = async {
                let mut all = Vec::new();
                while let Some(bytes) = reader.next().await.unwrap() {
                    all.extend_from_slice(bytes);
                }
                all
            };
            let ((), all) = tokio::join!(guest, host);
            assert_eq!(all, b"one two three four");
        }
    }

    #[tokio::test]
    async fn the_rest_of_a_stream_that_nobody_wants_does_not_get_into_the_next_one() {
        let (port, mut serial) = port();
        let (reader, mut guest) = turned(&port, &mut serial, b"wanted").await;
        drop(reader);
        assert_eq!(Word::hear(guest.get_mut()).await.unwrap(), Word::Go);
        assert_eq!(Word::hear(guest.get_mut()).await.unwrap(), Word::Stop);
        // More than the port holds on its way.
        send(&mut serial, &vec![7; 1 << 20]).await;
        frame::write_turn(&mut serial).await.unwrap();
        assert_eq!(
            Word::hear(guest.get_mut()).await.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof,
            "the connection ends when the port is free"
        );

        turned(&port, &mut serial, b"next").await;
    }

    #[tokio::test]
    async fn a_guest_that_turns_out_of_turn_holds_back_that_stream_alone() {
        let (port, mut serial) = port();
        let (mut holder, _guest) = turned(&port, &mut serial, b"one").await;

        let (mut other, mut others_guest) = stream(&port);
        frame::write_turn(others_guest.get_mut()).await.unwrap();
        let other = tokio::spawn(async move { other.next().await.map(|bytes| bytes.map(<[u8]>::to_vec)) });

        send(&mut serial, b"two").await;
        assert_eq!(holder.next().await.unwrap(), Some(&b"two"[..]));
        assert!(!other.is_finished());
        frame::write_end(&mut serial).await.unwrap();
        assert_eq!(holder.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        // A port that has ended stays so.
        drop(holder);
        assert_eq!(other.await.unwrap().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_turn_where_there_is_no_port_is_an_error() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut reader = StreamReader::new(VsockStream::from(host), None);
        frame::write_turn(&mut guest).await.unwrap();
        assert_eq!(reader.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
