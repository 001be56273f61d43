//! What the shim tells of a pod's machine to whoever looks at its sandbox.

use std::collections::BTreeMap;

use coreos_kvm_launcher::{
    state::{CloneMode, Origin, VsockAddress},
    vm::VmInfo,
};
use serde::Serialize;

/// What the annotations' names begin with. No pod can ask for one of them: they are added to what it asked for.
const PREFIX: &str = "machine.coreos-kvm.io/";

/// What `crictl inspectp` shows: as `info` with the Sandbox API, and else as annotations of the sandbox.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Facts<'a> {
    /// QEMU's.
    pid: Option<u32>,
    /// The guest's context id, where its vsock is the kernel's.
    #[serde(skip_serializing_if = "Option::is_none")]
    cid: Option<u32>,
    accel: Option<String>,
    accel_reason: Option<&'a str>,
    guest: &'a str,
    console: String,
    #[serde(flatten)]
    kind: Kind<'a>,
}

/// How the guest has come to run.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase", tag = "kind")]
enum Kind<'a> {
    Booted { why: &'a str },
    Clone { template: &'a str, memory: CloneMode },
    Unknown,
}

impl<'a> Facts<'a> {
    pub(crate) fn of(vm: &'a VmInfo) -> Self {
        let record = &vm.record;
        Self {
            pid: record.qemu.map(|qemu| qemu.pid),
            cid: match record.vsock {
                Some(VsockAddress::Cid(cid)) => Some(cid),
                _ => None,
            },
            accel: record.acceleration.map(|acceleration| acceleration.to_string()),
            accel_reason: record.acceleration_reason.as_deref(),
            guest: &record.guest,
            console: vm.console.display().to_string(),
            kind: match &record.origin {
                Some(Origin::Boot { why }) => Kind::Booted { why },
                Some(Origin::Clone { template, mode }) => Kind::Clone {
                    template,
                    memory: *mode,
                },
                None => Kind::Unknown,
            },
        }
    }
    /// One annotation for each of them.
    pub(crate) fn annotations(&self) -> BTreeMap<String, String> {
        let facts = serde_json::to_value(self).unwrap_or_default();
        let facts = facts.as_object().into_iter().flatten();
        facts
            .filter(|(_, fact)| !fact.is_null())
            .map(|(name, fact)| {
                let text = fact.as_str().map_or_else(|| fact.to_string(), str::to_owned);
                (format!("{PREFIX}{name}"), text)
            })
            .collect()
    }
}
