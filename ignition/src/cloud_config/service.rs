//! Services that are given their options as variables of the environment.

use crate::{
    node::{Map, Node, Value},
    report::{Place, Report},
    shape::{Field, boolean, int, text},
};

/// A section below `coreos` and the service that it is for.
pub(super) struct Service {
    pub(super) section: &'static str,
    pub(super) unit: &'static str,
    prefix: &'static str,
    /// Variables that are not called by prefix and key.
    exceptions: &'static [(&'static str, &'static str)],
    /// Why one should not use it any more.
    pub(super) deprecated: Option<&'static str>,
}

/// In the order in which coreos-cloudinit writes them.
pub(super) const SERVICES: &[Service] = &[
    Service {
        section: "flannel",
        unit: "flanneld.service",
        prefix: "FLANNELD_",
        exceptions: &[("interface", "FLANNELD_IFACE")],
        deprecated: None,
    },
    Service {
        section: "etcd",
        unit: "etcd.service",
        prefix: "ETCD_",
        exceptions: &[("snapshot_count", "ETCD_SNAPSHOTCOUNT")],
        deprecated: Some("etcd 0.4 is not in Container Linux any more: etcd-member.service is"),
    },
    Service {
        section: "etcd2",
        unit: "etcd2.service",
        prefix: "ETCD_",
        exceptions: &[],
        deprecated: Some("etcd2 is not in Container Linux any more: etcd-member.service is"),
    },
    Service {
        section: "fleet",
        unit: "fleet.service",
        prefix: "FLEET_",
        exceptions: &[],
        deprecated: Some("fleet is not in Container Linux any more"),
    },
    Service {
        section: "locksmith",
        unit: "locksmithd.service",
        prefix: "LOCKSMITHD_",
        exceptions: &[
            ("window_start", "REBOOT_WINDOW_START"),
            ("window_length", "REBOOT_WINDOW_LENGTH"),
        ],
        deprecated: None,
    },
];

/// Options of etcd 0.4, and some of etcd 2.
pub(super) const ETCD: &[Field] = &[
    text("addr"),
    text("advertise_client_urls"),
    text("bind_addr"),
    text("ca_file"),
    text("cert_file"),
    int("cluster_active_size"),
    text("cluster_remove_delay"),
    text("cluster_sync_interval"),
    text("cors"),
    text("data_dir"),
    text("discovery"),
    text("discovery_fallback"),
    text("discovery_srv"),
    text("discovery_proxy"),
    int("election_timeout"),
    boolean("force_new_cluster"),
    text("graphite_host"),
    int("heartbeat_interval"),
    text("http_read_timeout"),
    text("http_write_timeout"),
    text("initial_advertise_peer_urls"),
    text("initial_cluster"),
    text("initial_cluster_state"),
    text("initial_cluster_token"),
    text("key_file"),
    text("listen_client_urls"),
    text("listen_peer_urls"),
    int("max_result_buffer"),
    int("max_retry_attempts"),
    int("max_snapshots"),
    int("max_wals"),
    text("name"),
    text("peer_addr"),
    text("peer_bind_addr"),
    text("peer_ca_file"),
    text("peer_cert_file"),
    int("peer_election_timeout"),
    int("peer_heartbeat_interval"),
    text("peer_key_file"),
    text("peers"),
    text("peers_file"),
    text("proxy"),
    text("retry_interval"),
    boolean("snapshot"),
    int("snapshot_count"),
    text("trace"),
    boolean("verbose"),
    boolean("very_verbose"),
    boolean("very_very_verbose"),
];

/// Options of flannel.
pub(super) const FLANNEL: &[Field] = &[
    text("etcd_endpoints"),
    text("etcd_cafile"),
    text("etcd_certfile"),
    text("etcd_keyfile"),
    text("etcd_prefix"),
    text("etcd_username"),
    text("etcd_password"),
    text("ip_masq"),
    text("subnet_file"),
    text("interface"),
    text("public_ip"),
];

