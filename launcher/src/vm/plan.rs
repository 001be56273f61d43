//! What can be decided before anything is made: everything that is wrong with what the user or the admin wrote is found here.

use std::{fs::File, io};

use super::VmError;
use crate::{
    accel::{self, Acceleration, Host, Processor},
    carriage::{self, Carriage},
    config::Config,
    disk, forward,
    machine::{Machine, Network},
    netdev, provision,
    qemu::program::{self, Qemu},
};

/// A machine as it is going to be.
pub(super) struct Plan {
    pub(super) ignition: Carriage,
    data_disk: Option<File>,
    pub(super) qemu: Qemu,
    pub(super) host: Host,
    pub(super) reason: String,
    pub(super) groups: Vec<u32>,
}

impl Plan {
    /// The machine's own disk, once more.
    pub(super) fn data_disk(&self) -> Result<Option<File>, VmError> {
        let disk = self.data_disk.as_ref().map(File::try_clone).transpose();
        disk.map_err(VmError::io("duplicating descriptors"))
    }
}

pub(super) async fn plan(config: &Config, machine: &Machine) -> Result<Plan, VmError> {
    machine.check()?;
    // Asked for only where they may be needed: it costs a thread in the pod's network.
    let addresses = match &machine.configuration {
        Some(_) => netdev::addresses(&machine.network).await?,
        None => Vec::new(),
    };
    // A long configuration keeps a thread busy, and this one has others to serve.
    let provisioned = tokio::task::spawn_blocking({
        let machine = machine.clone();
        move || provision::provision(&machine, &addresses)
    });
    let ignition = provisioned
        .await
        .map_err(|error| VmError::io("reading the configuration")(io::Error::other(error)))?;
    let ignition = carriage::carry(ignition?, &machine.guest)?;
    if let Network::User { forwards } = &machine.network {
        forward::check(forwards)?;
    }
    let data_disk = machine.disk.as_ref();
    let data_disk = data_disk.map(|disk| disk::open(disk, machine.disk_min())).transpose()?;
    if !config.agent_disk.is_file() {
        return Err(VmError::AgentDisk {
            path: config.agent_disk.clone(),
        });
    }
    let qemu = program::find(&config.qemu, &config.state_dir).await?;
    let (acceleration, reason) = accel::choose(machine.acceleration, &config.state_dir).await?;
    let groups = match acceleration {
        Acceleration::Kvm => accel::kvm_group().map_err(VmError::Kvm)?.into_iter().collect(),
        Acceleration::Tcg => Vec::new(),
    };
    let processor = Processor::of_the_host().map_err(VmError::io("looking at the host's processor"))?;
    Ok(Plan {
        ignition,
        data_disk,
        qemu,
        host: Host {
            acceleration,
            processor,
        },
        reason,
        groups,
    })
}
