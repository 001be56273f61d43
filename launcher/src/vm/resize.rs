//! Another size for a running machine: processors and memory modules are plugged in, and what was plugged in is taken out again
//! where the guest gives it back. What a machine started with stays.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Vm;
use crate::{
    agent::AgentError,
    machine::{Growth, Machine},
    qemu::{
        arguments::{MEMORY_SLOTS, block_mib},
        plug::Module,
        qmp::QmpError,
    },
    state::{Record, StateError},
};

/// Longest time in which a guest gives back one thing.
const GIVEN_BACK: Duration = Duration::from_secs(10);
/// Between two looks at whether it has.
const LOOK: Duration = Duration::from_millis(20);

/// A size of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineSize {
    pub vcpus: u32,
    pub memory_mib: u64,
}

/// A machine did not get the size that was wanted.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    #[error("the machine's size stays: it was not started as one that can grow")]
    Fixed,
    #[error(
        "a machine of {vcpus} processors is too large: this one can grow to {most}; one that is started anew can be larger"
    )]
    Processors { vcpus: u32, most: u32 },
    #[error("a machine with {memory_mib} MiB is too large: `max_memory_mib` in config.toml allows {most}")]
    Memory { memory_mib: u64, most: u64 },
    #[error(
        "the machine's memory has grown so often that there is no place for more: make its limits those of the pod, and start it anew"
    )]
    NoPlace,
    #[error(transparent)]
    Qmp(#[from] QmpError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    State(#[from] StateError),
}

/// What the machine started with, what it can become, and what it is.
#[derive(Debug)]
pub(super) struct Sizes {
    start: MachineSize,
    most: Option<Growth>,
    block_mib: u64,
    now: MachineSize,
}

impl Vm {
    /// The size it has now.
    pub async fn size(&self) -> MachineSize {
        self.sizes.lock().await.now
    }

    /// Gives the machine at least this size, and no more than it needs for that: never less than it started with, memory in blocks of
    /// 128 MiB. What it is to grow by is there for its containers when this answers. What the guest does not give back stays, which
    /// is no error. Answers the size that it has.
    ///
    /// # Errors
    /// Of [`ResizeError`]. The machine then has what it was given until then.
    pub async fn resize(&self, wanted: MachineSize) -> Result<MachineSize, ResizeError> {
        let mut sizes = self.sizes.lock().await;
        let wanted = MachineSize {
            vcpus: wanted.vcpus.max(sizes.start.vcpus),
            memory_mib: wanted.memory_mib.max(sizes.start.memory_mib),
        };
        sizes.allow(wanted)?;
        let begin = Instant::now();
        let before = sizes.now;
        let changed = self.change(&sizes, wanted).await;
        sizes.now = self.measured(&sizes).await?;
        if sizes.now != before {
            let record = Record {
                vcpus: sizes.now.vcpus,
                memory_mib: sizes.now.memory_mib,
                ..self.record.clone()
            };
            self.state.write(&record)?;
            tracing::info!(
                machine = %self.id,
                vcpus = sizes.now.vcpus,
                memory_mib = sizes.now.memory_mib,
                seconds = begin.elapsed().as_secs_f64(),
                "the machine has another size"
            );
        }
        changed.map(|()| sizes.now)
    }

    async fn change(&self, sizes: &Sizes, wanted: MachineSize) -> Result<(), ResizeError> {
        let modules = self.qmp.modules().await?;
        let has = sizes.start.memory_mib + total(&modules);
        if wanted.memory_mib > has {
            if modules.len() >= MEMORY_SLOTS {
                return Err(ResizeError::NoPlace);
            }
            let more = (wanted.memory_mib - has).next_multiple_of(sizes.block_mib);
            self.qmp.add_module(&modules, more).await?;
            // Its kernel takes memory for the lists of the new one, which containers are not to wait for.
            self.agent.take_size(sizes.now.vcpus, has + more).await?;
        }
        // One at a time: several at once have locked up translated guests.
        loop {
            let processors = self.qmp.processors().await?;
            let count = u32::try_from(processors.count).unwrap_or(u32::MAX);
            if count >= wanted.vcpus || !self.qmp.add_processor(&processors).await? {
                break;
            }
            self.agent.take_size(count + 1, 0).await?;
        }
        self.shrink(sizes, wanted).await
    }

    /// Takes out what is not needed, as far as the guest gives it back.
    async fn shrink(&self, sizes: &Sizes, wanted: MachineSize) -> Result<(), ResizeError> {
        loop {
            let processors = self.qmp.processors().await?;
            let spare = processors.count > usize::try_from(wanted.vcpus).unwrap_or(usize::MAX);
            // The last first: a guest numbers them as they come.
            let Some(name) = processors.plugged.iter().max_by_key(|name| (name.len(), name.as_str())) else {
                break;
            };
            if !spare || !self.given_back(name).await? {
                break;
            }
        }
        let mut modules = self.qmp.modules().await?;
        modules.sort_by_key(|module| std::cmp::Reverse(module.mib));
        for module in &modules {
            let left = sizes.start.memory_mib + total(&self.qmp.modules().await?);
            if left - module.mib >= wanted.memory_mib && self.given_back(&module.name).await? {
                self.qmp.free_module(&module.name).await?;
            }
        }
        Ok(())
    }

    /// Asks the guest to give something back; answers whether it did.
    async fn given_back(&self, name: &str) -> Result<bool, ResizeError> {
        if let Err(error) = self.qmp.ask_back(name).await {
            tracing::info!(machine = %self.id, %error, "the guest is still asked for {name}");
        }
        let deadline = Instant::now() + GIVEN_BACK;
        while Instant::now() < deadline {
            let modules = self.qmp.modules().await?;
            let processors = self.qmp.processors().await?;
            let names = modules.iter().map(|module| &module.name).chain(&processors.plugged);
            if !names.into_iter().any(|there| there == name) {
                return Ok(true);
            }
            sleep(LOOK).await;
        }
        tracing::info!(machine = %self.id, "the guest does not give {name} back, and keeps it");
        Ok(false)
    }

    async fn measured(&self, sizes: &Sizes) -> Result<MachineSize, ResizeError> {
        let processors = self.qmp.processors().await?;
        Ok(MachineSize {
            vcpus: u32::try_from(processors.count).unwrap_or(u32::MAX),
            memory_mib: sizes.start.memory_mib + total(&self.qmp.modules().await?),
        })
    }
}

impl Sizes {
    /// Those of a machine that has just come up.
    pub(super) fn of(machine: &Machine) -> Self {
        let start = MachineSize {
            vcpus: machine.vcpus,
            memory_mib: machine.memory_mib,
        };
        Self {
            start,
            most: machine.growth,
            block_mib: block_mib(machine),
            now: start,
        }
    }

    fn allow(&self, wanted: MachineSize) -> Result<(), ResizeError> {
        if wanted == self.start {
            return Ok(());
        }
        let most = self.most.ok_or(ResizeError::Fixed)?;
        if wanted.vcpus > most.vcpus.max(self.start.vcpus) {
            return Err(ResizeError::Processors {
                vcpus: wanted.vcpus,
                most: most.vcpus,
            });
        }
        if wanted.memory_mib > most.memory_mib.max(self.start.memory_mib) {
            return Err(ResizeError::Memory {
                memory_mib: wanted.memory_mib,
                most: most.memory_mib,
            });
        }
        Ok(())
    }
}

fn total(modules: &[Module]) -> u64 {
    modules.iter().map(|module| module.mib).sum()
}
