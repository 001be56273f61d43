//! Another size for a running machine: processors and memory modules are plugged in, and what was plugged in is taken out again
//! where the guest gives it back. What a machine started with stays.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::{Instant, sleep};

use super::Vm;
use crate::{
    agent::AgentError,
    machine::{Growth, Machine},
    qemu::{
        arguments::{MEMORY_SLOTS, block_mib},
        plug::{Module, Processors},
        qmp::QmpError,
    },
    state::{Record, StateError},
};

/// Longest time in which a guest gives back what it is asked for at once.
const GIVEN_BACK: Duration = Duration::from_secs(20);
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
    #[error("the running machine has no place for more {what}: it has to be started anew with the size that it needs")]
    NoPlace { what: &'static str },
    #[error("the machine is paused, and cannot grow until it goes on")]
    Paused,
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
    /// When last looked at, and as it is recorded.
    now: MachineSize,
    /// What the guest was asked to give back and has neither given back nor refused: it can be gone at any time.
    asked_back: BTreeSet<String>,
}

/// What is plugged in.
struct Parts {
    processors: Processors,
    modules: Vec<Module>,
}

impl Vm {
    /// The size that it was last seen to have.
    pub async fn size(&self) -> MachineSize {
        self.sizes.lock().await.now
    }

    /// Gives the machine at least this size, memory in blocks of 128 MiB. What it grows by is there for its containers when this
    /// answers with the size that it has.
    ///
    /// # Errors
    /// Of [`ResizeError`]. The machine then has what it was given until then.
    pub async fn grow(&self, wanted: MachineSize) -> Result<MachineSize, ResizeError> {
        let mut sizes = self.sizes.lock().await;
        if sizes.start.holds(wanted) {
            return Ok(sizes.now);
        }
        sizes.allow(wanted)?;
        let parts = self.look(&mut sizes).await?;
        if sizes.certain(&parts).holds(wanted) {
            return Ok(sizes.now);
        }
        // A halted guest takes nothing into use.
        if self.qmp.is_halted().await? {
            return Err(ResizeError::Paused);
        }
        let (begin, before) = (Instant::now(), sizes.now);
        let grown = self.add(&sizes, parts, wanted).await;
        let looked = self.look(&mut sizes).await;
        self.tell(before, sizes.now, begin);
        grown?;
        looked.map(|_| sizes.now)
    }

    /// Takes out what this size does not need, of what the machine has been given; what the guest does not give back stays, which
    /// is no error. Answers the size that the machine has then.
    ///
    /// # Errors
    /// When QEMU does not do its part.
    pub async fn shrink(&self, wanted: MachineSize) -> Result<MachineSize, ResizeError> {
        let mut sizes = self.sizes.lock().await;
        if sizes.now == sizes.start {
            return Ok(sizes.now);
        }
        let parts = self.look(&mut sizes).await?;
        // A halted guest gives nothing back.
        if self.qmp.is_halted().await? {
            return Ok(sizes.now);
        }
        let (begin, before) = (Instant::now(), sizes.now);
        let shrunk = self.take_out(&mut sizes, parts, wanted).await;
        let looked = self.look(&mut sizes).await;
        self.tell(before, sizes.now, begin);
        shrunk?;
        looked.map(|_| sizes.now)
    }

    /// Adds what is missing, as far as it gets.
    async fn add(&self, sizes: &Sizes, parts: Parts, wanted: MachineSize) -> Result<(), ResizeError> {
        let certain = sizes.certain(&parts);
        if wanted.memory_mib > certain.memory_mib {
            if parts.modules.len() >= MEMORY_SLOTS {
                return Err(ResizeError::NoPlace { what: "memory" });
            }
            let more = (wanted.memory_mib - certain.memory_mib).next_multiple_of(sizes.block_mib);
            self.qmp.add_module(&parts.modules, more).await?;
            // Its kernel takes memory for the lists of the new one, which containers are not to wait for.
            let memory_mib = sizes.now.memory_mib + more;
            self.agent.take_size(sizes.now.vcpus, memory_mib).await?;
        }
        // One at a time: several at once have locked up translated guests.
        let mut processors = parts.processors;
        for _ in certain.vcpus..wanted.vcpus {
            if !self.qmp.add_processor(&processors).await? {
                return Err(ResizeError::NoPlace { what: "processors" });
            }
            processors = self.qmp.processors().await?;
            self.agent.take_size(processors.count, 0).await?;
        }
        Ok(())
    }