/// Options of fleet.
pub(super) const FLEET: &[Field] = &[
    text("agent_ttl"),
    text("authorized_keys_file"),
    boolean("disable_engine"),
    text("engine_reconcile_interval"),
    text("etcd_cafile"),
    text("etcd_certfile"),
    text("etcd_keyfile"),
    text("etcd_key_prefix"),
    text("etcd_request_timeout"),
    text("etcd_servers"),
    text("etcd_username"),
    text("etcd_password"),
    text("metadata"),
    text("public_ip"),
    int("token_limit"),
    int("verbosity"),
    boolean("verify_units"),
];

/// Options of locksmithd.
pub(super) const LOCKSMITH: &[Field] = &[
    text("endpoint"),
    text("etcd_cafile"),
    text("etcd_certfile"),
    text("etcd_keyfile"),
    text("etcd_username"),
    text("etcd_password"),
    text("group"),
    text("window_start"),
    text("window_length"),
];

/// Options whose values are numbers with a fraction.
const FRACTIONS: [&str; 7] = [
    "cluster_remove_delay",
    "cluster_sync_interval",
    "http_read_timeout",
    "http_write_timeout",
    "retry_interval",
    "engine_reconcile_interval",
    "etcd_request_timeout",
];

/// What the drop-in says; None if no option says anything.
pub(super) fn dropin(service: &Service, options: &Map, place: &Place<'_>, report: &mut Report) -> Option<String> {
    let mut lines = String::new();
    for (key, node) in options.iter() {
        let place = place.key(key);
        check(service, key, node, &place, report);
        let value = match &node.value {
            Value::Text(text) if FRACTIONS.contains(&key) => fraction(node, text, &place, report),
            Value::Text(text) => text.clone(),
            Value::Int(number) if *number != 0 => number.to_string(),
            Value::Bool(true) => "true".to_owned(),
            _ => continue,
        };
        if value.is_empty() {
            continue;
        }
        let exception = service.exceptions.iter().find(|(known, _)| *known == key);
        let variable = match exception {
            Some((_, variable)) => (*variable).to_owned(),
            None => format!("{}{}", service.prefix, key.to_ascii_uppercase()),
        };
        lines.push_str(&format!("Environment=\"{variable}={value}\"\n"));
    }
    (!lines.is_empty()).then(|| format!("[Service]\n{lines}"))
}

/// A number as Go writes it; nothing for 0.
fn fraction(node: &Node, text: &str, place: &Place<'_>, report: &mut Report) -> String {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && number != 0.0 => number.to_string(),
        Ok(0.0) => String::new(),
        _ => {
            report.error(node, place, "a number is expected, such as 5 or 0.5");
            String::new()
        }
    }
}

fn check(service: &Service, key: &str, node: &Node, place: &Place<'_>, report: &mut Report) {
    let Some(text) = node.as_text().filter(|text| !text.is_empty()) else {
        return;
    };
    let (right, expected) = match (service.section, key) {
        ("etcd2", "proxy") => (["on", "off", "readonly"].contains(&text), "on, off or readonly"),
        ("locksmith", "window_start") => (is_window_start(text), "a time such as `Sun 1:00` or `14:00`"),
        ("locksmith", "window_length") => (is_length(text), "a length of time such as 1h30m"),
        _ => return,
    };
    if !right {
        report.error(node, place, format!("{expected} is expected"));
    }
}

/// `Sun 1:00`, or without the day.
fn is_window_start(text: &str) -> bool {
    const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
    let time = match text.split_once(' ') {
        Some((day, time)) if DAYS.contains(&day.to_ascii_lowercase().as_str()) => time,
        Some(_) => return false,
        None => text,
    };
    let below = |digits: &str, limit: u32| {
        digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<u32>().is_ok_and(|number| number < limit)
    };
    time.split_once(':')
        .is_some_and(|(hour, minute)| below(hour, 24) && below(minute, 60))
}

/// Numbers, each with a unit.
fn is_length(text: &str) -> bool {
    let text = text.strip_prefix(['-', '+']).unwrap_or(text);
    text.ends_with(|c: char| c.is_ascii_lowercase())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("Sun 1:00", true)]
    #[case("4:5", true)]
    #[case("24:00", false)]
    #[case("Sunday 1:00", false)]
    #[case(":", false)]
    fn window_starts(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(is_window_start(text), expected);
    }
}
