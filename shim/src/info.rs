//! `-info`: what this runtime is, for `ctr plugins inspect-runtime` and the kubelet's runtime features.

use std::collections::HashMap;

use anyhow::Context;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use coreos_kvm_launcher::config::ANNOTATIONS;
use protobuf::{Message, MessageField, well_known_types::any::Any};
use serde_json::json;

/// What containerd calls the features of the OCI specification (`core/runtime/typeurl.go` in its tree).
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The `RuntimeInfo` message, ready to be printed.
pub(crate) fn info() -> anyhow::Result<Vec<u8>> {
    let annotations = ANNOTATIONS.map(|name| format!("coreos-kvm.io/{name}")).join(",");
    let info = RuntimeInfo {
        name: "io.containerd.coreos-kvm.v2".to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        annotations: HashMap::from([("coreos-kvm.io/annotations".to_owned(), annotations)]),
        features: MessageField::some(features()?),
        ..Default::default()
    };
    info.write_to_bytes().context("writing the answer")
}

/// What a pod may count on (`features.md` of the OCI runtime specification). containerd 2.x asks for it before it hands over mounts
/// whose owners are to be mapped; from 2.2 on it tells the kubelet.
fn features() -> anyhow::Result<Any> {
    let features = json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "mountOptions": ["bind", "idmap", "private", "rbind", "ridmap", "ro", "rprivate", "rro", "rshared", "rslave", "rw", "shared", "slave"],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "mountExtensions": {"idmap": {"enabled": true}},
        },
    });
    Ok(Any {
        type_url: FEATURES.to_owned(),
        value: serde_json::to_vec(&features).context("writing the features")?,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_learns_that_mounts_may_have_other_owners() {
        let info = RuntimeInfo::parse_from_bytes(&info().unwrap()).unwrap();
        let features = info.features.unwrap();
        assert_eq!(features.type_url, FEATURES);
        let features: serde_json::Value = serde_json::from_slice(&features.value).unwrap();
        assert_eq!(features["linux"]["mountExtensions"]["idmap"]["enabled"], true);
        assert!(
            features["linux"]["namespaces"]
                .as_array()
                .unwrap()
                .contains(&"user".into())
        );
    }
}
