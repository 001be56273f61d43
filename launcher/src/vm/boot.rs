//! Bringing a machine up, as a clone where it can be one and else by booting; and all of it undone when one thing fails or the
//! caller goes away.

use std::{
    path::Path,
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    task::JoinError,
};
use tokio_util::sync::CancellationToken;

use super::{
    Vm, VmError,
    build::{self, CloneMemory, Line, Made, Origin},
    clock,
    clone::{self, Found},
    plan::{Plan, plan},
    remains,
    resize::Sizes,
};
use crate::{
    agent::AgentClient,
    config::Config,
    console::Watcher,
    machine::Machine,
    sentence,
    state::{self, ProcessId, Record, StateDir},
    template::mode,
};

/// Starts the machine in a task of its own: when the caller goes away, the task still undoes what it has made. When
/// `interruption` is there first, it does so before this answers.
pub(super) async fn start(
    config: &Config,
    machine: Machine,
    watcher: Option<Watcher>,
    interruption: impl Future<Output = ()>,
) -> Result<Vm, VmError> {
    let given_up = CancellationToken::new();
    let guard = given_up.clone().drop_guard();
    let mut task = tokio::spawn(start_or_undo(config.clone(), machine, watcher, given_up));
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = interruption => {
            drop(guard);
            return interrupted(task.await).await;
        }
    };
    guard.disarm();
    ended.unwrap_or_else(|error| Err(VmError::task(error)))
}

/// The outcome of a start that was given up, which may have come too late for it.
async fn interrupted(ended: Result<Result<Vm, VmError>, JoinError>) -> Result<Vm, VmError> {
    match ended {
        Ok(Ok(vm)) => vm.shutdown(Duration::ZERO).await?,
        Ok(Err(error)) => return Err(error),
        Err(error) => return Err(VmError::task(error)),
    }
    Err(VmError::Cancelled)
}

async fn start_or_undo(
    config: Config,
    machine: Machine,
    watcher: Option<Watcher>,
    given_up: CancellationToken,
) -> Result<Vm, VmError> {
    let started = tokio::select! {
        plan = plan(&config, &machine) => plan?,
        () = given_up.cancelled() => return Err(VmError::Cancelled),
    };
    let found = tokio::select! {
        found = clone::find(&config, &machine, &started) => found,
        () = given_up.cancelled() => return Err(VmError::Cancelled),
    };
    let why = match found {
        Ok(found) => {
            let (store, key) = (found.store.clone(), found.key.clone());
            match attempt(
                &config,
                &machine,
                &started,
                Way::Clone(Box::new(found)),
                watcher.clone(),
                &given_up,
            )
            .await
            {
                Err(error) if !error.may_be_the_clones() => return Err(error),
                Err(error) => {
                    let why = sentence(&error);
                    tracing::warn!(machine = %machine.id, template = %key, why, "the machine does not come up as a clone, and boots instead");
                    clone::give_up_on(&store, &key, &error, &why);
                    why
                }
                Ok(vm) => {
                    store.note_use(&key, None);
                    return Ok(vm);
                }
            }
        }
        Err(why) => {
            tracing::info!(machine = %machine.id, why, "the machine is no clone");
            why
        }
    };
    attempt(&config, &machine, &started, Way::Boot { why }, watcher, &given_up).await
}

/// How the guest comes to run.
enum Way {
    Clone(Box<Found>),
    Boot { why: String },
}

/// Starts the machine in one way: it is there in the end, or nothing of it.
async fn attempt(
    config: &Config,
    machine: &Machine,
    plan: &Plan,
    way: Way,
    watcher: Option<Watcher>,
    given_up: &CancellationToken,
) -> Result<Vm, VmError> {
    let state = StateDir::create(&config.state_dir, &machine.id)?;
    let mut record = record(machine, plan);
    tracing::info!(machine = %machine.id, acceleration = %plan.host.acceleration, reason = plan.reason, "the machine starts");
    let built = tokio::select! {
        built = bring_up(config, machine, plan, way, (&state, &mut record), watcher) => built,
        () = given_up.cancelled() => Err(VmError::Cancelled),
    };
    if built.is_err() {
        undo(&config.state_dir, &state, &record).await;
    }
    built
}

