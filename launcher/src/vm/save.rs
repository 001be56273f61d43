//! Making a template: a machine without connections boots. When its agent says that the guest is quiet, it is given the network card that
//! its clones have; when the agent says that it may be saved, it is saved and ended.

use std::{
    fs::File,
    io::{self, BufWriter},
    time::{SystemTime, UNIX_EPOCH},
};

use coreos_kvm_proto::{
    PROTOCOL,
    agent::{TemplatePlugged, TemplateQuiet, TemplateReady},
};
use tokio::io::AsyncReadExt;
use tokio_util::sync::CancellationToken;

use super::{
    VmError, boot,
    build::{self, Made, Origin, Transfer},
    plan::{Plan, plan},
    port, remains,
};
use crate::{
    config::Config,
    console::harmless,
    machine::{Machine, MachineId, Network},
    state::StateDir,
    template::{
        Content, Draft, Key, Lock, Manifest, STATE_MAX, Store, Template, TemplateError,
        card::{self, TEMPLATE_MAC},
        memory::{self, ID},
        window,
    },
};

/// Makes the template of `machine` anew, whether there is one or not. When `interruption` is there first, nothing is left of it
/// before this answers.
///
/// # Errors
/// When it cannot be made; what was there before stays then.
pub async fn make_template(
    config: &Config,
    machine: &Machine,
    right: &Lock,
    interruption: impl Future<Output = ()>,
) -> Result<Template, VmError> {
    let machine = template_machine(machine);
    let plan = plan(config, &machine).await?;
    let key = key(config, &machine, &plan)?;
    let store = Store::open(&config.template_dir, config.template_space_mib << 20)?;
    let draft = store.draft(&key, right)?;
    let template = make(config, &machine, plan, draft, interruption).await?;
    store.forgive(&key);
    Ok(template)
}

/// The key of the template of `machine`.
///
/// # Errors
/// When the machine cannot be.
pub async fn template_key(config: &Config, machine: &Machine) -> Result<Key, VmError> {
    let machine = template_machine(machine);
    let plan = plan(config, &machine).await?;
    Ok(key(config, &machine, &plan)?)
}

/// The machine that is saved for `machine` to be a clone of: it has nothing that is one machine's own.
pub(super) fn template_machine(machine: &Machine) -> Machine {
    Machine {
        id: MachineId::template(),
        hostname: None,
        network: Network::None,
        sandbox: None,
        disk: None,
        cgroup: None,
        cloneable: false,
        ..machine.clone()
    }
}

pub(super) fn key(config: &Config, machine: &Machine, plan: &Plan) -> Result<Key, TemplateError> {
    Key::of(machine, &plan.ignition, &plan.host, &plan.qemu, &config.agent_disk)
}

/// Boots `machine`, as [`template_machine`] made it, saves it, and ends it. When the caller goes away before the end, nothing is left
/// of it either.
pub(super) async fn make(
    config: &Config,
    machine: &Machine,
    plan: Plan,
    draft: Draft,
    interruption: impl Future<Output = ()>,
) -> Result<Template, VmError> {
    let given_up = CancellationToken::new();
    let guard = given_up.clone().drop_guard();
    let machine = Machine {
        id: MachineId::of_template(draft.key()),
        ..machine.clone()
    };
    let mut task = tokio::spawn(make_or_undo(config.clone(), machine, plan, draft, given_up));
    let ended = tokio::select! {
        ended = &mut task => ended,
        () = interruption => {
            drop(guard);
            task.await
        }
    };
    ended.unwrap_or_else(|error| Err(VmError::task(error)))
}

async fn make_or_undo(
    config: Config,
    machine: Machine,
    plan: Plan,
    draft: Draft,
    given_up: CancellationToken,
) -> Result<Template, VmError> {
    // Whoever made it before and died has left it; nobody else does, for the right to make it is ours.
    remains::destroy(&config.state_dir, &machine.id).await?;
    let state = StateDir::create(&config.state_dir, &machine.id)?;
    let mut record = boot::record(&machine, &plan);
    tracing::info!(template = %draft.key(), "a template is made, which takes as long as a boot");
    let made = tokio::select! {
        made = boot_and_save(&config, &machine, &plan, draft, &state, &mut record) => made,
        () = given_up.cancelled() => Err(VmError::Cancelled),
    };
    boot::undo(&config.state_dir, &state, &record).await;
    made
}

async fn boot_and_save(
    config: &Config,
    machine: &Machine,
    plan: &Plan,
    draft: Draft,
    state: &StateDir,
    record: &mut crate::state::Record,
) -> Result<Template, VmError> {
    let memory = build::empty_memory(machine)?;
    let another = memory.try_clone().map_err(VmError::io("duplicating descriptors"))?;
    let origin = Origin::Template { memory: another };
    let mut made = build::make(config, machine, plan, origin, (state, record), None).await?;
    plug_card(&mut made).await?;
    let said = ready(&mut made).await?;
    let mut devices = save_devices(&mut made).await?;
    if plan.qemu.ivshmem && !window::forget_place(&mut devices) {
        return Err(VmError::NoSleep("its devices have no memory for output".to_owned()));
    }
    let seconds = made.begin.elapsed().as_secs_f64();
    // Nothing writes to the memory any more.
    made.qemu.kill().await;
    let manifest = Manifest {
        key: draft.key().to_string(),
        guest: machine.guest.name.clone(),
        vcpus: machine.vcpus,
        memory_mib: machine.memory_mib,
        acceleration: plan.host.acceleration,
        qemu: plan.qemu.version.to_string(),
        own: machine.configuration.is_some(),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs(),
        data_bytes: 0,
        state_bytes: 0,
        map_bytes: 0,
        state_crc: 0,
        map_crc: 0,
        boot_id_at: Vec::new(),
        machine_id_at: Vec::new(),
        card_at: Vec::new(),
    };
    // Some hundred megabytes go through a processor and to a disk.
    let size = machine.memory_mib << 20;
    let kept = tokio::task::spawn_blocking(move || keep(draft, &memory, size, &said, &devices, manifest));
    let template = kept
        .await
        .map_err(|error| VmError::io("keeping the template")(io::Error::other(error)))??;
    tracing::info!(
        template = template.manifest.key,
        seconds,
        bytes = template.manifest.bytes(),
        "the template is made"
    );
    Ok(template)
}

