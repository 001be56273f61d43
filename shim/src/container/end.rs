//! How a container, its processes and its machine end, and who is told.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use coreos_kvm_launcher::agent::{AgentClient, AgentError};
use protobuf::MessageField;
use tokio::time::{Instant, timeout};

use super::Container;
use crate::{
    error::ShimError,
    hypervisor::SandboxProcess,
    process::{KILLED, Process},
};

/// How long an agent that cannot be reached is given to be reached again, or for its machine to end by itself.
const LOST: Duration = Duration::from_secs(30);
/// Pause between two attempts to reach it.
const AGAIN: Duration = Duration::from_secs(1);
/// Longest time that an init's end waits for those of its container's other processes, which come first.
const EXECS: Duration = Duration::from_secs(5);
/// How long after SIGKILL a container may last, whatever the guest says, before its machine is ended: less than the two minutes
/// that a kubelet waits for an answer, and far more than the kernel needs.
pub(crate) const DEATH: Duration = Duration::from_secs(60);
/// Longest time from the machine's end to that of all its containers, of which each may be in the middle of a call.
const TOLD: Duration = Duration::from_secs(15);
/// What a guest is given to power off when its sandbox is asked to end, rather than killed.
const GRACE: Duration = Duration::from_secs(20);

impl Container {
    /// Follows a process in the guest to its end.
    pub(super) fn watch(self: &Arc<Self>, process: Arc<Process>) {
        let container = self.clone();
        tokio::spawn(async move {
            let Ok(agent) = container.agent() else { return };
            let (status, oom_killed) = container.followed(&process, agent).await;
            if process.is_init() {
                container.execs_stopped().await;
            }
            let _turn = process.turn().await;
            if oom_killed && process.is_init() {
                container.events.publish(&TaskOOM {
                    container_id: container.id.clone(),
                    ..Default::default()
                });
            }
            container.ended(&process, status);
        });
    }

    async fn followed(&self, process: &Process, agent: &AgentClient) -> (u32, bool) {
        let mut lost_since = None;
        loop {
            let asked = Instant::now();
            let error = match agent.wait_process(process.name()).await {
                Ok(exit) => return (exit.status, exit.oom_killed),
                Err(error) => error,
            };
            if let AgentError::NotFound(_) = error {
                tracing::warn!(
                    container_id = self.id,
                    exec_id = process.exec_id(),
                    "the agent has lost a process"
                );
                return (KILLED, false);
            }
            // Mostly the machine is ending.
            if timeout(AGAIN, self.sandbox.exited()).await.is_ok() {
                return (KILLED, false);
            }
            let since = *lost_since.get_or_insert(asked);
            if asked.elapsed() > LOST {
                // The call had lasted, so the agent had been reached.
                lost_since = None;
            } else if since.elapsed() > LOST {
                self.give_up_machine(&error).await;
                return (KILLED, false);
            }
        }
    }

    /// A guest whose agent is gone can be asked for nothing any more: what cannot be ended in it ends with its machine.
    async fn give_up_machine(&self, error: &AgentError) {
        tracing::error!(container_id = self.id, %error, "the machine is ended, for its agent does not answer");
        end(&*self.sandbox, Duration::ZERO).await;
    }

    /// A guest that leaves a killed container alone must not keep the pod for ever.
    fn see_it_end(self: &Arc<Self>) {
        if self.killed.swap(true, Ordering::Relaxed) {
            return;
        }
        let (id, machine, stopped) = (self.id.clone(), self.sandbox.clone(), self.init.stopped());
        tokio::spawn(async move {
            if timeout(DEATH, stopped).await.is_ok() {
                return;
            }
            tracing::error!(
                container_id = id,
                "the machine is ended, for a container in it outlives SIGKILL"
            );
            end(&*machine, Duration::ZERO).await;
        });
    }

    async fn execs_stopped(&self) {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        let stopped = execs.iter().filter(|exec| !exec.has_stopped()).map(|exec| async {
            // One that is just being started is heard of as well.
            drop(exec.turn().await);
            if exec.is_running() {
                exec.stopped().await;
            }
        });
        // Those of a container that is in the process namespace of others are ended by the agent.
        let _ = timeout(EXECS, futures::future::join_all(stopped)).await;
    }

    /// A process has ended: said once, by whoever sees it first.
    fn ended(&self, process: &Process, status: u32) {
        let started = process.is_running();
        let Some(exit) = process.end(status) else { return };
        // A prepared process that never came into being has no end to be heard of.
        if started || process.is_init() {
            self.events.publish(&TaskExit {
                container_id: self.id.clone(),
                id: if process.is_init() { &self.id } else { process.exec_id() }.to_owned(),
                pid: self.pid(),
                exit_status: exit.status,
                exited_at: MessageField::some(exit.at),
                ..Default::default()
            });
        }
    }

    /// The machine has ended, and all of this container's processes with it.
    pub(crate) async fn machine_ended(&self, status: u32) {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        for process in execs.iter().chain([&self.init]) {
            // Whoever is starting it finds out by its own means, and publishes the start first.
            let _turn = process.turn().await;
            self.ended(process, status);
        }
    }

    /// Sends a signal. To a sandbox, SIGKILL means the machine's end, other signals its powering off.
    pub(crate) async fn kill(self: &Arc<Self>, exec_id: &str, signal: u32, all: bool) -> Result<(), ShimError> {
        let process = self.process(exec_id)?;
        if process.has_stopped() {
            return Err(ShimError::NotFound("the process has ended already".to_owned()));
        }
        if let Some(machine) = &self.machine {
            if process.is_init() && i32::try_from(signal) == Ok(libc::SIGKILL) {
                self.see_it_end();
            }
            return match machine.agent().signal_process(process.name(), signal, all).await {
                Err(error) if error.is_silence() && process.is_init() && i32::try_from(signal) == Ok(libc::SIGKILL) => {
                    // Answered before it has ended: with the event of that containerd deletes the task and hangs up, and who
                    // still waited for this answer would have none.
                    let container = self.clone();
                    tokio::spawn(async move { container.give_up_machine(&error).await });
                    Ok(())
                }
                // It is on its way, and there when the guest goes on. An error would keep whoever stops the container from SIGKILL,
                // which does not leave it to the guest.
                Err(error @ AgentError::Timeout { .. }) if process.is_init() => {
                    tracing::warn!(container_id = self.id, signal, %error, "the container may not have its signal yet");
                    Ok(())
                }
                result => Ok(result?),
            };
        }
        match i32::try_from(signal) {
            Ok(libc::SIGKILL) => self.sandbox.shutdown(Duration::ZERO).await,
            Ok(libc::SIGTERM | libc::SIGINT) => {
                let machine = self.sandbox.clone();
                tokio::spawn(async move { end(&*machine, GRACE).await });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Ends the machine of this sandbox: its guest has `grace` to power off. Answers when everybody knows of it; it may have ended before.
    pub(crate) async fn end_machine(&self, grace: Duration) -> Result<(), ShimError> {
        self.sandbox.shutdown(grace).await?;
        let told = timeout(TOLD, self.init.stopped()).await;
        told.map(drop)
            .map_err(|_| ShimError::Internal("the machine has ended, and its containers' ends are not told".to_owned()))
    }
}

/// Ends a machine for which nobody waits.
async fn end(machine: &dyn SandboxProcess, grace: Duration) {
    if let Err(error) = machine.shutdown(grace).await {
        tracing::error!(%error, "the machine could not be ended");
    }
}
