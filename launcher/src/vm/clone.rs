//! A machine that goes on where a template was saved: found or made, restored, and woken as a machine of its own.

use std::{fs::File, io, time::Duration};

use coreos_kvm_proto::{READY_PORT, SEED_LENGTH, WAKE_MAX, agent::Awakening};
use protobuf::Message;
use tokio::time::{Instant, sleep, timeout};

use super::{
    VmError,
    build::{self, CloneMemory, Line, Made, Memory, Origin, Ports, Transfer},
    clock,
    plan::{Plan, plan},
    port, save,
};
use crate::{
    carriage::Carriage,
    config::{Config, Templates},
    mac::Mac,
    machine::{Machine, Network},
    process::Process,
    sentence,
    state::{CloneMode, StateDir},
    template::{
        Key, Manifest, Store, Template, TemplateError,
        memory::{self, Change, Filler, ID},
        resident,
    },
    vsock::Multiplexed,
};

/// Between two looks at whether the template is there that another process makes.
const LOOK: Duration = Duration::from_millis(20);
/// Between two lines in the log of one who waits.
const NEWS: Duration = Duration::from_secs(5);

/// A template that a machine can be a clone of.
pub(super) struct Found {
    pub(super) store: Store,
    pub(super) key: Key,
    template: Template,
}

/// Finds the template of a machine, or makes it, or waits for whoever makes it.
///
/// # Errors
/// Why the machine has to boot instead, as a sentence.
pub(super) async fn find(config: &Config, machine: &Machine, started: &Plan) -> Result<Found, String> {
    if !machine.cloneable {
        return Err("it is not to be one".to_owned());
    }
    let of_template = save::template_machine(machine);
    let planned = match plan(config, &of_template).await {
        Ok(planned) if planned.ignition == started.ignition => planned,
        _ => return Err("its configuration refers to its own name or addresses".to_owned()),
    };
    unfit(machine, started).map_or(Ok(()), Err)?;
    let said = |error: TemplateError| sentence(&error);
    let store = Store::open(&config.template_dir, config.template_space_mib << 20).map_err(said)?;
    let key = save::key(config, &of_template, &planned).map_err(said)?;
    if let Some(why) = store.uses(key.as_str()).left_alone() {
        return Err(why);
    }
    let template = find_or_make(config, &of_template, planned, &store, &key).await?;
    Ok(Found { store, key, template })
}

/// What a clone cannot have.
fn unfit(machine: &Machine, plan: &Plan) -> Option<String> {
    if machine.disk.is_some() {
        return Some("it has a disk of its own".to_owned());
    }
    if let Network::User { .. } = machine.network {
        return Some("it is on QEMU's own network".to_owned());
    }
    // Its guest has put the disk away, and a clone's would find it again.
    if let Carriage::Disk { .. } = plan.ignition {
        return Some("its configuration is so long that it has a disk for it".to_owned());
    }
    None
}

async fn find_or_make(
    config: &Config,
    machine: &Machine,
    plan: Plan,
    store: &Store,
    key: &Key,
) -> Result<Template, String> {
    let begin = Instant::now();
    let mut news = begin + NEWS;
    loop {
        if let Some(template) = usable(store, key)? {
            return Ok(template);
        }
        let right = store.try_lock(key).map_err(|error| sentence(&error))?;
        match right {
            Some(right) => {
                // Whoever had the right may just have finished.
                if let Ok(Some(template)) = store.find(key) {
                    return Ok(template);
                }
                let draft = store.draft(key, &right).map_err(|error| sentence(&error))?;
                return save::make(config, machine, plan, draft, std::future::pending())
                    .await
                    .map_err(|error| {
                        let why = format!("its template cannot be made: {}", sentence(&error));
                        store.note_use(key, Some(why.clone()));
                        why
                    });
            }
            None if config.templates == Templates::Boot => {
                return Err("its template is just being made".to_owned());
            }
            None => {
                if Instant::now() >= news {
                    let seconds = begin.elapsed().as_secs();
                    tracing::info!(template = %key, seconds, "the machine waits for its template, which another process makes");
                    news += NEWS;
                }
                sleep(LOOK).await;
            }
        }
    }
}

/// The template, if there is one. One that is damaged is counted as its failure, and removed.
fn usable(store: &Store, key: &Key) -> Result<Option<Template>, String> {
    store.find(key).map_err(|error| {
        let why = sentence(&error);
        tracing::warn!(template = %key, why, "the template cannot be used");
        if forget_damaged(store, key, &error) {
            store.note_use(key, Some(why.clone()));
        }
        why
    })
}