pub(super) fn record(machine: &Machine, plan: &Plan) -> Record {
    Record {
        id: machine.id.to_string(),
        guest: machine.guest.name.clone(),
        launcher: ProcessId::of(std::process::id()),
        qemu: None,
        helpers: Vec::new(),
        vsock: None,
        acceleration: Some(plan.host.acceleration),
        acceleration_reason: Some(plan.reason.clone()),
        origin: None,
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        netns: None,
        cgroup: None,
        uid: None,
    }
}

/// Makes the machine and waits for its agent.
async fn bring_up(
    config: &Config,
    machine: &Machine,
    plan: &Plan,
    way: Way,
    (state, record): (&StateDir, &mut Record),
    watcher: Option<Watcher>,
) -> Result<Vm, VmError> {
    let (origin, restore) = match way {
        Way::Boot { why } => {
            record.origin = Some(state::Origin::Boot { why });
            (Origin::Boot, None)
        }
        Way::Clone(found) => {
            let (mode, why) = mode::choose(config, machine.memory_mib);
            tracing::debug!(machine = %machine.id, %mode, why, "the machine is a clone");
            record.origin = Some(state::Origin::Clone {
                template: found.key.to_string(),
                mode,
            });
            let (origin, restore) = found.prepare(config, machine, mode).await?;
            (origin, Some(restore))
        }
    };
    let mut made = build::make(config, machine, plan, origin, (state, record), watcher).await?;
    if let Some(restore) = restore {
        restore.wake(&mut made, machine, state).await?;
    }
    let Made {
        qemu,
        mut watch,
        qmp,
        begin,
        line,
        network,
        ports,
        memory,
        ..
    } = made;
    let Some(Line {
        ready,
        dialer,
        multiplexed,
        output,
    }) = line
    else {
        return Err(VmError::NoTemplate("it has no way to its agent".to_owned()));
    };
    if let Some(multiplexed) = &multiplexed {
        record.vsock = Some(multiplexed.address.clone());
        state.write(record)?;
    }
    let greeting = watch.during(async { Ok(ready.greeted().await?) }).await?;
    let agent = Arc::new(AgentClient::new(dialer, output));
    let configured = async {
        clock::synchronize(greeting.clock, &agent).await?;
        if let Some(network) = &network
            && !greeting.done.network
        {
            agent.configure_network(network).await?;
        }
        if let Some(sandbox) = &machine.sandbox
            && !greeting.done.sandbox
        {
            agent.configure_sandbox(sandbox).await.map_err(VmError::of_sandbox)?;
        }
        Ok(())
    };
    watch.during(configured).await?;
    // Mostly it has been for long: its own thread does it while the guest is restored and wakes up.
    let shared_memory = match memory {
        Some(CloneMemory::Shared(shared)) => Some(watch.during(async { Ok(shared.sealed().await?) }).await?),
        Some(CloneMemory::Copy { .. }) | None => None,
    };
    tracing::info!(machine = %machine.id, seconds = begin.elapsed().as_secs_f64(), "the guest is up");

    let (ended, exit) = watch::channel(None);
    let supervisor = tokio::spawn(async move {
        let exit = watch.end().await;
        ended.send_replace(Some(exit));
    });
    let resumed = Arc::new(Notify::new());
    let clock = clock::keep(machine.id.clone(), agent.clone(), resumed.clone(), exit.clone());
    tokio::spawn(clock);
    Ok(Vm {
        id: machine.id.clone(),
        state: state.clone(),
        state_dir: config.state_dir.clone(),
        record: record.clone(),
        qmp,
        qemu,
        agent,
        exit,
        supervisor,
        freed: tokio::sync::Mutex::new(false),
        _multiplexed: multiplexed,
        _ports: ports,
        shared_memory: Mutex::new(shared_memory),
        sizes: tokio::sync::Mutex::new(Sizes::of(machine)),
        paused: AtomicBool::new(false),
        resumed,
    })
}

/// Frees everything of a machine that is not to be; what cannot be freed is for the log, the caller has the first error.
pub(super) async fn undo(state_dir: &Path, state: &StateDir, record: &Record) {
    let mut problems = Vec::new();
    remains::free(state_dir, state, Some(record), &mut problems).await;
    for problem in problems {
        tracing::warn!(machine = record.id, problem, "something of the machine is left behind");
    }
}
