//! What the guest is told at its first boot: the user's configuration as Ignition, merged with the two units that bring the
//! agent up. The guest itself has no agent: it comes on a read-only disk, found by its serial number.

mod metadata;

use std::net::IpAddr;

use base64::{Engine, prelude::BASE64_STANDARD};
use coreos_kvm_ignition::{Config, Options, Platform, Report, Version, report::Severity, transpile};
use coreos_kvm_proto::AGENT_DISK_SERIAL;
use serde_json::{Value, json};

use crate::machine::{Configuration, Machine};
use metadata::Metadata;

/// Where the agent's disk is mounted in the guest.
const AGENT_MOUNT: &str = "/run/coreos-kvm/agent";
/// systemd.mount(5): a mount unit is named by its path, escaped as systemd-escape(1) says.
const MOUNT_UNIT: &str = r"run-coreos\x2dkvm-agent.mount";
const SERVICE_UNIT: &str = "coreos-kvm-agent.service";

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
/// power-off, which is how a guest ends that wants to; and at once, for whatever else runs in the guest might take its time to end,
/// while the pod's status says that all is well.
fn service_unit() -> String {
    format!(
        "[Unit]\n\
         Description=Agent of coreos-kvm\n\
         DefaultDependencies=no\n\
         Requires={MOUNT_UNIT}\n\
         After={MOUNT_UNIT} local-fs.target systemd-tmpfiles-setup.service systemd-sysctl.service\n\
         Conflicts=shutdown.target\n\
         Before=shutdown.target\n\
         FailureAction=reboot-immediate\n\
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
    #[error("{origin}: {}", one_line(report))]
    User { origin: String, report: Report },
    #[error(
        "{origin} cannot be given to the guest {guest:?}, which takes Ignition {accepted}: {}",
        one_line(report)
    )]
    Guest {
        origin: String,
        guest: String,
        accepted: String,
        report: Report,
    },
    #[error(
        "{origin} cannot be merged with what the guest needs for its agent: {}",
        one_line(report)
    )]
    Merge { origin: String, report: Report },
    #[error("{origin} refers to the machine's {what}, and this machine has none")]
    Unknown { origin: String, what: &'static str },
    #[error(
        "guest.toml of the guest {guest:?} names a version of Ignition that there is not: {}",
        one_line(report)
    )]
    Description { guest: String, report: Report },
}

/// Reports have a line for each thing; errors and events are one line, and not a long one.
fn one_line(report: &Report) -> String {
    const SAID: usize = 10;
    let errors: Vec<String> = report
        .entries()
        .iter()
        .filter(|entry| entry.severity == Severity::Error)
        .map(ToString::to_string)
        .collect();
    let line = errors[..errors.len().min(SAID)].join("; ");
    match errors.len().saturating_sub(SAID) {
        0 => line,
        more => format!("{line}; and {more} more"),
    }
}

/// The configuration that the guest of `machine` boots with, as JSON. `addresses` are those that it will be reached by.
///
/// # Errors
/// When the user's configuration is wrong, needs what the guest does not know, or what is not known of the machine.
pub fn provision(machine: &Machine, addresses: &[IpAddr]) -> Result<String, ProvisionError> {
    let accepted = accepted(machine)?;
    let Some(Configuration { origin, text }) = &machine.configuration else {
        let newest = accepted.iter().map(|version| version.major()).max();
        return Ok(ours(newest.unwrap_or(3))?.to_json());
    };
    let metadata = Metadata::of(machine, addresses);
    let options = Options {
        platform: Some(Platform::Custom),
        addresses: metadata.for_cloud_config(),
        ..Options::default()
    };
    let transpiled = transpile(text, &options).map_err(|report| ProvisionError::User {
        origin: origin.clone(),
        report,
    })?;
    for entry in transpiled.report.entries() {
        tracing::warn!(machine = %machine.id, configuration = origin, "{}: {entry}", entry.severity);
    }
    let user = transpiled
        .config
        .for_guest(&accepted)
        .map_err(|report| ProvisionError::Guest {
            origin: origin.clone(),
            guest: machine.guest.name.clone(),
            accepted: machine.guest.ignition_versions.join(", "),
            report,
        })?;
    let mut ours = ours(user.version().major())?;
    let merging = |report| ProvisionError::Merge {
        origin: origin.clone(),
        report,
    };
    if let Some(unit) = metadata.unit(&user, origin)? {
        ours = ours.merge(&built_in(&unit)?).map_err(merging)?;
    }
    if refers_to_others(&user) {
        return Ok(side_by_side(&user, &ours)?.to_json());
    }
    Ok(user.merge(&ours).map_err(merging)?.to_json())
}