/// Removes a template that is damaged, so that a whole one can be made. The first of several who find it so is answered true: it has
/// failed once.
fn forget_damaged(store: &Store, key: &Key, error: &TemplateError) -> bool {
    let TemplateError::Damaged { .. } = error else {
        return false;
    };
    store.remove(key.as_str()).unwrap_or_else(|error| {
        tracing::warn!(template = %key, %error, "the damaged template cannot be removed");
        true
    })
}

/// Notes that a clone did not come up.
pub(super) fn give_up_on(store: &Store, key: &Key, error: &VmError, why: &str) {
    match error {
        VmError::Template(error) if forget_damaged(store, key, error) => {}
        VmError::Qmp(_)
        | VmError::Ended { .. }
        | VmError::Timeout { .. }
        | VmError::Greeting(_)
        | VmError::Agent(_) => {}
        // Not the template's fault: other machines can be clones of it.
        _ => return,
    }
    store.note_use(key, Some(why.to_owned()));
}

/// What a clone still needs when its QEMU is there.
pub(super) struct Restore {
    key: Key,
    ids: Ids,
    manifest: Manifest,
}

/// What tells one boot of one machine from all others.
struct Ids {
    boot_id: [u8; ID],
    machine_id: [u8; ID],
}

impl Found {
    /// Prepares a clone: its memory, and what comes later.
    pub(super) async fn prepare(
        self,
        config: &Config,
        machine: &Machine,
        mode: CloneMode,
    ) -> Result<(Origin, Restore), VmError> {
        let ids = Ids {
            boot_id: random_id()?,
            machine_id: random_id()?,
        };
        let mut template = self.template;
        let manifest = template.manifest.clone();
        let state = std::mem::take(&mut template.state);
        let memory = match mode {
            CloneMode::Copy => {
                let memory = build::empty_memory(machine)?;
                let another = memory.try_clone().map_err(VmError::io("duplicating descriptors"))?;
                let filler = Filler::new(template.map, template.data, another);
                Memory::Copy { memory, filler }
            }
            CloneMode::CopyOnWrite => {
                let state_dir = config.state_dir.clone();
                let found = tokio::task::spawn_blocking(move || resident::resident(&state_dir, template));
                let found = timeout(machine.boot_timeout, found).await;
                let late = |_| VmError::NoTemplate("its memory is not there in time".to_owned());
                Memory::Shared(found.map_err(late)?.map_err(VmError::task)??)
            }
        };
        let restore = Restore {
            key: self.key,
            ids,
            manifest,
        };
        Ok((Origin::Clone { memory, state }, restore))
    }
}

impl Restore {
    /// What is to be changed in the memory that its template had.
    fn changes(&self, card: Option<Mac>) -> Vec<Change> {
        let Manifest {
            boot_id_at,
            machine_id_at,
            card_at,
            ..
        } = &self.manifest;
        let at = |places: &[u64], own: &[u8]| -> Vec<Change> { places.iter().map(|at| (*at, own.to_vec())).collect() };
        let mut changes = at(boot_id_at, &self.ids.boot_id);
        changes.extend(at(machine_id_at, &self.ids.machine_id));
        // One that is not connected is no interface of the clone's.
        changes.extend(card.map(|mac| at(card_at, &mac.0)).into_iter().flatten());
        changes
    }

    /// Restores the guest, gives it its devices, lets it go on, and tells it who it is.
    pub(super) async fn wake(self, made: &mut Made, machine: &Machine, state_dir: &StateDir) -> Result<(), VmError> {
        let Made {
            qemu,
            watch,
            qmp,
            ports,
            line,
            devices,
            transfer,
            memory,
            card,
            network,
            begin,
            ..
        } = made;
        let (Some(taken), Transfer::From(state)) = (ports.take(), transfer) else {
            return Err(VmError::NoTemplate("it has no port to be woken on".to_owned()));
        };
        let Ports {
            agent: mut port,
            share,
            output,
        } = taken;
        let ready_port = match line {
            Some(line) => line
                .ready
                .port()
                .map_err(VmError::io("asking for the port of the agent's greeting"))?,
            None => READY_PORT,
        };
        let serial = line.is_none();
        let woken = async {
            qmp.leave_memory_out().await?;
            // What the devices have left in memory is looked at when they are restored.
            let changes = self.changes(*card);
            match memory {
                Some(CloneMemory::Copy { memory, filling }) => {
                    filled(filling, &self.key).await?;
                    let changed = memory::change(memory, &changes);
                    changed.map_err(|error| VmError::NoTemplate(format!("its ids cannot be written: {error}")))?;
                }
                Some(CloneMemory::Shared(shared)) => {
                    shared.filled().await?;
                    resident::change(qemu.id(), shared.memory(), &changes).map_err(own_ids)?;
                }
                None => {}
            }
            qmp.restore_from(format!("fd:{state}")).await?;
            qmp.transferred().await?;
            tracing::debug!(seconds = begin.elapsed().as_secs_f64(), "the clone is restored");
            for device in devices.iter() {
                qmp.add_device(device).await?;
            }
            qmp.cont().await?;
            let mut message = Awakening {
                seed: random::<SEED_LENGTH>()?.to_vec(),
                boot_id: self.ids.boot_id.to_vec(),
                machine_id: self.ids.machine_id.to_vec(),
                ready_port,
                wall_clock_ns: clock::now_ns(),
                serial,
                network: network.clone().into(),
                sandbox: machine.sandbox.clone().into(),
                card: card.is_some(),
                plugged: !devices.is_empty(),
                ..Default::default()
            };
            if message.compute_size() > WAKE_MAX as u64 {
                // It is asked for these when it has greeted.
                message.network = None.into();
                message.sandbox = None.into();
            }
            port::send(&mut port, &message)
                .await
                .map_err(VmError::io("waking the guest"))?;
            tracing::debug!(seconds = begin.elapsed().as_secs_f64(), "the clone is told who it is");
            Ok(())
        };
        watch.during(woken).await?;
        match line {
            // There the two have not been compared.
            Some(line) if line.dialer.is_of_kernel() => {
                *ports = Some(Ports {
                    agent: port,
                    share,
                    output,
                });
            }
            Some(line) => {
                line.output = output;
                *ports = Some(Ports {
                    agent: port,
                    share,
                    output: None,
                });
            }
            None => {
                let (multiplexed, ready) = Multiplexed::start(port, state_dir.path())?;
                *line = Some(Line {
                    ready,
                    dialer: multiplexed.dialer(),
                    multiplexed: Some(multiplexed),
                    output,
                });
            }
        }
        Ok(())
    }
}

