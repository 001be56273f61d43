//! The agent of a machine that is saved as a template: it makes the guest quiet, says so, and sleeps while the machine is saved.
//! What wakes up is a clone, perhaps much later, and the first thing that it does is to become a machine of its own.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use coreos_kvm_proto::{
    PROTOCOL, TEMPLATE_ARGUMENT, WAKE_MAX, WAKE_PORT,
    agent::{Awakening, TemplateReady},
};
use nix::{
    fcntl::{OFlag, open},
    sys::{
        stat::Mode,
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
    },
};
use protobuf::Message;
use tokio::io::unix::AsyncFd;

use crate::{containers::Containers, free_memory, greeting::kernel_argument, identity, quiet, rehearsal::rehearse};

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
    port: WakePort,
}

impl Template {
    /// Makes the guest ready to be saved. To be called before the reaper is at work, for it asks programs how they ended.
    ///
    /// # Errors
    /// When the guest cannot be made quiet.
    pub(crate) async fn prepare(kind: Kind) -> Result<Self> {
        let port = WakePort::open().context("opening the port on which clones are woken")?;
        quiet::load_drivers()?;
        quiet::boot_has_ended().await;
        quiet::halt_services().await?;
        Ok(Self { kind, port })
    }

    /// Says that the guest can be saved, and comes back in a clone, whose identity is the clone's own. Answers the port of the
    /// host's vsock that waits for the clone's greeting.
    ///
    /// # Errors
    /// When a clone cannot be made a machine of its own: it must not go on then.
    pub(crate) async fn sleep(self, containers: &Containers) -> Result<u32> {
        let Self { kind, port } = self;
        let template = identity::Ids::read().context("reading the template's ids")?;
        let ready = TemplateReady {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL,
            boot_id: template.boot_id.to_vec(),
            machine_id: template.machine_id.to_vec(),
            ..Default::default()
        };
        let template = template.machine_name();
        free_memory::clear()?;
        rehearse(containers).await.context("rehearsing a clone's start")?;
        let others = containers.set_others_aside();
        port.send(&ready.write_to_bytes()?)
            .await
            .context("saying that the guest is quiet")?;

        let told = port.receive().await.context("being woken")?;
        let told = Awakening::parse_from_bytes(&told).context("reading who the machine is")?;
        let begin = Instant::now();
        identity::renew(&template, &told)?;
        let renewed = begin.elapsed();
        quiet::unmark()?;
        quiet::find_new_devices()?;
        tracing::info!(?renewed, awake = ?begin.elapsed(), "the guest is a machine of its own");
        tokio::spawn(async move {
            tokio::time::sleep(LATER).await;
            others.let_on();
            if let Err(error) = quiet::wake_services(kind) {
                tracing::warn!(error = format!("{error:#}"), "not all services of the guest are awake");
            }
        });
        Ok(told.ready_port)
    }
}

/// The serial port on which templates and their host talk.
struct WakePort(AsyncFd<OwnedFd>);

impl WakePort {
    fn open() -> io::Result<Self> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let port = open(WAKE_PORT, flags, Mode::empty())?;
        let mut settings = tcgetattr(&port)?;
        cfmakeraw(&mut settings);
        tcsetattr(&port, SetArg::TCSANOW, &settings)?;
        // SAFETY: the port is this structure's alone, and open as long as it is.
        Ok(Self(unsafe { AsyncFd::register(port) }?))
    }

    /// Sends `message` and waits until the host has it.
    async fn send(&self, message: &[u8]) -> Result<()> {
        let length = u32::try_from(message.len())?.to_be_bytes();
        let mut rest: &[u8] = &[&length, message].concat();
        while !rest.is_empty() {
            let mut ready = self.0.writable().await?;
            match ready.try_io(|port| Ok(nix::unistd::write(port, rest)?)) {
                Ok(count) => rest = &rest[count?..],
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    async fn receive(&self) -> Result<Vec<u8>> {
        let mut length = [0; 4];
        self.fill(&mut length).await?;
        let length = usize::try_from(u32::from_be_bytes(length))?;
        ensure!(length <= WAKE_MAX, "a message of {length} bytes is too long");
        let mut message = vec![0; length];
        self.fill(&mut message).await?;
        Ok(message)
    }

    async fn fill(&self, mut buffer: &mut [u8]) -> Result<()> {
        while !buffer.is_empty() {
            let mut ready = self.0.readable().await?;
            if let Ok(count) = ready.try_io(|port| Ok(nix::unistd::read(port, buffer)?)) {
                let count = count?;
                ensure!(count > 0, "the port was hung up");
                buffer = &mut buffer[count..];
            }
        }
        Ok(())
    }
}
