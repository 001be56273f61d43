//! One running machine: brought up as a whole or not at all, watched, paused, ended, and nothing of it left behind.

use std::{
    fs::File,
    path::PathBuf,
    process::ExitStatus,
    sync::{Arc, Mutex, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{Notify, watch as channel},
    task::JoinHandle,
};

use crate::{
    accel::Acceleration,
    agent::{AgentClient, AgentError},
    config::Config,
    console::Watcher,
    machine::{Machine, MachineId},
    process::Process,
    qemu::qmp::{Ending, Qmp},
    state::{Record, StateDir, VsockAddress},
    vsock::Multiplexed,
};

mod boot;
mod build;
mod clock;
mod clone;
mod error;
mod pause;
mod plan;
mod port;
mod remains;
mod resize;
mod save;
mod watch;

pub use error::VmError;
pub use pause::PauseError;
pub use remains::{DestroyError, destroy};
pub use resize::{MachineSize, ResizeError};
pub use save::{make_template, template_key};

/// A running machine. Dropping it kills it; [`Vm::shutdown`] ends it in order and waits.
pub struct Vm {
    id: MachineId,
    state: StateDir,
    state_dir: PathBuf,
    record: Record,
    qmp: Qmp,
    qemu: Arc<Process>,
    agent: Arc<AgentClient>,
    exit: channel::Receiver<Option<VmExit>>,
    supervisor: JoinHandle<()>,
    freed: tokio::sync::Mutex<bool>,
    /// What carries the agent's connections, where that is this process.
    _multiplexed: Option<Multiplexed>,
    _ports: Option<build::Ports>,
    /// Held open so that other clones of the template find it, as long as the machine is there.
    shared_memory: Mutex<Option<File>>,
    /// Held while the size is changed.
    sizes: tokio::sync::Mutex<resize::Sizes>,
    /// Its guest's processors are halted.
    paused: AtomicBool,
    /// Has the guest's clock looked at, which has stood still.
    resumed: Arc<Notify>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VmExit {
    /// For the log and the pod's status: `the guest powered off`, `QEMU was killed by signal 9`.
    pub reason: String,
    /// The guest ended by itself, as a machine does that has done its work.
    pub orderly: bool,
    /// The last lines of the console, made harmless.
    pub console: Vec<String>,
}

/// What can be said about a machine, for people and programs.
#[derive(Debug, Clone, Serialize)]
pub struct VmInfo {
    #[serde(flatten)]
    pub record: Record,
    pub console: PathBuf,
}

impl Vm {
    /// Starts `machine` and waits until its agent answers, and its guest is the pod's if it is for one. When this fails, or is dropped before its end, everything that
    /// was made for the machine is undone. To be called from the thread that lives as long as the machine.
    ///
    /// # Errors
    /// Of [`VmError`]; one for a guest that did not come up carries the last lines of its console.
    pub async fn start(config: &Config, machine: Machine) -> Result<Self, VmError> {
        boot::start(config, machine, None, std::future::pending()).await
    }

    /// As [`Vm::start`], and `watcher` gets what the guest prints from the first byte on. When `interruption` is there before
    /// the agent answers, everything that was made is undone, and nothing else is touched, before this answers.
    ///
    /// # Errors
    /// As there; [`VmError::Cancelled`] after the interruption.
    pub async fn start_unless(
        interruption: impl Future<Output = ()>,
        config: &Config,
        machine: Machine,
        watcher: Option<Watcher>,
    ) -> Result<Self, VmError> {
        boot::start(config, machine, watcher, interruption).await
    }

    pub fn id(&self) -> &MachineId {
        &self.id
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.qemu.id().pid
    }

    pub fn agent(&self) -> &AgentClient {
        &self.agent
    }

    /// Directory in which mount points below [`Vm::shared_dir`] are made, out of the guest's reach.
    pub fn mount_points_dir(&self) -> PathBuf {
        self.state.mount_points()
    }

    /// Host side of what the guest sees at [`coreos_kvm_proto::SHARED_MOUNT`]; mounts made below it show there.
    pub fn shared_dir(&self) -> PathBuf {
        self.state.shared()
    }

    pub fn console_path(&self) -> PathBuf {
        self.state.console()
    }

    pub fn acceleration(&self) -> Option<Acceleration> {
        self.record.acceleration
    }

    pub fn vsock(&self) -> Option<&VsockAddress> {
        self.record.vsock.as_ref()
    }

    pub fn info(&self) -> VmInfo {
        VmInfo {
            record: self.record.clone(),
            console: self.console_path(),
        }
    }

    /// Waits for the machine's end, whatever brings it about; any number of callers may, at any time.
    pub async fn exited(&self) -> VmExit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.clone(),
            Err(_) => None,
        }
        // The supervisor says its word before it ends, unless the runtime is being torn down.
        .unwrap_or_else(|| VmExit {
            reason: "the machine is no longer watched".to_owned(),
            orderly: false,
            console: Vec::new(),
        })
    }

    /// Ends the machine: the guest is asked to power off and has `grace` for it, half of it by the agent's word and half by
    /// the power button; then it is killed. Afterwards everything it held is free. May be called again.
    ///
    /// # Errors
    /// What could not be freed, all of it.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), DestroyError> {
        let mut freed = self.freed.lock().await;
        if *freed {
            return Ok(());
        }
        if !grace.is_zero() && self.exit.borrow().is_none() {
            self.power_off(grace).await;
        }
        self.qemu.kill().await;
        self.exited().await;
        drop(self.shared_memory.lock().unwrap_or_else(PoisonError::into_inner).take());
        let mut problems = Vec::new();
        remains::free(&self.state_dir, &self.state, Some(&self.record), &mut problems).await;
        *freed = problems.is_empty();
        if problems.is_empty() {
            Ok(())
        } else {
            Err(DestroyError::new(self.id.as_str(), problems))
        }
    }

    async fn power_off(&self, grace: Duration) {
        // A halted guest hears nothing.
        if self.is_paused() {
            let _ = self.resume().await;
        }
        let asked = async {
            self.agent.shutdown().await?;
            Ok::<_, AgentError>(self.exited().await)
        };
        match tokio::time::timeout(grace / 2, asked).await {
            Ok(Ok(_)) => return,
            Ok(Err(error)) => {
                tracing::debug!(machine = %self.id, %error, "the agent did not take the word to shut down");
            }
            Err(_) => tracing::debug!(machine = %self.id, "the guest does not power off by its agent's word"),
        }
        let pressed = async {
            if let Err(error) = self.qmp.power_down().await {
                tracing::debug!(machine = %self.id, %error, "the power button did not work");
            }
            self.exited().await
        };
        if tokio::time::timeout(grace / 2, pressed).await.is_err() {
            tracing::warn!(machine = %self.id, "the guest does not power off and is killed");
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.supervisor.abort();
        // QEMU and the helpers are killed as their own guards fall. What else a machine holds is freed in the background,
        // or, where there is no runtime any more, by whoever calls `destroy`.
        let freed = *self.freed.get_mut();
        if let (false, Ok(runtime)) = (freed, tokio::runtime::Handle::try_current()) {
            let (state_dir, state, record) = (self.state_dir.clone(), self.state.clone(), self.record.clone());
            runtime.spawn(async move { boot::undo(&state_dir, &state, &record).await });
        }
    }
}