/// A machine that cannot be told from others is not to run.
fn own_ids(error: io::Error) -> VmError {
    VmError::NoTemplate(format!(
        "its ids cannot be written to its memory ({error}); with `clone_mode = \"copy\"` in the configuration that is not needed"
    ))
}

/// Waits until the memory is that of the template.
async fn filled(filling: &Process, key: &Key) -> Result<(), VmError> {
    let ended = filling.exited().await;
    let failure = match ended.code() {
        Some(0) => return Ok(()),
        Some(number) => io::Error::from_raw_os_error(number),
        None => io::Error::other(format!("the process that did it was ended: {ended}")),
    };
    Err(VmError::Template(if memory::is_damage(&failure) {
        TemplateError::Damaged {
            key: key.to_string(),
            problem: "its memory is not the one that was saved".to_owned(),
        }
    } else {
        TemplateError::Io {
            what: "copying the memory of the template",
            path: key.as_str().into(),
            source: failure,
        }
    }))
}

/// A random UUID, version 4 of RFC 9562, as the kernel and systemd make theirs.
fn random_id() -> Result<[u8; ID], VmError> {
    let mut id = random::<ID>()?;
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    Ok(id)
}

fn random<const N: usize>() -> Result<[u8; N], VmError> {
    let read = || {
        let mut bytes = [0; N];
        io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
        Ok(bytes)
    };
    read().map_err(VmError::io("reading random numbers"))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{DirBuilder, write},
        os::unix::fs::{DirBuilderExt, PermissionsExt},
    };

    use super::*;

    #[test]
    fn a_template_that_is_found_damaged_is_counted_and_removed_and_one_that_is_not_ours_is_left() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(&root.path().join("templates"), 1 << 30).unwrap();
        let key: Key = "00112233445566778899aabbccddeeff".parse().unwrap();
        assert!(usable(&store, &key).unwrap().is_none());

        let folder = root.path().join("templates").join(key.as_str());
        let manifest = folder.join("template.json");
        DirBuilder::new().mode(0o700).create(&folder).unwrap();
        let mode = |mode| std::fs::set_permissions(&manifest, std::fs::Permissions::from_mode(mode)).unwrap();
        write(&manifest, "{").unwrap();
        mode(0o640);
        let why = usable(&store, &key).unwrap_err();
        assert!(why.contains("is not this user's alone"), "{why}");
        assert!(folder.exists());
        assert_eq!(store.uses(key.as_str()).failures, 0);

        // One that lacks a file is as good as cut short.
        std::fs::remove_file(&manifest).unwrap();
        let why = usable(&store, &key).unwrap_err();
        assert!(why.contains("is damaged: it has no template.json"), "{why}");
        assert!(!folder.exists());

        DirBuilder::new().mode(0o700).create(&folder).unwrap();
        write(&manifest, "{").unwrap();
        mode(0o600);
        let why = usable(&store, &key).unwrap_err();
        assert!(why.contains("is damaged: template.json cannot be read"), "{why}");
        assert!(!folder.exists());
        let uses = store.uses(key.as_str());
        assert_eq!((uses.failures, uses.last_failure), (2, Some(why)));
    }
}