/// Whether the configuration has Ignition fetch others, which then go before all that stands in it, or take its place.
fn refers_to_others(config: &Config) -> bool {
    let json: Value = serde_json::from_str(&config.to_json()).unwrap_or_default();
    let empty = |value: &Value| match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.values().all(|value| value.is_null() || value == &json!({})),
        value => value.is_null(),
    };
    let references = json.pointer("/ignition/config").and_then(Value::as_object);
    references.is_some_and(|references| references.values().any(|value| !empty(value)))
}

/// A configuration that has Ignition fetch both, ours last: whatever the user's refers to, ours has the last word.
fn side_by_side(user: &Config, ours: &Config) -> Result<Config, ProvisionError> {
    let list = if user.version().major() == 2 { "append" } else { "merge" };
    let source = |config: &Config| format!("data:;base64,{}", BASE64_STANDARD.encode(config.to_json()));
    built_in(&json!({ "ignition": {
        "version": user.version().to_string(),
        "config": { list: [{ "source": source(user) }, { "source": source(ours) }] },
    } }))
}

fn accepted(machine: &Machine) -> Result<Vec<Version>, ProvisionError> {
    let versions = machine.guest.ignition_versions.iter().map(|version| version.parse());
    versions
        .collect::<Result<_, Report>>()
        .map_err(|report| ProvisionError::Description {
            guest: machine.guest.name.clone(),
            report,
        })
}

/// What is ours, in the first version of the major, which any later one takes.
fn ours(major: u8) -> Result<Config, ProvisionError> {
    let enabled = if major == 2 { "enable" } else { "enabled" };
    built_in(&json!({
        "ignition": { "version": format!("{major}.0.0") },
        "systemd": { "units": [
            { "name": MOUNT_UNIT, "mask": false, "contents": mount_unit() },
            { "name": SERVICE_UNIT, "mask": false, enabled: true, "contents": service_unit() },
        ] },
    }))
}

