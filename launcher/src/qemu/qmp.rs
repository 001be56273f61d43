//! QEMU's control socket. QEMU is on the guest's side of the wall: what it says is bounded in length, and it is never
//! waited for without end.

use std::{
    collections::BTreeSet,
    io,
    os::unix::net::UnixStream as StdUnixStream,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use super::{devices::Device, plug};
use futures::StreamExt;
use qapi::{
    Command, ExecuteError,
    futures::{QapiEvents, QapiService, QmpStreamTokio},
    qmp::{self, Event, QmpCommand},
};
use tokio::{
    io::{AsyncRead, ReadBuf, ReadHalf, WriteHalf},
    net::UnixStream,
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

/// QEMU answers within milliseconds, unless the host is in deep trouble.
const ANSWER: Duration = Duration::from_secs(10);
/// Longest line that QEMU says; its greeting and answers to what is asked here have under 1 KiB.
const LINE: usize = 256 * 1024;

/// QEMU did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    #[error("QEMU's control connection failed")]
    Connection(#[source] io::Error),
    #[error("QEMU refused `{command}`: {reason}")]
    Refused { command: &'static str, reason: String },
    #[error("QEMU did not answer `{command}` within {} s", ANSWER.as_secs())]
    Timeout { command: &'static str },
}

/// What QEMU said of the guest's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ending {
    /// The guest's kernel panicked.
    pub panicked: bool,
    /// The guest powered itself off.
    pub powered_off: bool,
    /// The guest rebooted itself, which ends it here; a panic may look the same.
    pub rebooted: bool,
}

/// How far the machine's state has been written or read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Transfer {
    UnderWay,
    Done,
    Failed,
}

/// Names of devices that the guest has refused to give back.
type Kept = Arc<Mutex<BTreeSet<String>>>;

/// The connection. Dropping it ends its task.
pub struct Qmp {
    service: QapiService<QmpStreamTokio<WriteHalf<UnixStream>>>,
    ending: watch::Receiver<Ending>,
    transfer: watch::Receiver<Transfer>,
    kept: Kept,
    events: JoinHandle<()>,
}

impl Qmp {
    /// Greets the QEMU at the other end of `socket`.
    ///
    /// # Errors
    /// When it does not speak the protocol, or does not answer.
    pub async fn open(socket: StdUnixStream) -> Result<Self, QmpError> {
        let open = async {
            socket.set_nonblocking(true)?;
            let (read, write) = tokio::io::split(UnixStream::from_std(socket)?);
            QmpStreamTokio::open_split(Bounded::new(read), write)
                .await?
                .negotiate()
                .await
        };
        let command = qmp::qmp_capabilities::NAME;
        let stream = timeout(ANSWER, open).await.map_err(|_| QmpError::Timeout { command })?;
        let (service, events) = stream.map_err(QmpError::Connection)?.into_parts();
        let (said, ending) = watch::channel(Ending::default());
        let (transferred, transfer) = watch::channel(Transfer::UnderWay);
        let kept = Kept::default();
        Ok(Self {
            service,
            ending,
            transfer,
            kept: kept.clone(),
            events: tokio::spawn(watch_events(events, said, transferred, kept)),
        })
    }

    /// Halts the guest's processors.
    ///
    /// # Errors
    /// Of [`QmpError`]; the same holds for the other commands.
    pub async fn stop(&self) -> Result<(), QmpError> {
        self.execute(qmp::stop {}).await.map(drop)
    }

    /// Lets them go on.
    pub async fn cont(&self) -> Result<(), QmpError> {
        self.execute(qmp::cont {}).await.map(drop)
    }

    /// Presses the power button.
    pub async fn power_down(&self) -> Result<(), QmpError> {
        self.execute(qmp::system_powerdown {}).await.map(drop)
    }

    /// Ends QEMU at once.
    pub async fn quit(&self) -> Result<(), QmpError> {
        self.execute(qmp::quit {}).await.map(drop)
    }

    /// Leaves memory that is shared out of what is saved and restored, and says how saving and restoring go on.
    pub async fn leave_memory_out(&self) -> Result<(), QmpError> {
        use qmp::MigrationCapability::{events, x_ignore_shared};
        let capabilities = [events, x_ignore_shared].map(|capability| qmp::MigrationCapabilityStatus {
            capability,
            state: true,
        });
        let capabilities = capabilities.to_vec();
        self.execute(qmp::migrate_set_capabilities { capabilities })
            .await
            .map(drop)
    }

    /// Begins to write the state of the halted machine to `address`, such as `unix:<path>`.
    pub async fn save_to(&self, address: String) -> Result<(), QmpError> {
        let command = qmp::migrate {
            channels: None,
            detach: None,
            resume: None,
            uri: Some(address),
        };
        self.execute(command).await.map(drop)
    }

    /// Begins to read the machine's state from `address`, such as `fd:<number>`. It is a clone that goes on with it: no network has heard of
    /// the guest elsewhere, so that nothing announces where it is now.
    pub async fn restore_from(&self, address: String) -> Result<(), QmpError> {
        let quiet = qmp::MigrateSetParameters {
            announce_rounds: Some(0),
            ..Default::default()
        };
        self.execute(qmp::migrate_set_parameters(quiet)).await?;
        let command = qmp::migrate_incoming {
            channels: None,
            exit_on_error: None,
            uri: Some(address),
        };
        self.execute(command).await.map(drop)
    }

    /// Waits until the state is written or read in full.
    pub async fn transferred(&self) -> Result<(), QmpError> {
        const COMMAND: &str = qmp::migrate::NAME;
        let mut transfer = self.transfer.clone();
        let ended = transfer.wait_for(|transfer| *transfer != Transfer::UnderWay);
        match timeout(ANSWER, ended).await {
            Ok(Ok(ended)) if *ended == Transfer::Done => Ok(()),
            Ok(Ok(_)) => Err(QmpError::Refused {
                command: COMMAND,
                reason: "the transfer of the machine's state failed".to_owned(),
            }),
            Ok(Err(_)) => Err(QmpError::Connection(io::ErrorKind::UnexpectedEof.into())),
            Err(_) => Err(QmpError::Timeout { command: COMMAND }),
        }
    }

    /// Gives the machine another device.
    pub async fn add_device(&self, device: &Device) -> Result<(), QmpError> {
        let command = qmp::device_add {
            bus: None,
            id: None,
            driver: device.driver.to_owned(),
            arguments: device.properties(),
        };
        self.execute(command).await.map(drop)
    }

    /// Whether the guest has refused to give back a device, since it was last asked to.
    pub fn is_kept(&self, name: &str) -> bool {
        self.kept().contains(name)
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the guest's end. Its sender goes when QEMU's last word was read.
    pub fn ending(&self) -> watch::Receiver<Ending> {
        self.ending.clone()
    }

    pub(super) async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok, QmpError> {
        match timeout(ANSWER, self.service.execute(command)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(ExecuteError::Io(error))) => Err(QmpError::Connection(error)),
            Ok(Err(ExecuteError::Qapi(error))) => Err(QmpError::Refused {
                command: C::NAME,
                reason: error.desc,
            }),
            Err(_) => Err(QmpError::Timeout { command: C::NAME }),
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        self.events.abort();
    }
}

/// Reads answers, for those who wait for them, and events, to QEMU's end.
async fn watch_events(
    mut events: QapiEvents<QmpStreamTokio<Bounded<ReadHalf<UnixStream>>>>,
    said: watch::Sender<Ending>,
    transferred: watch::Sender<Transfer>,
    kept: Kept,
) {
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::GUEST_PANICKED { .. }) => said.send_modify(|ending| ending.panicked = true),
            Ok(Event::SHUTDOWN { data, .. }) if data.guest => said.send_modify(|ending| match data.reason {
                qmp::ShutdownCause::guest_reset => ending.rebooted = true,
                qmp::ShutdownCause::guest_panic => ending.panicked = true,
                _ => ending.powered_off = true,
            }),
            Ok(Event::MIGRATION { data, .. }) => match data.status {
                qmp::MigrationStatus::completed => drop(transferred.send_replace(Transfer::Done)),
                qmp::MigrationStatus::failed => drop(transferred.send_replace(Transfer::Failed)),
                _ => {}
            },
            Ok(Event::ACPI_DEVICE_OST { data, .. }) => {
                // QEMU knows the devices' names, so that there are no more than devices.
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.extend(plug::refused(data.info));
            }
            Ok(_) => {}
            // QEMU ended with words of ours unread.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break,
            Err(error) => {
                tracing::warn!(%error, "QEMU's control connection is given up");
                break;
            }
        }
    }
}