    async fn take_out(&self, sizes: &mut Sizes, parts: Parts, wanted: MachineSize) -> Result<(), ResizeError> {
        let deadline = Instant::now() + GIVEN_BACK;
        let Parts {
            processors,
            mut modules,
        } = parts;
        let mut spare = processors.count.saturating_sub(wanted.vcpus.max(sizes.start.vcpus));
        // The last first: a guest numbers them as they come.
        for name in processors.plugged.iter().rev() {
            if spare == 0 || !self.given_back(sizes, name, deadline).await? {
                break;
            }
            spare -= 1;
        }
        modules.sort_by_key(|module| std::cmp::Reverse(module.mib));
        let needed = wanted.memory_mib.saturating_sub(sizes.start.memory_mib);
        let mut left: u64 = modules.iter().map(|module| module.mib).sum();
        for module in modules {
            if left - module.mib >= needed && self.given_back(sizes, &module.name, deadline).await? {
                self.qmp.free_module(&module.name).await?;
                left -= module.mib;
            }
        }
        Ok(())
    }

    /// Asks the guest to give something back; answers whether it did.
    async fn given_back(&self, sizes: &mut Sizes, name: &str, deadline: Instant) -> Result<bool, ResizeError> {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        sizes.asked_back.insert(name.to_owned());
        if let Err(error) = self.qmp.ask_back(name).await {
            // It may be gone already, or be asked for still.
            tracing::info!(machine = %self.id, %error, "{name} is not asked for");
        }
        loop {
            if !self.parts().await?.has(name) {
                sizes.asked_back.remove(name);
                return Ok(true);
            }
            if self.qmp.is_kept(name) {
                sizes.asked_back.remove(name);
                tracing::info!(machine = %self.id, "the guest needs {name}, which stays");
                return Ok(false);
            }
            if Instant::now() >= deadline {
                tracing::info!(machine = %self.id, "the guest has not given {name} back so far");
                return Ok(false);
            }
            sleep(LOOK).await;
        }
    }

    async fn parts(&self) -> Result<Parts, QmpError> {
        Ok(Parts {
            processors: self.qmp.processors().await?,
            modules: self.qmp.modules().await?,
        })
    }

    /// What the machine has, which is recorded: a guest can give back late, or unasked.
    async fn look(&self, sizes: &mut Sizes) -> Result<Parts, ResizeError> {
        let parts = self.parts().await?;
        sizes
            .asked_back
            .retain(|name| parts.has(name) && !self.qmp.is_kept(name));
        let now = sizes.with(&parts, |_| true);
        if now != sizes.now {
            sizes.now = now;
            let record = Record {
                vcpus: now.vcpus,
                memory_mib: now.memory_mib,
                ..self.record.clone()
            };
            self.state.write(&record)?;
        }
        Ok(parts)
    }

    fn tell(&self, before: MachineSize, now: MachineSize, begin: Instant) {
        if now != before {
            tracing::info!(
                machine = %self.id,
                vcpus = now.vcpus,
                memory_mib = now.memory_mib,
                seconds = begin.elapsed().as_secs_f64(),
                "the machine has another size"
            );
        }
    }
}

impl MachineSize {
    fn holds(self, other: Self) -> bool {
        self.vcpus >= other.vcpus && self.memory_mib >= other.memory_mib
    }
}

impl Parts {
    fn has(&self, name: &str) -> bool {
        let modules = self.modules.iter().map(|module| &module.name);
        modules.chain(&self.processors.plugged).any(|there| there == name)
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
            asked_back: BTreeSet::new(),
        }
    }

    /// The size with those of the parts that count.
    fn with(&self, parts: &Parts, counts: impl Fn(&String) -> bool) -> MachineSize {
        let absent = parts.processors.plugged.iter().filter(|name| !counts(name)).count();
        let modules = parts.modules.iter().filter(|module| counts(&module.name));
        MachineSize {
            vcpus: parts
                .processors
                .count
                .saturating_sub(u32::try_from(absent).unwrap_or(u32::MAX)),
            memory_mib: self.start.memory_mib + modules.map(|module| module.mib).sum::<u64>(),
        }
    }

    /// What nobody takes away meanwhile.
    fn certain(&self, parts: &Parts) -> MachineSize {
        self.with(parts, |name| !self.asked_back.contains(name))
    }

    fn allow(&self, wanted: MachineSize) -> Result<(), ResizeError> {
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
