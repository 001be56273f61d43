//! What a process of the guest writes: it comes on a connection of its own, and, when there is much of it, in memory that the machine
//! shares with the host ([`coreos_kvm_proto::output_window`]).

use std::{io, sync::Arc};

use coreos_kvm_proto::{
    frame::{Frames, Step},
    output_window::{Reader, SIZE, Word},
};
use tokio::{
    io::AsyncReadExt as _,
    net::UnixStream,
    sync::{Mutex, OwnedMutexGuard},
};

use crate::vsock::VsockStream;

/// So much is read for nobody, in bytes: more than an agent has written before it hears that nobody wants it. If it goes on, the next stream has
/// the rest.
const REST_MAX: usize = 4 * SIZE;

/// The host's side of the window, which one stream has at a time.
#[derive(Debug, Clone)]
pub struct OutputWindow(Arc<Mutex<Open>>);

#[derive(Debug)]
struct Open {
    reader: Reader,
    /// To wake the guest, and to be woken.
    bell: UnixStream,
}

/// What comes from the guest. Dropping it while it comes in the window has the rest of it read for nobody, so that the next stream finds the
/// window as it should be.
#[derive(Debug)]
pub struct StreamReader(Option<Ways>);

/// Where it comes from.
#[derive(Debug)]
struct Ways {
    connection: Frames<VsockStream>,
    window: Option<OutputWindow>,
    /// The window while it is this stream's.
    held: Option<OwnedMutexGuard<Open>>,
}

impl OutputWindow {
    pub(crate) fn new(reader: Reader, bell: UnixStream) -> Self {
        Self(Arc::new(Mutex::new(Open { reader, bell })))
    }
}

