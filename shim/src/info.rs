//! `-info`: what this runtime is, for `ctr plugins inspect-runtime` and the kubelet's runtime features.

use std::collections::HashMap;

use anyhow::Context;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use coreos_kvm_launcher::config::ANNOTATIONS;
use protobuf::{Message, MessageField};

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
        ..Default::default()
    };
    info.write_to_bytes().context("writing the answer")
}