/// The sentence for QEMU's end.
fn reason_of(status: ExitStatus, ending: Ending, messages: &[String]) -> (String, bool) {
    use std::os::unix::process::ExitStatusExt;

    let said = if messages.is_empty() {
        String::new()
    } else {
        format!("; it said: {}", messages.join(" | "))
    };
    match (status.code(), status.signal()) {
        _ if ending.panicked => ("the guest's kernel panicked".to_owned(), false),
        (Some(0), _) if ending.powered_off => ("the guest powered off".to_owned(), true),
        (Some(0), _) if ending.rebooted => (
            "the guest reset itself: its agent failed, its kernel panicked, or it rebooted, which ends a machine"
                .to_owned(),
            false,
        ),
        (Some(0), _) => ("QEMU was told to end".to_owned(), true),
        (Some(code), _) => (format!("QEMU failed with exit code {code}{said}"), false),
        (None, signal) => (
            format!("QEMU was killed by signal {}{said}", signal.unwrap_or_default()),
            false,
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    const NOTHING: Ending = Ending {
        panicked: false,
        powered_off: false,
        rebooted: false,
    };

    #[rstest::rstest]
    #[case::power_off(0, Ending { powered_off: true, ..NOTHING }, "the guest powered off", true)]
    #[case::reboot(0, Ending { rebooted: true, ..NOTHING }, "the guest reset itself: its agent failed, its kernel panicked, or it rebooted, which ends a machine", false)]
    #[case::panic(0, Ending { panicked: true, rebooted: true, ..NOTHING }, "the guest's kernel panicked", false)]
    #[case::told(0, NOTHING, "QEMU was told to end", true)]
    #[case::failure(1 << 8, NOTHING, "QEMU failed with exit code 1; it said: no disk", false)]
    #[case::killed(9, NOTHING, "QEMU was killed by signal 9; it said: no disk", false)]
    fn every_end_has_one_reason(
        #[case] status: i32,
        #[case] ending: Ending,
        #[case] expected: &str,
        #[case] orderly: bool,
    ) {
        let reason = reason_of(ExitStatus::from_raw(status), ending, &["no disk".to_owned()]);
        assert_eq!(reason, (expected.to_owned(), orderly));
    }
}