impl Open {
    /// Reads on. Nothing is lost when it is not waited for to the end.
    ///
    /// # Errors
    /// `InvalidData` when the guest says what cannot be.
    async fn step(&mut self) -> io::Result<Step> {
        loop {
            if let Some(step) = self.reader.step()? {
                if self.reader.frees() {
                    // If there is no room for it, there are others, of which one is enough.
                    let _ = self.bell.try_write(&[0]);
                }
                return Ok(step);
            }
            if !self.reader.waits() {
                // A guest that says one thing and then another must not stop others.
                tokio::task::yield_now().await;
            } else if self.bell.read(&mut [0; 64]).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl StreamReader {
    pub(super) fn new(connection: VsockStream, window: Option<OutputWindow>) -> Self {
        Self(Some(Ways {
            connection: Frames::new(connection),
            window,
            held: None,
        }))
    }

    /// The next bytes, at most 64 KiB of them; None at the end. As long as nobody asks, the process is held back. When this is not waited for to its
    /// end, the stream is to be dropped.
    ///
    /// # Errors
    /// When the connection is lost before the stream's end; `InvalidData` when the guest turns to a window that the machine has not, or says
    /// there what cannot be.
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
                        let OutputWindow(window) = self.window.clone().ok_or_else(nonsense)?;
                        // Mostly free: the guest waits for the host's word before it turns again.
                        self.held = Some(window.lock_owned().await);
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
        Ok(self.held.as_deref().map(|held| held.reader.bytes()))
    }

    /// Reads for nobody, until the window is free. The connection stays meanwhile: the guest must not take the window for free before.
    async fn free_window(mut self) {
        let Some(mut held) = self.held.take() else {
            return;
        };
        // Also when the guest does not hear it.
        let _ = Word::Stop.say(self.connection.get_mut()).await;
        let mut read = 0;
        while read < REST_MAX && matches!(held.step().await, Ok(Step::Bytes)) {
            read += held.reader.bytes().len();
            // A guest that does not stop must not stop others.
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        if let (Some(ways), Ok(runtime)) = (self.0.take(), tokio::runtime::Handle::try_current())
            && ways.held.is_some()
        {
            runtime.spawn(ways.free_window());
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
    use std::fs::File;

    use coreos_kvm_proto::{frame, output_window::Writer};
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// The guest's side of the window.
    struct Guest {
        writer: Writer,
        bell: UnixStream,
        memory: File,
    }

    impl Guest {
        async fn write(&mut self, mut bytes: &[u8]) {
            while !bytes.is_empty() {
                while self.writer.waits() {
                    self.bell.read_u8().await.unwrap();
                }
                let room = self.writer.room();
                let count = room.len().min(bytes.len());
                room[..count].copy_from_slice(&bytes[..count]);
                bytes = &bytes[count..];
                if self.writer.wrote(count) {
                    self.bell.write_u8(0).await.unwrap();
                }
            }
        }

        async fn turn(&mut self) {
            if self.writer.turn() {
                self.bell.write_u8(0).await.unwrap();
            }
        }

        /// Says what cannot be: that it has written more than there is room for.
        fn lie(&self) {
            std::os::unix::fs::FileExt::write_all_at(&self.memory, &[0xff; 8], 0).unwrap();
        }
    }

    fn window() -> (OutputWindow, Guest) {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(SIZE as u64).unwrap();
        let (ours, bell) = UnixStream::pair().unwrap();
        let reader = Reader::open(memory.try_clone().unwrap()).unwrap();
        let writer = Writer::open(&memory).unwrap();
        (OutputWindow::new(reader, ours), Guest { writer, bell, memory })
    }

    /// A stream, and its connection as the guest has it.
    fn stream(window: &OutputWindow) -> (StreamReader, Frames<UnixStream>) {
        let (host, guest) = UnixStream::pair().unwrap();
        (
            StreamReader::new(VsockStream::from(host), Some(window.clone())),
            Frames::new(guest),
        )
    }

    async fn send(to: &mut UnixStream, bytes: &[u8]) {
        frame::write(to, &mut [&[0; frame::HEADER], bytes].concat())
            .await
            .unwrap();
    }

    /// A stream that has turned to the window, where `bytes` have been read, and its connection as the guest has it.
    async fn turned(window: &OutputWindow, guest: &mut Guest, bytes: &[u8]) -> (StreamReader, Frames<UnixStream>) {
        let (mut reader, mut connection) = stream(window);
        frame::write_turn(connection.get_mut()).await.unwrap();
        guest.write(bytes).await;
        assert_eq!(reader.next().await.unwrap(), Some(bytes));
        (reader, connection)
    }

    #[tokio::test]
    async fn a_stream_goes_to_the_window_and_comes_back() {
        let (window, mut guest) = window();
        let much: Vec<u8> = (0..=250).cycle().take(5 * SIZE + 1).collect();
        for _ in 0..2 {
            let (mut reader, mut connection) = stream(&window);
            let guest = async {
                send(connection.get_mut(), b"one ").await;
                frame::write_turn(connection.get_mut()).await.unwrap();
                assert_eq!(Word::hear(connection.get_mut()).await.unwrap(), Word::Go);
                guest.write(b"two ").await;
                guest.write(&much).await;
                guest.turn().await;
                assert_eq!(Word::hear(connection.get_mut()).await.unwrap(), Word::Done);
                send(connection.get_mut(), b"three").await;
                frame::write_end(connection.get_mut()).await.unwrap();
            };
            let host = async {
                let mut all = Vec::new();
                while let Some(bytes) = reader.next().await.unwrap() {
                    all.extend_from_slice(bytes);
                }
                all
            };
            let ((), all) = tokio::join!(guest, host);
            assert!(all == [b"one two ", much.as_slice(), b"three"].concat());
        }
    }

    #[tokio::test]
    async fn the_rest_of_a_stream_that_nobody_wants_does_not_get_into_the_next_one() {
        let (window, mut guest) = window();
        let (reader, mut connection) = turned(&window, &mut guest, b"wanted").await;
        drop(reader);
        assert_eq!(Word::hear(connection.get_mut()).await.unwrap(), Word::Go);
        assert_eq!(Word::hear(connection.get_mut()).await.unwrap(), Word::Stop);
        // More than the window holds.
        guest.write(&vec![7; 3 * SIZE]).await;
        guest.turn().await;
        assert_eq!(
            Word::hear(connection.get_mut()).await.unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof,
            "the connection ends when the window is free"
        );

        turned(&window, &mut guest, b"next").await;
    }

    #[tokio::test]
    async fn a_guest_that_turns_out_of_turn_holds_back_that_stream_alone() {
        let (window, mut guest) = window();
        let (mut holder, _connection) = turned(&window, &mut guest, b"one").await;

        let (mut other, mut others_connection) = stream(&window);
        frame::write_turn(others_connection.get_mut()).await.unwrap();
        let other = tokio::spawn(async move { other.next().await.map(|bytes| bytes.map(<[u8]>::to_vec)) });

        guest.write(b"two").await;
        assert_eq!(holder.next().await.unwrap(), Some(&b"two"[..]));
        assert!(!other.is_finished());
        guest.lie();
        assert_eq!(holder.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        // A window in which was said what cannot be stays of no use.
        drop(holder);
        assert_eq!(other.await.unwrap().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_stream_of_which_nobody_asks_for_the_rest_yet_loses_nothing() {
        let (window, mut guest) = window();
        let (mut reader, _connection) = turned(&window, &mut guest, b"one").await;
        let waited = tokio::time::timeout(std::time::Duration::from_millis(10), reader.next());
        waited.await.unwrap_err();
        guest.write(b"two").await;
        assert_eq!(reader.next().await.unwrap(), Some(&b"two"[..]));
        drop(guest.bell);
        assert_eq!(reader.next().await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_turn_where_there_is_no_window_is_an_error() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let mut reader = StreamReader::new(VsockStream::from(host), None);
        frame::write_turn(&mut guest).await.unwrap();
        assert_eq!(reader.next().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
