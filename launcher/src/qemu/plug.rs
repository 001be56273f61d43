//! Memory that a running machine is given, and that is taken from it again.

use qapi::qmp::{
    self, ACPIOSTInfo, MemoryBackendMemfdProperties, MemoryBackendProperties, MemoryDeviceInfo, ObjectOptions,
};
use serde_json::{Map, Value};

use super::{
    arguments::MEMORY_SLOTS,
    qmp::{Qmp, QmpError},
};

/// What QEMU calls modules, with a number.
const MODULE: &str = "dimm";

/// A memory module that was plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    pub name: String,
    pub mib: u64,
}

impl Qmp {
    /// The memory modules that were plugged in.
    ///
    /// # Errors
    /// Of [`QmpError`]; the same holds for the others here.
    pub async fn modules(&self) -> Result<Vec<Module>, QmpError> {
        let all = self.execute(qmp::query_memory_devices {}).await?;
        let modules = all.into_iter().filter_map(|device| match device {
            MemoryDeviceInfo::dimm(module) => Some(Module {
                name: module.data.id?,
                mib: u64::try_from(module.data.size).ok()? >> 20,
            }),
            _ => None,
        });
        Ok(modules.collect())
    }

    /// Plugs in a module of so much memory beside `modules`. Shared, as all of the guest's memory.
    pub async fn add_module(&self, modules: &[Module], mib: u64) -> Result<(), QmpError> {
        let is_free = |name: &String| !modules.iter().any(|module| module.name == *name);
        let mut names = (0..).map(|number| format!("{MODULE}{number}"));
        let id = names.find(is_free).unwrap_or_else(|| MODULE.to_owned());
        let memory = MemoryBackendProperties {
            dump: None,
            host_nodes: None,
            merge: None,
            policy: None,
            prealloc: None,
            prealloc_context: None,
            prealloc_threads: None,
            reserve: None,
            share: Some(true),
            x_use_canonical_path_for_ramblock_id: None,
            size: mib << 20,
        };
        let backend = backend_of(&id);
        // Memory of modules that the guest has given back when nobody waited for it any more.
        for left in (0..MEMORY_SLOTS).map(|number| format!("{MODULE}{number}")) {
            if is_free(&left) {
                let _ = self.free_module(&left).await;
            }
        }
        let object = ObjectOptions::memory_backend_memfd {
            id: backend.clone(),
            memory_backend_memfd: MemoryBackendMemfdProperties::from(memory),
        };
        self.execute(qmp::object_add(object)).await?;
        let command = qmp::device_add {
            bus: None,
            id: Some(id),
            driver: "pc-dimm".to_owned(),
            arguments: Map::from_iter([("memdev".to_owned(), Value::from(backend.clone()))]),
        };
        let added = self.execute(command).await;
        if added.is_err() {
            let _ = self.execute(qmp::object_del { id: backend }).await;
        }
        added.map(drop)
    }

    /// Asks the guest to give up a module. It is there until the guest does; see [`Qmp::is_kept`].
    pub async fn ask_back(&self, name: &str) -> Result<(), QmpError> {
        self.kept().remove(name);
        self.execute(qmp::device_del { id: name.to_owned() }).await.map(drop)
    }

    /// Gives the memory of a module that is out back to the host.
    pub async fn free_module(&self, name: &str) -> Result<(), QmpError> {
        self.execute(qmp::object_del { id: backend_of(name) }).await.map(drop)
    }
}

/// The device that the guest has refused to give back by these words of its, if they are that: "_OST (OSPM Status Indication)" in
/// the ACPI specification.
pub(super) fn refused(said: ACPIOSTInfo) -> Option<String> {
    const ASKED_BACK: [i64; 2] = [0x03, 0x103];
    const DONE: i64 = 0;
    const UNDER_WAY: i64 = 0x84;
    let refused = ASKED_BACK.contains(&said.source) && ![DONE, UNDER_WAY].contains(&said.status);
    said.device.filter(|_| refused)
}

fn backend_of(module: &str) -> String {
    format!("{module}-memory")
}