/// The ids of the template's guest.
struct Said {
    boot_id: [u8; ID],
    machine_id: [u8; ID],
}

/// Waits until the agent says that the guest is quiet, and plugs in the network card that its clones have, too.
async fn plug_card(made: &mut Made) -> Result<(), VmError> {
    let Made {
        watch,
        qmp,
        ports,
        devices,
        ..
    } = made;
    let port = &mut ports.as_mut().ok_or_else(no_port)?.agent;
    let plugged = async {
        let quiet: TemplateQuiet = port::receive(port).await.map_err(waiting())?;
        if (quiet.protocol, quiet.version.as_str()) != (PROTOCOL, env!("CARGO_PKG_VERSION")) {
            let version = harmless(&quiet.version);
            return Err(VmError::NoSleep(format!(
                "its agent has version {version} (protocol {}), but {} (protocol {PROTOCOL}) is needed: build the agent's disk anew",
                quiet.protocol,
                env!("CARGO_PKG_VERSION")
            )));
        }
        for device in devices {
            qmp.add_device(device).await?;
        }
        let told = port::send(port, &TemplatePlugged::default()).await;
        told.map_err(VmError::io("telling the guest of its network card"))
    };
    watch.during(plugged).await
}

/// Waits until the agent says that the guest can be saved.
async fn ready(made: &mut Made) -> Result<Said, VmError> {
    let port = &mut made.ports.as_mut().ok_or_else(no_port)?.agent;
    let said = made
        .watch
        .during(async { port::receive(port).await.map_err(waiting()) });
    let said: TemplateReady = said.await?;
    let id = |bytes: &[u8]| match <[u8; ID]>::try_from(bytes) {
        Ok(id) if id != [0; ID] => Ok(id),
        _ => Err(VmError::NoSleep("an id has 16 bytes, not all zero".to_owned())),
    };
    Ok(Said {
        boot_id: id(&said.boot_id)?,
        machine_id: id(&said.machine_id)?,
    })
}

fn no_port() -> VmError {
    VmError::NoTemplate("it has no port to say that it is ready".to_owned())
}

fn waiting() -> impl FnOnce(io::Error) -> VmError {
    VmError::io("waiting for the guest to be one that can be saved")
}

/// Halts the machine and has QEMU say the state of its devices.
async fn save_devices(made: &mut Made) -> Result<Vec<u8>, VmError> {
    let Made {
        watch, qmp, transfer, ..
    } = made;
    let Transfer::To { listener, folder, name } = transfer else {
        return Err(VmError::NoTemplate("it has no place to be saved to".to_owned()));
    };
    let saving = VmError::io("reading the state of devices");
    let saved = async {
        qmp.stop().await?;
        qmp.leave_memory_out().await?;
        let address = format!("unix:/proc/self/fd/{folder}/{name}");
        let read = async {
            let mut bytes = Vec::new();
            let (connection, _) = listener.accept().await?;
            connection.take(STATE_MAX).read_to_end(&mut bytes).await?;
            Ok(bytes)
        };
        let told = async {
            qmp.save_to(address).await?;
            qmp.transferred().await
        };
        // Should QEMU refuse, nobody connects.
        tokio::pin!(read);
        tokio::select! {
            read = &mut read => {
                let bytes = read.map_err(saving)?;
                qmp.transferred().await?;
                Ok(bytes)
            }
            told = told => {
                told?;
                read.await.map_err(saving)
            }
        }
    };
    watch.during(saved).await
}

fn keep(
    draft: Draft,
    memory: &File,
    size: u64,
    said: &Said,
    state: &[u8],
    manifest: Manifest,
) -> Result<Template, VmError> {
    let data = draft.data()?;
    let mut out = BufWriter::with_capacity(1 << 20, &data);
    let marks = [said.boot_id.as_slice(), &said.machine_id, &TEMPLATE_MAC.0];
    let saved = memory::save(memory, size, &mut out, &marks).and_then(|saved| {
        io::Write::flush(&mut out)?;
        Ok(saved)
    });
    let saved = saved.map_err(VmError::io("keeping the guest's memory"))?;
    drop(out);
    let mut places = saved.places.into_iter();
    let manifest = Manifest {
        boot_id_at: places.next().unwrap_or_default(),
        machine_id_at: places.next().unwrap_or_default(),
        card_at: places.next().unwrap_or_default(),
        ..manifest
    };
    if manifest.boot_id_at.is_empty() {
        return Err(VmError::NoSleep("its boot's id is nowhere in its memory".to_owned()));
    }
    if manifest.card_at.is_empty() || !card::has_card(state) {
        return Err(VmError::NoSleep(
            "its network card's address is nowhere in it".to_owned(),
        ));
    }
    let content = Content {
        map: &saved.map,
        state,
        manifest,
    };
    Ok(draft.finish(&data, content)?)
}
