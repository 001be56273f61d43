//! Watching a machine's processes: while it boots, so that nobody waits for a guest that has ended, and afterwards, so that
//! its end is known at once and has one reason.

use std::{process::ExitStatus, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::{VmError, VmExit, reason_of};
use crate::{console::Console, process::Process, qemu::qmp::Ending};

/// Lines of the console that an error or an exit carries.
const LAST_LINES: usize = 12;
/// QEMU's own messages in a reason, lines.
const MESSAGES: usize = 5;
/// What QEMU said and what the guest printed arrives through other descriptors than the news of QEMU's end.
const ECHO: Duration = Duration::from_secs(1);

/// A helper process and its name.
pub(super) type Helper = (&'static str, Process);

/// The processes of one machine and what they say.
pub(super) struct Watch {
    pub(super) qemu: Arc<Process>,
    pub(super) helpers: Vec<Helper>,
    pub(super) console: Console,
    /// What QEMU says of the guest's end, from its greeting on.
    pub(super) ending: Option<watch::Receiver<Ending>>,
    /// When the machine has to be up, and how long that is from its start.
    pub(super) deadline: Instant,
    pub(super) boot_timeout: Duration,
}

impl Watch {
    /// Waits for `step` of the boot, but neither beyond the deadline, nor beyond the end of one of the machine's processes.
    pub(super) async fn during<T>(&mut self, step: impl Future<Output = Result<T, VmError>>) -> Result<T, VmError> {
        let outcome = tokio::select! {
            outcome = timeout_at(self.deadline, step) => Some(outcome),
            _ = self.first_end() => None,
        };
        match outcome {
            Some(Ok(Ok(value))) => return Ok(value),
            Some(Err(_)) => {
                let console = self.last_lines();
                return Err(VmError::Timeout {
                    timeout: self.boot_timeout,
                    console,
                });
            }
            // A connection that broke is but the first sign of an end, and not its reason.
            Some(Ok(Err(error))) if timeout(ECHO, self.qemu.exited()).await.is_err() => return Err(error),
            Some(Ok(Err(_))) | None => {}
        }
        let exit = self.end().await;
        let console = if exit.console.is_empty() {
            NOTHING.to_owned()
        } else {
            exit.console.join(" | ")
        };
        Err(VmError::Ended {
            reason: exit.reason,
            console,
        })
    }

    /// Waits for the end of the machine, brings down what is left of it, and says how it ended.
    pub(super) async fn end(&mut self) -> VmExit {
        let helper = match self.first_end().await {
            // A helper whose QEMU has ended ends as well, and its news may be the faster.
            Some((name, status)) => match timeout(ECHO, self.qemu.exited()).await {
                Ok(_) => None,
                Err(_) => Some(format!("{name}, which serves the guest, ended unexpectedly: {status}")),
            },
            None => None,
        };
        self.qemu.kill().await;
        let status = self.qemu.exited().await;
        for (_, process) in &self.helpers {
            process.kill().await;
        }
        self.console.finished(ECHO).await;
        let ending = match &mut self.ending {
            // The sender goes when QEMU's last word was read.
            Some(ending) => {
                let _ = timeout(ECHO, async { while ending.changed().await.is_ok() {} }).await;
                *ending.borrow()
            }
            None => Ending::default(),
        };
        let (reason, orderly) = match helper {
            Some(reason) => (reason, false),
            None => reason_of(status, ending, &self.qemu.messages(MESSAGES)),
        };
        VmExit {
            reason,
            orderly,
            console: self.console.last_lines(LAST_LINES),
        }
    }

    /// Waits until one of the processes has ended; None: QEMU.
    async fn first_end(&self) -> Option<(&'static str, ExitStatus)> {
        let mut helpers: FuturesUnordered<_> = self
            .helpers
            .iter()
            .map(|(name, process)| async move { (*name, process.exited().await) })
            .collect();
        tokio::select! {
            biased;
            _ = self.qemu.exited() => None,
            Some(helper) = helpers.next() => Some(helper),
        }
    }

    fn last_lines(&self) -> String {
        let lines = self.console.last_lines(LAST_LINES);
        if lines.is_empty() {
            NOTHING.to_owned()
        } else {
            lines.join(" | ")
        }
    }
}

const NOTHING: &str = "(nothing was printed)";
