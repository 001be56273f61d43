//! Another size for a running machine: its guest uses more of its processors, or less of them; memory modules are plugged in, and
//! taken out again where the guest gives them back. What a machine started with stays.

use std::{collections::BTreeSet, time::Duration};

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

/// Longest time in which a guest gives back what it is asked for at once.
const GIVEN_BACK: Duration = Duration::from_secs(20);
/// Memory that has to be available beside what a guest is to give back, in MiB.
const SPARE_MIB: u64 = 64;
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
        "the memory of the running machine has grown too often: it has to be started anew with the size that it needs"
    )]
    NoPlace,
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
    /// When last looked at.
    now: MachineSize,
    recorded: MachineSize,
    /// Modules that the guest was asked to give back and has neither given back nor refused: they can be gone at any time.
    asked_back: BTreeSet<String>,
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
        // A halted guest takes nothing into use.
        if self.is_paused() {
            return if sizes.now.holds(wanted) {
                Ok(sizes.now)
            } else {
                Err(ResizeError::Paused)
            };
        }
        let modules = self.look(&mut sizes).await?;
        let missing_mib = wanted.memory_mib.saturating_sub(sizes.certain_mib(&modules));
        if missing_mib == 0 && wanted.vcpus <= sizes.now.vcpus {
            return Ok(sizes.now);
        }
        let (begin, before) = (Instant::now(), sizes.now);
        let grown = self.add(&mut sizes, &modules, missing_mib, wanted.vcpus).await;
        let looked = self.look(&mut sizes).await;
        self.tell(before, sizes.now, begin);
        grown?;
        looked.map(|_| sizes.now)
    }

    /// Takes away what this size does not need, of what the machine has been given; what the guest does not give back stays, which
    /// is no error. Answers the size that the machine has then.
    ///
    /// # Errors
    /// When QEMU or the agent do not do their part.
    pub async fn shrink(&self, wanted: MachineSize) -> Result<MachineSize, ResizeError> {
        let mut sizes = self.sizes.lock().await;
        // A halted guest gives nothing back.
        if sizes.now == sizes.start || self.is_paused() {
            return Ok(sizes.now);
        }
        let modules = self.look(&mut sizes).await?;
        let (begin, before) = (Instant::now(), sizes.now);
        let shrunk = self.take_away(&mut sizes, modules, wanted).await;
        let looked = self.look(&mut sizes).await;
        self.tell(before, sizes.now, begin);
        shrunk?;
        looked.map(|_| sizes.now)
    }

    /// Adds what is missing, as far as it gets.
    async fn add(
        &self,
        sizes: &mut Sizes,
        modules: &[Module],
        missing_mib: u64,
        vcpus: u32,
    ) -> Result<(), ResizeError> {
        let mut memory_mib = sizes.now.memory_mib;
        if missing_mib > 0 {
            if modules.len() >= MEMORY_SLOTS {
                return Err(ResizeError::NoPlace);
            }
            let more = missing_mib.next_multiple_of(sizes.block_mib);
            self.qmp.add_module(modules, more).await?;
            memory_mib += more;
        }
        // Its kernel needs memory for the lists of the new, which containers are not to wait for.
        let vcpus = vcpus.max(sizes.now.vcpus);
        let used = self.agent.take_size(vcpus, memory_mib).await;
        // Where it fails the guest may use them all the same.
        sizes.note_processors(used.as_ref().map_or(vcpus, |used| used.vcpus));
        used.map(drop).map_err(Into::into)
    }

    async fn take_away(
        &self,
        sizes: &mut Sizes,
        mut modules: Vec<Module>,
        wanted: MachineSize,
    ) -> Result<(), ResizeError> {
        let vcpus = wanted.vcpus.max(sizes.start.vcpus);
        if vcpus < sizes.now.vcpus {
            let used = self.agent.take_size(vcpus, 0).await?;
            sizes.note_processors(used.vcpus);
        }
        let deadline = Instant::now() + GIVEN_BACK;
        let needed = wanted.memory_mib.saturating_sub(sizes.start.memory_mib);
        let mut left = total(&modules);
        modules.sort_by_key(|module| std::cmp::Reverse(module.mib));
        for module in modules {
            if left - module.mib < needed {
                continue;
            }
            // Its kernel would move what is there to where there is no room, and kill for that, or panic.
            let available = self.agent.take_size(sizes.now.vcpus, 0).await?.available_mib;
            if available < module.mib.saturating_add(SPARE_MIB) {
                tracing::info!(machine = %self.id, available, "the guest uses {}, which stays", module.name);
                continue;
            }
            if self.given_back(sizes, &module.name, deadline).await? {
                self.qmp.free_module(&module.name).await?;
                left -= module.mib;
            }
        }
        Ok(())
    }

    /// Asks the guest to give a module back; answers whether it did.
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
            if !is_there(&self.qmp.modules().await?, name) {
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

    /// The modules that the machine has, which is recorded: a guest can give one back late, or unasked.
    async fn look(&self, sizes: &mut Sizes) -> Result<Vec<Module>, ResizeError> {
        let modules = self.qmp.modules().await?;
        sizes
            .asked_back
            .retain(|name| is_there(&modules, name) && !self.qmp.is_kept(name));
        sizes.now.memory_mib = sizes.start.memory_mib + total(&modules);
        if sizes.now != sizes.recorded {
            let record = Record {
                vcpus: sizes.now.vcpus,
                memory_mib: sizes.now.memory_mib,
                ..self.record.clone()
            };
            self.state.write(&record)?;
            sizes.recorded = sizes.now;
        }
        Ok(modules)
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
            recorded: start,
            asked_back: BTreeSet::new(),
        }
    }

    /// Memory that nobody takes away meanwhile.
    fn certain_mib(&self, modules: &[Module]) -> u64 {
        let certain = modules.iter().filter(|module| !self.asked_back.contains(&module.name));
        self.start.memory_mib + certain.map(|module| module.mib).sum::<u64>()
    }

    /// Notes how many processors the guest uses, by its own word: there are no more than there are.
    fn note_processors(&mut self, used: u32) {
        let most = self.most.map_or(0, |most| most.vcpus);
        self.now.vcpus = used.min(most).max(self.start.vcpus);
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

fn total(modules: &[Module]) -> u64 {
    modules.iter().map(|module| module.mib).sum()
}

fn is_there(modules: &[Module], name: &str) -> bool {
    modules.iter().any(|module| module.name == name)
}
