//! `delete`: what containerd runs when a shim is gone or does not answer: ends the pod's machine and frees what it held, from
//! what stands on disk alone. It may come at any time, more than once, and for mere containers too.

use std::path::{Path, PathBuf};

use anyhow::Context;
use containerd_shim::{Flags, socket_address};
use containerd_shim_protos::api::DeleteResponse;
use coreos_kvm_launcher::vm;
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
        let _ = std::fs::remove_file(socket_path(&socket_address(
            &flags.address,
            &flags.namespace,
            &flags.id,
        )));
    }
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(clock::now()),
        ..Default::default()
    };
    response.write_to_bytes().context("writing the answer")
}

fn end_machine(record: &bundle::Record) -> anyhow::Result<()> {
    let id = record.machine.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let state_dir: &Path = &record.state_dir;
    Ok(runtime.block_on(vm::destroy(state_dir, &id))?)
}