/// A reader that refuses lines longer than [`LINE`], for the protocol's parser collects a line however long it is.
struct Bounded<R> {
    inner: R,
    since_newline: usize,
}

impl<R> Bounded<R> {
    fn new(inner: R) -> Self {
        Self {
            inner,
            since_newline: 0,
        }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for Bounded<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        let new = &buffer.filled()[before..];
        self.since_newline = match new.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => new.len() - at - 1,
            None => self.since_newline + new.len(),
        };
        Poll::Ready(if self.since_newline > LINE {
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("QEMU said a line longer than {LINE} bytes"),
            ))
        } else {
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};

    use super::*;

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

    /// A QEMU that greets, agrees, and then answers each command with the lines that `answer` makes of it.
    fn qemu(answer: impl Fn(&serde_json::Value) -> String + Send + 'static) -> StdUnixStream {
        let (ours, mut theirs) = StdUnixStream::pair().unwrap();
        std::thread::spawn(move || {
            writeln!(theirs, "{GREETING}").unwrap();
            let commands = BufReader::new(theirs.try_clone().unwrap());
            for command in commands.lines().map_while(Result::ok) {
                let command: serde_json::Value = serde_json::from_str(&command).unwrap();
                let text = if command["execute"] == "qmp_capabilities" {
                    format!(r#"{{"return": {{}}, "id": {}}}"#, command["id"])
                } else {
                    answer(&command)
                };
                if writeln!(theirs, "{text}").is_err() {
                    return;
                }
            }
        });
        ours
    }

    #[tokio::test]
    async fn a_power_off_by_the_guest_is_told_from_a_reboot() {
        let socket = qemu(|command| {
            let event = r#"{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-shutdown"}, "timestamp": {"seconds": 1, "microseconds": 2}}"#;
            format!("{event}\n{{\"return\": {{}}, \"id\": {}}}", command["id"])
        });
        let qmp = Qmp::open(socket).await.unwrap();
        assert_eq!(*qmp.ending().borrow(), Ending::default());
        qmp.power_down().await.unwrap();
        assert_eq!(
            *qmp.ending().borrow(),
            Ending {
                powered_off: true,
                ..Default::default()
            }
        );
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_qemus_words() {
        let socket = qemu(|command| {
            format!(
                r#"{{"error": {{"class": "GenericError", "desc": "not now"}}, "id": {}}}"#,
                command["id"]
            )
        });
        let error = Qmp::open(socket).await.unwrap().stop().await.unwrap_err();
        assert_eq!(error.to_string(), "QEMU refused `stop`: not now");
    }

    #[tokio::test]
    async fn a_line_without_end_is_refused() {
        let socket = qemu(|_| "x".repeat(2 * LINE));
        let error = Qmp::open(socket).await.unwrap().stop().await.unwrap_err();
        assert!(matches!(error, QmpError::Connection(_)), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_qemu_is_not_waited_for_without_end() {
        let (ours, _theirs) = StdUnixStream::pair().unwrap();
        assert!(matches!(Qmp::open(ours).await, Err(QmpError::Timeout { .. })));
    }
}
