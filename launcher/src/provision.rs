//! What the guest is told at its first boot: the user's Ignition configuration, merged with the two units that bring the
//! agent up. The guest itself has no agent: it comes on a read-only disk, found by its serial number.

use coreos_kvm_ignition::{Config, Report, merge, v3::Version};
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

/// Containers live below the service's cgroup, so that its limits are lifted. An agent that fails takes the machine with it:
/// without it nobody could say any more how the containers are. It does so by a reset, as a kernel panic does, and not by a
/// power-off, which is how a guest ends that wants to.
fn service_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Agent of coreos-kvm\n\
         DefaultDependencies=no\n\
         Requires={MOUNT_UNIT}\n\
         After={MOUNT_UNIT} local-fs.target systemd-tmpfiles-setup.service systemd-sysctl.service\n\
         Conflicts=shutdown.target\n\
         Before=shutdown.target\n\
         FailureAction=reboot-force\n\
         [Service]\n\
         Type=exec\n\
         ExecStart={AGENT_MOUNT}/coreos-kvm-agent\n\
         StandardOutput=journal+console\n\
         # When the guest powers off, what the agent leaves behind is killed with it.\n\
         KillMode=mixed\n\
         TimeoutStopSec=15s\n\
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
    #[error("the Ignition configuration is wrong: {0}")]
    User(Report),
    #[error(
        "the Ignition configuration cannot be given to the guest {guest:?}, which takes the versions {accepted}: {report}"
    )]
    Guest {
        guest: String,
        accepted: String,
        report: Box<Report>,
    },
    #[error("the Ignition configuration cannot be merged with what the guest needs for its agent: {0}")]
    Merge(Report),
    #[error(
        "the Ignition configuration has {size} bytes with what the guest needs added; at most {CONFIGURATION_MAX} are possible"
    )]
    Size { size: usize },
    #[error("guest.toml of the guest {guest:?} names a version of Ignition that there is not: {report}")]
    Description { guest: String, report: Box<Report> },
}

/// The configuration that the guest of `machine` boots with, as JSON.
///
/// # Errors
/// When the user's configuration is wrong, needs what the guest does not know, or is too long.
pub fn provision(machine: &Machine) -> Result<String, ProvisionError> {
    let guest = &machine.guest;
    let accepted: Vec<Version> = guest
        .ignition_versions
        .iter()
        .map(|version| version.parse())
        .collect::<Result<_, Report>>()
        .map_err(|report| ProvisionError::Description {
            guest: guest.name.clone(),
            report: Box::new(report),
        })?;
    let for_guest = |config: &Config| {
        config.for_guest(&accepted).map_err(|report| ProvisionError::Guest {
            guest: guest.name.clone(),
            accepted: guest.ignition_versions.join(", "),
            report: Box::new(report),
        })
    };
    // What is ours is in the oldest version of the specification, and hence in any.
    let ours = for_guest(&Config::parse(&ours()).map_err(ProvisionError::Merge)?)?;
    let merged = match &machine.ignition {
        None => ours,
        Some(text) => {
            let user = Config::parse(text).map_err(ProvisionError::User)?;
            for key in user.unknown_keys() {
                tracing::warn!(machine = %machine.id, key, "the Ignition configuration has a key that Ignition does not know");
            }
            merge(&for_guest(&user)?, &ours).map_err(ProvisionError::Merge)?
        }
    };
    let json = merged.to_json();
    if json.len() > CONFIGURATION_MAX {
        return Err(ProvisionError::Size { size: json.len() });
    }
    Ok(json)
}

fn ours() -> String {
    let config = json!({
        "ignition": { "version": "3.0.0" },
        "systemd": { "units": [
            { "name": MOUNT_UNIT, "mask": false, "contents": mount_unit() },
            { "name": SERVICE_UNIT, "mask": false, "enabled": true, "contents": service_unit() },
        ] },
    });
    config.to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::machine::tests::machine;

    fn provisioned(ignition: Option<&str>) -> Result<Value, String> {
        let machine = Machine {
            ignition: ignition.map(str::to_owned),
            ..machine()
        };
        let json = provision(&machine).map_err(|error| error.to_string())?;
        Ok(serde_json::from_str(&json).unwrap())
    }

    fn unit<'a>(config: &'a Value, name: &str) -> Option<&'a Value> {
        config["systemd"]["units"]
            .as_array()?
            .iter()
            .find(|unit| unit["name"] == name)
    }

    #[test]
    fn a_guest_without_configuration_gets_its_agent() {
        let config = provisioned(None).unwrap();
        assert!(unit(&config, MOUNT_UNIT).is_some());
        assert_eq!(unit(&config, SERVICE_UNIT).unwrap()["enabled"], true);
    }

    #[test]
    fn what_the_user_wrote_stays() {
        let user = r#"{"ignition": {"version": "3.3.0"},
            "storage": {"files": [{"path": "/etc/motd", "contents": {"source": "data:,hello"}}]},
            "systemd": {"units": [{"name": "a.service", "enabled": true, "contents": "[Service]\nExecStart=/bin/true"}]}}"#;
        let config = provisioned(Some(user)).unwrap();
        assert_eq!(config["ignition"]["version"], "3.3.0");
        assert_eq!(config["storage"]["files"][0]["path"], "/etc/motd");
        assert!(unit(&config, "a.service").is_some() && unit(&config, SERVICE_UNIT).is_some());
    }

    #[test]
    fn the_agents_unit_is_ours_whatever_the_user_says_of_it() {
        let user = r#"{"ignition": {"version": "3.3.0"},
            "systemd": {"units": [{"name": "coreos-kvm-agent.service", "mask": true, "contents": "[Service]\nExecStart=/bin/false"}]}}"#;
        let config = provisioned(Some(user)).unwrap();
        let unit = unit(&config, SERVICE_UNIT).unwrap();
        assert_eq!((&unit["mask"], &unit["enabled"]), (&false.into(), &true.into()));
        assert_eq!(unit["contents"], service_unit());
    }

    #[test]
    fn a_newer_version_than_the_guests_is_brought_down_when_nothing_is_lost() {
        let config = provisioned(Some(r#"{"ignition": {"version": "3.5.0"}}"#)).unwrap();
        assert_eq!(config["ignition"]["version"], "3.3.0");
    }

    #[rstest::rstest]
    #[case("{\n  \"ignition\": {]", "the Ignition configuration is wrong: line 2, column 16")]
    #[case(r#"{"ignition": {"version": "2.3.0"}}"#, "2.3.0")]
    fn a_wrong_configuration_is_told_with_its_place(#[case] text: &str, #[case] expected: &str) {
        let error = provisioned(Some(text)).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
