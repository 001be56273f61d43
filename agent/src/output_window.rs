//! The memory in which output comes when there is much of it, and who has it ([`coreos_kvm_proto::output_window`]).

use std::{
    fs::{self, File},
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use coreos_kvm_proto::{
    OUTPUT_SERIAL_PORT, frame,
    output_window::{Word, Writer},
};
use futures::FutureExt as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::Notify,
};

use crate::{devices::find_device, serial::SerialPort};

/// Vendor and kind of the device (docs/specs/ivshmem-spec.txt of QEMU).
const VENDOR: &str = "0x1af4";
const IVSHMEM: &str = "0x1110";
/// A stream that has the window keeps it so long without a use for it, when another one has.
const IDLE: Duration = Duration::from_millis(100);

/// The window.
#[derive(Default)]
pub(crate) struct OutputWindow {
    state: Mutex<State>,
    /// Another stream has a use for it.
    wanted: Notify,
}

#[derive(Default)]
enum State {
    /// Nobody has had a use for it.
    #[default]
    Unopened,
    Free(Open),
    /// A stream has it, or nobody can have it any more.
    Taken,
}

struct Open {
    writer: Writer,
    /// To wake the host, and to be woken.
    bell: SerialPort,
}

/// The window as long as one stream has it.
pub(crate) struct Held {
    /// None when it has failed.
    open: Option<Open>,
    home: Arc<OutputWindow>,
}

impl OutputWindow {
    /// Has a stream turn to the window, unless another one has it.
    ///
    /// # Errors
    /// When the host wants no more of the stream, or its connection has ended.
    pub(crate) async fn turn(
        self: &Arc<Self>,
        connection: &mut (impl AsyncRead + AsyncWrite + Unpin),
    ) -> io::Result<Option<Held>> {
        let Some(held) = self.take() else {
            self.wanted.notify_one();
            return Ok(None);
        };
        frame::write_turn(connection).await?;
        match Word::hear(connection).await? {
            Word::Go => Ok(Some(held)),
            Word::Stop => {
                held.turn_back(connection).await?;
                Err(unwanted())
            }
            Word::Done => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Waits until the window is of more use to another stream than to the one that has it.
    ///
    /// # Errors
    /// When the host wants no more of the latter.
    pub(crate) async fn call_back(&self, connection: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        let wanted = async {
            self.wanted.notified().await;
            tokio::time::sleep(IDLE).await;
        };
        tokio::select! {
            () = wanted => Ok(()),
            _ = Word::hear(connection) => Err(unwanted()),
        }
    }

    fn take(self: &Arc<Self>) -> Option<Held> {
        let mut state = self.state();
        let open = match std::mem::replace(&mut *state, State::Taken) {
            State::Free(open) => open,
            State::Unopened => match Open::of_machine() {
                Ok(open) => open,
                Err(error) => {
                    tracing::warn!(%error, "the memory for much output cannot be opened: all of it comes on connections");
                    return None;
                }
            },
            State::Taken => return None,
        };
        Some(Held {
            open: Some(open),
            home: self.clone(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(crate) fn of(memory: &File, bell: impl Into<std::os::fd::OwnedFd>) -> Arc<Self> {
        let open = Open {
            writer: Writer::open(memory).unwrap(),
            bell: SerialPort::of(bell.into()).unwrap(),
        };
        Arc::new(Self {
            state: Mutex::new(State::Free(open)),
            wanted: Notify::new(),
        })
    }
}

impl Held {
    /// Waits until there is room in the window, and answers where the next bytes go. Nothing is lost when it is not waited for to the end.
    ///
    /// # Errors
    /// When the window has failed; when the host wants no more.
    pub(crate) async fn room(&mut self, connection: &mut (impl AsyncRead + Unpin)) -> io::Result<&mut [u8]> {
        let open = self.open.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        while open.writer.waits() {
            let mut rung = [0; 64];
            tokio::select! {
                rung = open.bell.read(&mut rung) => match rung {
                    Ok(1..) => {}
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Err(error) => return Err(error),
                },
                _ = Word::hear(connection) => return Err(unwanted()),
            }
        }
        Ok(open.writer.room())
    }

    /// So many bytes are where [`room`](Self::room) has said.
    ///
    /// # Errors
    /// When the window fails; when the host wants no more.
    pub(crate) async fn wrote(&mut self, count: usize, connection: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        self.tell(|writer| writer.wrote(count)).await?;
        // Before its turn is over there is nothing else that the host can have to say.
        Word::hear(connection)
            .now_or_never()
            .map_or(Ok(()), |_| Err(unwanted()))
    }

    /// Has the stream turn back to its connection. Whoever comes next has the window when the host has read all that is in it.
    ///
    /// # Errors
    /// When the window fails; when the connection has ended.
    pub(crate) async fn turn_back(mut self, connection: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        self.tell(|writer| writer.turn()).await?;
        while Word::hear(connection).await? != Word::Done {}
        Ok(())
    }

    /// Wakes the host if `say` has something to say to it. Of no use is the window when that fails, for it may be waiting for ever.
    async fn tell(&mut self, say: impl FnOnce(&mut Writer) -> bool) -> io::Result<()> {
        let open = self.open.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        if !say(&mut open.writer) {
            return Ok(());
        }
        let rung = open.bell.write_all(&[0]).await;
        if let Err(error) = &rung {
            tracing::warn!(%error, "the memory for much output fails: all of it comes on connections");
            self.open = None;
        }
        rung
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            *self.home.state() = State::Free(open);
        }
    }
}

impl Open {
    fn of_machine() -> io::Result<Self> {
        Ok(Self {
            writer: Writer::open(&memory(&find_device(VENDOR, IVSHMEM)?)?)?,
            bell: SerialPort::open(OUTPUT_SERIAL_PORT)?,
        })
    }
}

/// Opens the memory of an ivshmem device, its BAR 2, given its folder as Documentation/ABI/testing/sysfs-bus-pci has it.
fn memory(device: &Path) -> io::Result<File> {
    fs::write(device.join("enable"), "1")?;
    let mut open = File::options();
    open.read(true).write(true);
    // Where the kernel can, writes are combined.
    let combining = open.open(device.join("resource2_wc"));
    combining.or_else(|_| open.open(device.join("resource2")))
}

fn unwanted() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the host wants no more of it")
}
