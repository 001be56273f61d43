//! The agent of a machine that is saved as a template: it makes the guest quiet, says so, and sleeps while the machine is saved.
//! What wakes up is a clone, perhaps much later, and the first thing that it does is to become a machine of its own.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use coreos_kvm_proto::{
    AGENT_SERIAL_PORT, PROTOCOL, TEMPLATE_ARGUMENT, WAKE_MAX,
    agent::{
        Awakening, ConfigureNetworkRequest, ConfigureSandboxRequest, TemplatePlugged, TemplateQuiet, TemplateReady,
    },
};
use protobuf::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::{
    containers::Containers, devices, free_memory, greeting::kernel_argument, identity, mounts::Shm, quiet,
    rehearsal::rehearse, serial::SerialPort, share::Share,
};

/// What a clone does after its containers have begun to start waits so long.
const LATER: Duration = Duration::from_secs(2);

/// What the machine is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A template of nobody's own.
    Plain,
    /// One with a user's configuration, whose services may wait for their machine.
    Own,
}

/// The kind of template that the machine is started as; None for a machine that is none.
pub(crate) fn kind() -> Option<Kind> {
    match kernel_argument(TEMPLATE_ARGUMENT)?.as_str() {
        "own" => Some(Kind::Own),
        _ => Some(Kind::Plain),
    }
}

/// A guest that is quiet.
pub(crate) struct Template {
    kind: Kind,
    port: SerialPort,
}

impl Template {
    /// Makes the guest ready to be saved. To be called before the reaper is at work, for it asks programs how they ended.
    ///
    /// # Errors
    /// When the guest cannot be made quiet.
    pub(crate) async fn prepare(kind: Kind, share: &Share, shm: &Shm) -> Result<Self> {
        devices::load_drivers()?;
        let mut port = SerialPort::open(AGENT_SERIAL_PORT).context("opening the port on which clones are woken")?;
        quiet::boot_has_ended().await;
        quiet::halt_services().await?;
        // A user's service that looks around would wait for it.
        if kind == Kind::Plain {
            share.mount_ahead().context("mounting the shared directory ahead")?;
        }
        shm.mount(0).context("mounting the pod's /dev/shm ahead")?;
        plug_card(&mut port).await.context("finding the clones' network card")?;
        Ok(Self { kind, port })
    }

    /// Says that the guest can be saved, and comes back in a clone, whose identity is the clone's own.
    ///
    /// # Errors
    /// When a clone cannot be made a machine of its own: it must not go on then.
    pub(crate) async fn sleep(self, containers: &Containers) -> Result<Awake> {
        let Self { kind, mut port } = self;
        let template = identity::Ids::read().context("reading the template's ids")?;
        let ready = TemplateReady {
            boot_id: template.boot_id.to_vec(),
            machine_id: template.machine_id.to_vec(),
            ..Default::default()
        };
        free_memory::clear()?;
        rehearse(containers, template)
            .await
            .context("rehearsing a clone's start")?;
        let template = template.machine_name();
        let others = containers.set_others_aside();
        send(&mut port, &ready.write_to_bytes()?)
            .await
            .context("saying that the guest may be saved")?;

        let told = receive(&mut port).await.context("being woken")?;
        let told = Awakening::parse_from_bytes(&told).context("reading who the machine is")?;
        let begin = Instant::now();
        identity::renew(&template, &told)?;
        let renewed = begin.elapsed();
        quiet::unmark()?;
        if told.plugged {
            devices::find_new()?;
        }
        if !told.card {
            devices::stop_card()?;
        }
        tracing::debug!(?renewed, awake = ?begin.elapsed(), "the guest is a machine of its own");
        tokio::spawn(async move {
            tokio::time::sleep(LATER).await;
            others.let_on();
            if let Err(error) = quiet::wake_services(kind) {
                tracing::warn!(error = format!("{error:#}"), "not all services of the guest are awake");
            }
        });
        Ok(Awake {
            ready_port: told.ready_port,
            connections: told.serial.then_some(port),
            network: told.network.into_option(),
            sandbox: told.sandbox.into_option(),
        })
    }
}

/// Says that the guest is quiet, and finds the network card that the host then plugs in. Before, its services would have tried to use it.
async fn plug_card(port: &mut SerialPort) -> Result<()> {
    let quiet = TemplateQuiet {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: PROTOCOL,
        ..Default::default()
    };
    send(port, &quiet.write_to_bytes()?).await?;
    TemplatePlugged::parse_from_bytes(&receive(port).await?)?;
    devices::find_card()
}

/// What a clone is told about its ways to the host, and what it is to do before it greets.
pub(crate) struct Awake {
    /// Port of the host that waits for the clone's greeting.
    pub(crate) ready_port: u32,
    /// What connections are made on, in a clone that has no vsock. Its share comes by a serial port, too.
    pub(crate) connections: Option<SerialPort>,
    pub(crate) network: Option<ConfigureNetworkRequest>,
    pub(crate) sandbox: Option<ConfigureSandboxRequest>,
}

/// Sends a message: its length, 4 bytes, big-endian, and it.
async fn send(port: &mut SerialPort, message: &[u8]) -> Result<()> {
    let length = u32::try_from(message.len())?.to_be_bytes();
    Ok(port.write_all(&[&length, message].concat()).await?)
}

async fn receive(port: &mut SerialPort) -> Result<Vec<u8>> {
    let length = usize::try_from(port.read_u32().await?)?;
    ensure!(length <= WAKE_MAX, "a message of {length} bytes is too long");
    let mut message = vec![0; length];
    port.read_exact(&mut message).await?;
    Ok(message)
}
