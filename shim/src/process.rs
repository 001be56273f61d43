//! One process as containerd knows it: created, running, stopped. Its life is changed in one place at a time, and its end comes
//! once.

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use containerd_shim_protos::api::Status;
use coreos_kvm_launcher::agent::ProcessName;
use protobuf::well_known_types::timestamp::Timestamp;
use tokio::sync::{Mutex, MutexGuard, watch};

use crate::{
    clock,
    streams::{Copies, Stdio},
};

/// How a process ended.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Exit {
    /// 0 to 255; of a process ended by signal N: 128 + N.
    pub(crate) status: u32,
    pub(crate) at: Timestamp,
}

/// 128 + SIGKILL: what a process is said to have ended with that went down with its machine.
pub(crate) const KILLED: u32 = 137;

impl Exit {
    pub(crate) fn now(status: u32) -> Self {
        Self {
            status,
            at: clock::now(),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum State {
    Created,
    Running,
    Stopped(Exit),
}

impl State {
    pub(crate) fn status(&self) -> Status {
        match self {
            Self::Created => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Stopped(_) => Status::STOPPED,
        }
    }
}

/// A container's init, or a further process in it.
#[derive(Debug)]
pub(crate) struct Process {
    container_id: String,
    exec_id: String,
    pub(crate) stdio: Stdio,
    pub(crate) copies: Copies,
    state: watch::Sender<State>,
    forgotten: AtomicBool,
    turn: Mutex<()>,
}

impl Process {
    /// An empty `exec_id` is that of the init.
    pub(crate) fn new(container_id: &str, exec_id: &str, stdio: Stdio) -> Arc<Self> {
        Arc::new(Self {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdio,
            copies: Copies::default(),
            state: watch::Sender::new(State::Created),
            forgotten: AtomicBool::new(false),
            turn: Mutex::new(()),
        })
    }

    pub(crate) fn name(&self) -> ProcessName<'_> {
        ProcessName {
            container_id: &self.container_id,
            exec_id: &self.exec_id,
        }
    }

    pub(crate) fn exec_id(&self) -> &str {
        &self.exec_id
    }

    pub(crate) fn is_init(&self) -> bool {
        self.exec_id.is_empty()
    }

    pub(crate) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub(crate) fn is_running(&self) -> bool {
        *self.state.borrow() == State::Running
    }

    pub(crate) fn has_stopped(&self) -> bool {
        matches!(*self.state.borrow(), State::Stopped(_))
    }

    /// It is deleted: whoever waited for its turn meanwhile finds nothing to delete any more.
    pub(crate) fn forget(&self) {
        self.forgotten.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_forgotten(&self) -> bool {
        self.forgotten.load(Ordering::Relaxed)
    }

    /// Held by whoever starts, ends or deletes the process: its start is published before its end, even if it ends at once.
    pub(crate) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// It runs, unless it has ended already.
    pub(crate) fn set_running(&self) {
        self.state.send_if_modified(|state| {
            let created = *state == State::Created;
            if created {
                *state = State::Running;
            }
            created
        });
    }

    /// It has ended. The first to say so gets the exit to publish.
    pub(crate) fn end(&self, status: u32) -> Option<Exit> {
        let exit = Exit::now(status);
        let first = self.state.send_if_modified(|state| {
            let first = !matches!(state, State::Stopped(_));
            if first {
                *state = State::Stopped(exit.clone());
            }
            first
        });
        self.copies.stop_input();
        first.then_some(exit)
    }

    /// Waits for its end. The answer does not hold the process.
    pub(crate) fn stopped(&self) -> impl Future<Output = Exit> + Send + use<> {
        let mut state = self.state.subscribe();
        async move {
            let stopped = state.wait_for(|state| matches!(state, State::Stopped(_))).await;
            match stopped.as_deref() {
                Ok(State::Stopped(exit)) => exit.clone(),
                // Forgotten before it ended: it was never started.
                _ => Exit::now(KILLED),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_ends_once_and_stays_ended() {
        let process = Process::new("c", "", Stdio::default());
        let waiting = process.stopped();
        process.set_running();
        assert!(process.is_running());
        assert_eq!(process.end(3).unwrap().status, 3);
        assert_eq!(process.end(KILLED), None);
        process.set_running();
        assert!(process.has_stopped());
        assert_eq!(waiting.await.status, 3);
        assert_eq!(process.stopped().await.status, 3);
    }

    #[tokio::test]
    async fn whoever_waits_for_a_process_that_is_forgotten_gets_an_answer() {
        let waiting = Process::new("c", "e", Stdio::default()).stopped();
        assert_eq!(waiting.await.status, KILLED);
    }
}
