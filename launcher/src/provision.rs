//! What the guest is told at its first boot: the user's Ignition configuration, merged with the two units that bring the
//! agent up. The guest itself has no agent: it comes on a read-only disk, found by its serial number.

use coreos_kvm_proto::AGENT_DISK_SERIAL;
use serde_json::json;

use crate::machine::Machine;

/// Where the agent's disk is mounted in the guest.
const AGENT_MOUNT: &str = "/run/coreos-kvm/agent";
/// systemd.mount(5): a mount unit is named by its path, escaped as systemd-escape(1) says.
const MOUNT_UNIT: &str = r"run-coreos\x2dkvm-agent.mount";
const SERVICE_UNIT: &str = "coreos-kvm-agent.service";

/// The merged configuration is read by the guest through fw_cfg in small pieces, at growing cost; beyond this it takes
/// longer than anybody waits. In bytes.
const CONFIGURATION_MAX: usize = 1024 * 1024;

fn mount_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Disk with the agent of coreos-kvm\n\
         DefaultDependencies=no\n\
         Conflicts=umount.target\n\
         Before=umount.target\n\
         [Mount]\n\
         What=/dev/disk/by-id/virtio-{AGENT_DISK_SERIAL}\n\
         Where={AGENT_MOUNT}\n\
         Type=erofs\n\
         Options=ro,nodev,nosuid\n"
    )
}

/// Containers live below the service's cgroup, so that its limits are lifted. An agent that ends takes the machine with it:
/// without it nobody could say any more how the containers are.
fn service_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Agent of coreos-kvm\n\
         DefaultDependencies=no\n\
         Requires={MOUNT_UNIT}\n\
         After={MOUNT_UNIT} local-fs.target systemd-tmpfiles-setup.service systemd-sysctl.service\n\
         Conflicts=shutdown.target\n\
         Before=shutdown.target\n\
         FailureAction=poweroff-force\n\
         SuccessAction=poweroff-force\n\
         [Service]\n\
         Type=exec\n\
         ExecStart={AGENT_MOUNT}/coreos-kvm-agent\n\
         StandardOutput=journal+console\n\
         StandardError=journal+console\n\
         Delegate=yes\n\
         TasksMax=infinity\n\
         LimitNOFILE=1048576\n\
         OOMScoreAdjust=-999\n\
         [Install]\n\
         WantedBy=multi-user.target\n"
    )
}

/// A user's configuration that cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum ProvisionError {
    #[error("the Ignition configuration is no JSON: line {line}, column {column}: {problem}")]
    Syntax {
        line: usize,
        column: usize,
        problem: String,
    },
    #[error("the Ignition configuration has version {version:?}; the guest {guest:?} understands {known}")]
    Version {
        version: String,
        guest: String,
        known: String,
    },
    #[error(
        "the Ignition configuration has {size} bytes together with what the guest needs; at most {CONFIGURATION_MAX} are possible"
    )]
    Size { size: usize },
}

/// The configuration that the guest of `machine` boots with, as JSON.
///
/// # Errors
/// When the user's configuration is wrong, of a version that the guest does not understand, or too long.
pub fn provision(machine: &Machine) -> Result<String, ProvisionError> {
    let text = machine
        .ignition
        .as_deref()
        .unwrap_or(r#"{"ignition": {"version": "3.0.0"}}"#);
    let mut config: serde_json::Value = serde_json::from_str(text).map_err(|error| ProvisionError::Syntax {
        line: error.line(),
        column: error.column(),
        problem: error.to_string(),
    })?;
    let version = config["ignition"]["version"].as_str().unwrap_or_default().to_owned();
    if !machine.guest.ignition_versions.contains(&version) {
        return Err(ProvisionError::Version {
            version,
            guest: machine.guest.name.clone(),
            known: machine.guest.ignition_versions.join(", "),
        });
    }
    let units = &mut config["systemd"]["units"];
    if !units.is_array() {
        *units = json!([]);
    }
    if let Some(units) = units.as_array_mut() {
        units.push(json!({"name": MOUNT_UNIT, "contents": mount_unit()}));
        units.push(json!({"name": SERVICE_UNIT, "enabled": true, "contents": service_unit()}));
    }
    let merged = config.to_string();
    if merged.len() > CONFIGURATION_MAX {
        return Err(ProvisionError::Size { size: merged.len() });
    }
    Ok(merged)
}