/// A configuration of our own making.
fn built_in(config: &Value) -> Result<Config, ProvisionError> {
    let parsed = Config::parse(&config.to_string()).map_err(|report| ProvisionError::Merge {
        origin: "the launcher's own configuration".to_owned(),
        report,
    });
    Ok(parsed?.0)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::machine::tests::machine;

    fn provisioned(ignition: Option<&str>) -> Result<Value, String> {
        provisioned_for(&["3.0.0", "3.1.0", "3.2.0", "3.3.0"], ignition)
    }

    fn provisioned_for(accepted: &[&str], text: Option<&str>) -> Result<Value, String> {
        let mut machine = machine();
        machine.guest.ignition_versions = accepted.iter().map(ToString::to_string).collect();
        machine.hostname = Some("web-0".to_owned());
        machine.configuration = text.map(|text| Configuration {
            origin: "configmap/os/config".to_owned(),
            text: text.to_owned(),
        });
        let json = provision(&machine, &["10.1.2.3".parse().unwrap()]).map_err(|error| error.to_string())?;
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
    #[case("{\n  \"ignition\": {]", "configmap/os/config: line 2, column 16")]
    #[case(
        "storage:\n  files:\n    - path: relative\n      filesystem: root\n",
        "configmap/os/config: line 3, column 13: storage.files.0.path: "
    )]
    fn a_wrong_configuration_is_told_with_its_place(#[case] text: &str, #[case] expected: &str) {
        let error = provisioned(Some(text)).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    const ETCD: &str =
        "etcd:\n  version: 3.3.1\n  name: '{HOSTNAME}'\n  advertise_client_urls: http://{PRIVATE_IPV4}:2379\n";

    #[rstest::rstest]
    #[case(&["3.3.0"], "3.3.0")]
    #[case(&["2.1.0", "2.2.0", "2.3.0"], "2.")]
    fn a_container_linux_config_gets_what_is_known_of_the_machine(#[case] accepted: &[&str], #[case] version: &str) {
        let config = provisioned_for(accepted, Some(ETCD)).unwrap();
        assert!(config["ignition"]["version"].as_str().unwrap().starts_with(version));
        assert!(unit(&config, SERVICE_UNIT).is_some() && unit(&config, "etcd-member.service").is_some());
        assert!(unit(&config, "coreos-metadata.service").is_some());
        let files = config["storage"]["files"].to_string();
        assert!(files.contains("COREOS_CUSTOM_HOSTNAME%3Dweb-0"), "{files}");
        assert!(files.contains("COREOS_CUSTOM_PRIVATE_IPV4%3D10.1.2.3"), "{files}");
    }

    #[test]
    fn what_is_not_known_of_the_machine_is_told() {
        let etcd = ETCD.replace("{PRIVATE_IPV4}", "[{PRIVATE_IPV6}]");
        let error = provisioned(Some(&etcd)).unwrap_err();
        assert!(
            error.contains("configmap/os/config refers to the machine's IPv6 address"),
            "{error}"
        );
    }

    #[test]
    fn butane_and_cloud_config_are_taken_too() {
        let butane = "variant: fcos\nversion: 1.4.0\nstorage:\n  files:\n    - path: /etc/motd\n      contents: {inline: hello}\n";
        let config = provisioned(Some(butane)).unwrap();
        assert_eq!(config["storage"]["files"][0]["contents"]["source"], "data:,hello");
        let cloud = "#cloud-config\nwrite_files:\n  - path: /etc/address\n    content: $private_ipv4\n";
        let config = provisioned(Some(cloud)).unwrap();
        assert_eq!(config["storage"]["files"][0]["contents"]["source"], "data:,10.1.2.3");
    }

    #[rstest::rstest]
    #[case("3.3.0", "replace", "merge")]
    #[case("3.3.0", "merge", "merge")]
    #[case("2.2.0", "replace", "append")]
    fn a_configuration_that_refers_to_others_does_not_lose_the_agent(
        #[case] version: &str,
        #[case] reference: &str,
        #[case] list: &str,
    ) {
        let source = json!({ "source": "data:,%7B%22ignition%22%3A%7B%22version%22%3A%223.0.0%22%7D%7D" });
        let source = if reference == "merge" { json!([source]) } else { source };
        let user = json!({ "ignition": { "version": version, "config": { reference: source } } });
        let config = provisioned_for(&[version], Some(&user.to_string())).unwrap();
        let children = config["ignition"]["config"][list].as_array().unwrap();
        let child = |index: usize| {
            let url = children[index]["source"].as_str().unwrap();
            let text = BASE64_STANDARD
                .decode(url.strip_prefix("data:;base64,").unwrap())
                .unwrap();
            serde_json::from_slice::<Value>(&text).unwrap()
        };
        assert_eq!(children.len(), 2);
        assert!(child(0)["ignition"]["config"][reference].to_string().contains("data:,"));
        assert!(unit(&child(1), SERVICE_UNIT).is_some(), "ours is the last");
    }

    #[test]
    fn an_event_tells_some_errors_and_counts_the_rest() {
        let paths: Vec<_> = (0..30)
            .map(|number| json!({ "path": format!("relative{number}") }))
            .collect();
        let text = json!({ "ignition": { "version": "3.3.0" }, "storage": { "files": paths } });
        let error = provisioned(Some(&text.to_string())).unwrap_err();
        assert!(error.ends_with("; and 20 more"), "{error}");
    }
}
