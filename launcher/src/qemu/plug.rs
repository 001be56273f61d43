//! Processors and memory that a running machine is given, and that are taken from it again.

use qapi::qmp::{
    self, ACPIOSTInfo, MemoryBackendMemfdProperties, MemoryBackendProperties, MemoryDeviceInfo, ObjectOptions,
};
use serde_json::{Map, Value};

use super::{
    arguments::MEMORY_SLOTS,
    qmp::{Qmp, QmpError},
};

/// What QEMU calls those that were not there from the beginning.
const PROCESSOR: &str = "vcpu";
const MODULE: &str = "dimm";

/// The processors of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processors {
    /// How many there are.
    pub count: u32,
    /// Names of those that were plugged in, in the guest's order.
    pub plugged: Vec<String>,
    free: Option<Place>,
}

/// Where another processor can be.
#[derive(Debug, Clone, PartialEq)]
struct Place {
    driver: String,
    properties: Map<String, Value>,
}

impl Eq for Place {}

/// A memory module that was plugged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    pub name: String,
    pub mib: u64,
}

impl Qmp {
    /// The processors there are.
    ///
    /// # Errors
    /// Of [`QmpError`]; the same holds for the others here.
    pub async fn processors(&self) -> Result<Processors, QmpError> {
        let all = self.execute(qmp::query_hotpluggable_cpus {}).await?;
        // QEMU says the highest first, and the lowest is the next.
        let paths = || all.iter().rev().filter_map(|cpu| cpu.qom_path.as_deref());
        let plugged = paths().filter_map(|path| Some(path.strip_prefix("/machine/peripheral/")?.to_owned()));
        let free = all.iter().rfind(|cpu| cpu.qom_path.is_none());
        Ok(Processors {
            count: u32::try_from(paths().count()).unwrap_or(u32::MAX),
            plugged: plugged.collect(),
            free: free.map(|cpu| Place {
                driver: cpu.type_.clone(),
                properties: match serde_json::to_value(&cpu.props) {
                    Ok(Value::Object(properties)) => properties,
                    _ => Map::new(),
                },
            }),
        })
    }

    /// Plugs in another processor beside these; answers whether there was a place for it.
    pub async fn add_processor(&self, processors: &Processors) -> Result<bool, QmpError> {
        let Some(place) = &processors.free else {
            return Ok(false);
        };
        let id = free_name(PROCESSOR, |name| {
            processors.plugged.iter().any(|plugged| plugged == name)
        });
        let command = qmp::device_add {
            bus: None,
            id: Some(id),
            driver: place.driver.clone(),
            arguments: place.properties.clone(),
        };
        self.execute(command).await.map(|_| true)
    }

    /// The memory modules that were plugged in.
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
        let id = free_name(MODULE, |name| modules.iter().any(|module| module.name == name));
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
            if !modules.iter().any(|module| module.name == left) {
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

    /// Asks the guest to give up a processor or a module. It is there until the guest does; see [`Qmp::is_kept`].
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

/// The first name that nobody has.
fn free_name(kind: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut names = (0..).map(|number| format!("{kind}{number}"));
    names.find(|name| !taken(name)).unwrap_or_else(|| kind.to_owned())
}
