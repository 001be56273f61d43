//! The one owner of exits. Every child of the agent ends here: those that it started, and those of containers, which it inherits
//! as their subreaper. Nobody else calls waitpid(2).

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// 0 to 255; of a process ended by signal N: 128 + N.
    pub status: u32,
    /// Nanoseconds since the epoch.
    pub at_ns: i64,
}

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            status,
            at_ns: i64::try_from(at.as_nanos()).unwrap_or(i64::MAX),
        }
    }
}

/// A process's end, now or later.
pub(crate) type ExitWatch = watch::Receiver<Option<Exit>>;

/// How long the exit of a process is kept that nobody has claimed: its pid is on its way from the helper that made it.
const UNCLAIMED: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Table {
    awaited: HashMap<i32, watch::Sender<Option<Exit>>>,
    unclaimed: HashMap<i32, (Exit, Instant)>,
}

/// Knows who has ended.
#[derive(Clone, Default)]
pub(crate) struct Reaper(Arc<Mutex<Table>>);

/// Starts reaping.
pub(crate) fn start() -> io::Result<Reaper> {
    let reaper = Reaper::default();
    let children = signal(SignalKind::child())?;
    tokio::spawn(run(reaper.clone(), children));
    Ok(reaper)
}

async fn run(reaper: Reaper, mut children: Signal) {
    while children.recv().await.is_some() {
        loop {
            match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => reaper.ended(pid, Exit::now(u32::try_from(code).unwrap_or(255))),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    reaper.ended(pid, Exit::now(128 + u32::try_from(signal as i32).unwrap_or(0)));
                }
                Err(Errno::EINTR) => {}
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => {}
            }
        }
    }
}

impl Reaper {
    /// The end of the child `pid`, which came into being after `since`. It may have ended already.
    pub(crate) fn watch(&self, pid: Pid, since: Instant) -> ExitWatch {
        let mut table = self.table();
        let known = table.unclaimed.remove(&pid.as_raw()).filter(|(_, at)| *at >= since);
        let (sender, receiver) = watch::channel(known.map(|(exit, _)| exit));
        if known.is_none() {
            table.awaited.insert(pid.as_raw(), sender);
        }
        receiver
    }

    fn ended(&self, pid: Pid, exit: Exit) {
        tracing::debug!(pid = pid.as_raw(), status = exit.status, "a process has ended");
        let mut table = self.table();
        match table.awaited.remove(&pid.as_raw()) {
            Some(sender) => drop(sender.send_replace(Some(exit))),
            None => {
                table.unclaimed.retain(|_, (_, at)| at.elapsed() < UNCLAIMED);
                table.unclaimed.insert(pid.as_raw(), (exit, Instant::now()));
            }
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        // Every change leaves the table whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for the end.
pub(crate) async fn exited(mut watch: ExitWatch) -> Exit {
    match watch.wait_for(Option::is_some).await {
        Ok(exit) => exit.unwrap_or_else(|| Exit::now(255)),
        // The reaper lives as long as the agent.
        Err(_) => Exit::now(255),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Held by each test that has children: the reaper's takes the exits of all that this process has.
    pub(crate) static CHILDREN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

    #[tokio::test]
    async fn exits_are_seen_whether_awaited_or_not() {
        let _alone = CHILDREN.lock().await;
        let reaper = start().unwrap();
        let since = Instant::now();
        let shell = |script: &str| {
            #[expect(clippy::zombie_processes, reason = "waiting is what is tried here")]
            let child = std::process::Command::new("sh").args(["-c", script]).spawn().unwrap();
            Pid::from_raw(i32::try_from(child.id()).unwrap())
        };
        let early = shell("exit 7");
        let bound = Duration::from_secs(10);
        let awaited = reaper.watch(shell("kill -9 $$"), since);
        assert_eq!(tokio::time::timeout(bound, exited(awaited)).await.unwrap().status, 137);
        let late = exited(reaper.watch(early, since));
        assert_eq!(tokio::time::timeout(bound, late).await.unwrap().status, 7);
    }
}
