//! Section `etcd`: options of the unit `etcd-member.service`.

use super::{platform::Platform, semver, service, service::Wrapper};
use crate::{
    etcd2::ETCD2,
    node::{Node, Value},
    report::{Place, Report},
    shape::{Field, Language, boolean, int, text},
};

/// Options of etcd 2.3, in the order of their flags, after the version that says which etcd it is.
const ETCD_2: Language = Language {
    fields: &after_version(),
    version_name,
};

const fn after_version() -> [Field; ETCD2.len() + 1] {
    let mut fields = [text("version"); ETCD2.len() + 1];
    let mut index = 0;
    while index < ETCD2.len() {
        fields[index + 1] = ETCD2[index];
        index += 1;
    }
    fields
}

/// Options of etcd 3, in the order of their flags. A version is 30 for 3.0, 31 for 3.1, and so on.
const ETCD_3: Language = Language {
    fields: &[
        text("version"),
        text("name"),
        text("data_dir"),
        text("wal_dir"),
        int("snapshot_count"),
        int("heartbeat_interval"),
        int("election_timeout"),
        boolean("enable_pprof"),
        boolean("enable_v2").since(32),
        text("listen_peer_urls"),
        text("listen_client_urls"),
        int("max_snapshots"),
        int("max_wals"),
        text("cors"),
        int("quota_backend_bytes").since(33),
        int("max_txn_ops").since(33),
        int("max_request_bytes").since(33),
        text("grpc_keepalive_min_time").since(33),
        text("grpc_keepalive_interval").since(33),
        text("grpc_keepalive_timeout").since(33),
        text("initial_advertise_peer_urls"),
        text("initial_cluster"),
        text("initial_cluster_state"),
        text("initial_cluster_token"),
        text("advertise_client_urls"),
        text("discovery"),
        text("discovery_srv"),
        text("discovery_fallback"),
        text("discovery_proxy"),
        boolean("strict_reconfig_check"),
        int("auto_compaction_retention").until(32),
        text("auto_compaction_retention").since(33),
        text("auto_compaction_mode").since(33),
        text("proxy"),
        int("proxy_failure_wait"),
        int("proxy_refresh_interval"),
        int("proxy_dial_timeout"),
        int("proxy_write_timeout"),
        int("proxy_read_timeout"),
        text("ca_file"),
        text("cert_file"),
        text("key_file"),
        boolean("client_cert_auth"),
        text("client_crl_file").since(33),
        text("trusted_ca_file"),
        boolean("auto_tls"),
        text("peer_ca_file"),
        text("peer_cert_file"),
        text("peer_key_file"),
        boolean("peer_client_cert_auth"),
        text("peer_crl_file").since(33),
        text("peer_trusted_ca_file"),
        boolean("peer_auto_tls"),
        text("peer_cert_allowed_cn").since(33),
        text("auth_token").since(32),
        boolean("debug"),
        text("log_package_levels"),
        boolean("force_new_cluster"),
        text("metrics").since(31),
        text("log_output").since(31),
        text("listen_metrics_urls").since(33),
        boolean("experimental_initial_corrupt_check").since(33),
        text("experimental_corrupt_check_time").since(33),
        text("experimental_enable_v2v3").since(33),
    ],
    version_name,
};

fn version_name(version: u8) -> String {
    format!("etcd {}.{}", version / 10, version % 10)
}

/// The last minor version of each major that ct 0.9 knows the options of.
const NEWEST_MINOR: u64 = 3;

/// The unit that the section asks for; None if something is wrong with it, which the report has.
pub(super) fn unit(section: Node, platform: Option<Platform>, report: &mut Report) -> Option<Node> {
    let place = Place::ROOT.key("etcd");
    let position = section.position;
    let (language, version, tag) = {
        let map = match &section.value {
            Value::Map(map) => map,
            _ => {
                report.error(&section, &place, "a map of etcd's options is expected here");
                return None;
            }
        };
        match semver::of_section(map, &place, report).ok()? {
            None => (&ETCD_3, 30, None),
            Some((version, node)) => {
                let place = place.key("version");
                if version.is_before(2, 3) {
                    report.error(node, &place, "is too old: etcd 2.3.0 or later is expected");
                    return None;
                }
                if version.major > 3 {
                    report.error(node, &place, "is too new: etcd 2 or 3 is expected");
                    return None;
                }
                if version.minor > NEWEST_MINOR {
                    let message = format!(
                        "is newer than what is known: it takes the options of etcd {}.{NEWEST_MINOR}",
                        version.major
                    );
                    report.warning(node, &place, message);
                }
                // At most 3.
                let minor = u8::try_from(version.minor.min(NEWEST_MINOR)).unwrap_or_default();
                match version.major {
                    2 => (&ETCD_2, 23, Some(version)),
                    _ => (&ETCD_3, 30 + minor, Some(version)),
                }
            }
        }
    };
    let mut shaped = language.shape_at(section, version, &place, report);
    let options = shaped.as_map_mut()?;
    options.remove("version");
    let environment = tag.map(|tag| format!("ETCD_IMAGE_TAG=v{tag}"));
    let mut wrapper = Wrapper::new("/usr/lib/coreos/etcd-wrapper $ETCD_OPTS", environment);
    wrapper.add_flags(options, platform, |key| key.replace('_', "-"), &place, report);
    Some(service::enabled(
        "etcd-member.service",
        "20-clct-etcd-member.conf",
        wrapper.contents(),
        position,
    ))
}
