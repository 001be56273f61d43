//! `delete`: what containerd runs when a shim is gone or does not answer: ends the pod's machine and frees what it held, from
//! what stands on disk alone. It may come at any time, more than once, and for mere containers too.

use std::{os::unix::net::UnixStream, path::PathBuf};

use anyhow::Context;
use containerd_shim::{Flags, socket_address};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::{Message, MessageField};

use crate::{bootstrap::socket_path, bundle, clock, process::KILLED};

/// Frees what belongs to the bundle and answers the `DeleteResponse`, ready to be printed.
pub(crate) fn delete(flags: &Flags) -> anyhow::Result<Vec<u8>> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().context("the bundle, the current directory, is gone")?
    } else {
        PathBuf::from(&flags.bundle)
    };
    // The bundle of a mere container names no machine: its files go with the machine of its pod, which is not this one's to end.
    if let Some(record) = bundle::Record::read(&bundle)? {
        end_machine(&record)?;
    }
    // Of a shim that ended without a word, also one that never had a machine; no shim serves at the id of a mere container.
    let socket = socket_path(&socket_address(&flags.address, &flags.namespace, &flags.id));
    if UnixStream::connect(&socket).is_err() {
        let _ = std::fs::remove_file(socket);
    }
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(clock::now()),
        ..Default::default()
    };
    response.write_to_bytes().context("writing the answer")
}

fn end_machine(record: &bundle::Record) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    Ok(runtime.block_on(record.end_machine())?)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use coreos_kvm_launcher::state::{self, ProcessId, StateDir};

    use super::*;

    /// A machine as it stands on disk, and the process that started it.
    fn machine(root: &std::path::Path) -> (StateDir, Child) {
        let launcher = Command::new("sleep").arg("60").spawn().unwrap();
        let state = StateDir::create(root, &"web".parse().unwrap()).unwrap();
        state
            .write(&state::Record {
                id: "web".to_owned(),
                guest: "reference".to_owned(),
                launcher: ProcessId::of(launcher.id()),
                qemu: None,
                helpers: Vec::new(),
                vsock: None,
                acceleration: None,
                acceleration_reason: None,
                origin: None,
                vcpus: 1,
                memory_mib: 512,
                netns: None,
                cgroup: None,
                uid: None,
            })
            .unwrap();
        (state, launcher)
    }

    fn delete_bundle(root: &std::path::Path, shim: Option<ProcessId>) {
        let record = bundle::Record {
            machine: "web".to_owned(),
            state_dir: root.to_owned(),
            shim,
        };
        record.write(root).unwrap();
        let flags = Flags {
            namespace: "tests".to_owned(),
            id: "web".to_owned(),
            address: root.join("containerd.sock").to_str().unwrap().to_owned(),
            bundle: root.to_str().unwrap().to_owned(),
            ..Default::default()
        };
        let response = DeleteResponse::parse_from_bytes(&delete(&flags).unwrap()).unwrap();
        assert_eq!(response.exit_status, KILLED);
    }

    #[test]
    fn the_machine_of_the_bundle_ends_with_its_shim_and_may_be_gone() {
        let root = tempfile::tempdir().unwrap();
        let (state, mut shim) = machine(root.path());
        let id = ProcessId::of(shim.id());
        for _ in 0..2 {
            delete_bundle(root.path(), id);
            assert!(!state.path().exists());
        }
        assert_eq!(shim.wait().unwrap().code(), None);
    }

    #[test]
    fn the_machine_of_the_same_name_in_another_namespace_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let (state, mut shim) = machine(root.path());
        delete_bundle(root.path(), ProcessId::of(std::process::id()));
        assert!(state.read().unwrap().is_some());
        assert!(ProcessId::of(shim.id()).unwrap().is_alive());
        shim.kill().unwrap();
        shim.wait().unwrap();
    }
}
