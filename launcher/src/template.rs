//! Templates: guests that were booted once on this node and saved, so that machines of the same description are clones of them.
//!
//! - [`Key`]: everything that shapes a guest; what differs in anything is another template
//! - [`Store`]: the folder of all templates, one folder each, in which only whole ones stand
//! - [`card`]: the network card that a template and its clones have
//! - [`memory`]: a guest's memory as it is kept, and how a clone gets its copy
//! - [`mode`]: in which way a clone comes to its memory
//! - [`resident`]: such a memory in this node's, for clones that share it
//!
//! A template holds what its guest had in memory, so that only root may read it.

pub mod card;
mod key;
pub mod memory;
pub mod mode;
pub mod resident;
mod store;
mod uses;
pub mod window;

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use key::Key;
pub(crate) use store::Content;
pub use store::{Draft, Entry, Lock, Store};
pub use uses::Uses;

use crate::accel::Acceleration;
use memory::Map;

/// What a template's folder holds.
const MANIFEST: &str = "template.json";
const MAP: &str = "memory.map";
const DATA: &str = "memory";
const STATE: &str = "state";

/// Longest manifest: some KiB, most of it the places of ids.
const MANIFEST_MAX: u64 = 1 << 20;
/// Longest state of devices. Some 350 KiB are usual.
pub const STATE_MAX: u64 = 64 << 20;
/// A map has 16 bytes for a run of pages: this is that of 1 TiB of memory of which every other page is used.
const MAP_MAX: u64 = 2 << 30;

/// A template cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("{what} {} failed", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{} is not this user's alone (owner {owner}, mode {mode:o}): whoever can write there could change what runs in machines; \
         `chown root` and `chmod go=` mend that, after a look at how it came about",
        path.display()
    )]
    NotOurs { path: PathBuf, owner: u32, mode: u32 },
    #[error("the template {key} is damaged: {problem}")]
    Damaged { key: String, problem: String },
    #[error("the template cannot be kept: {0}")]
    NoRoom(String),
    #[error("the memory of the template is not whole: whoever copied it ended early")]
    Unfilled,
}

impl TemplateError {
    fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            what,
            path,
            source: source.into(),
        }
    }

    fn damaged(key: &str, problem: impl Into<String>) -> Self {
        Self::Damaged {
            key: key.to_owned(),
            problem: problem.into(),
        }
    }
}

/// What is known of a template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The text of its [`Key`].
    pub key: String,
    /// The guest's name.
    pub guest: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub acceleration: Acceleration,
    /// QEMU's version, as `7.2`.
    pub qemu: String,
    /// Whether it has the configuration of a user.
    pub own: bool,
    /// Seconds since the epoch.
    pub created: u64,
    /// Bytes of memory that are kept, of the state of devices, and of the map of the former.
    pub data_bytes: u64,
    pub state_bytes: u64,
    pub map_bytes: u64,
    pub state_crc: u32,
    pub map_crc: u32,
    /// Where in memory the template's own ids are, in bytes from its beginning: a clone has other ones there.
    pub boot_id_at: Vec<u64>,
    pub machine_id_at: Vec<u64>,
    /// Where in memory its network card's address is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub card_at: Vec<u64>,
}

#[cfg(test)]
impl Manifest {
    /// Of a template that a trial makes, and of which it says the rest.
    fn of_trial(key: &str) -> Self {
        Self {
            key: key.to_owned(),
            guest: "reference".to_owned(),
            vcpus: 1,
            memory_mib: 1,
            acceleration: Acceleration::Tcg,
            qemu: "7.2".to_owned(),
            own: false,
            created: 0,
            data_bytes: 0,
            state_bytes: 0,
            map_bytes: 0,
            state_crc: 0,
            map_crc: 0,
            boot_id_at: Vec::new(),
            machine_id_at: Vec::new(),
            card_at: Vec::new(),
        }
    }
}

impl Manifest {
    /// What the template takes on disk, in bytes.
    pub fn bytes(&self) -> u64 {
        self.data_bytes + self.state_bytes + self.map_bytes
    }
}

/// The manifest as it is written: with a checksum, for what is changed in it would be changed in guests.
#[derive(Serialize, Deserialize)]
struct Sealed {
    crc: u32,
    manifest: Manifest,
}

impl Sealed {
    fn new(manifest: Manifest) -> serde_json::Result<Self> {
        let crc = crc32fast::hash(&serde_json::to_vec(&manifest)?);
        Ok(Self { crc, manifest })
    }
}

/// A whole template, open: it can be cloned even when it is removed meanwhile.
#[derive(Debug)]
pub struct Template {
    folder: PathBuf,
    pub manifest: Manifest,
    /// What of its memory is kept, and where that belongs.
    pub map: Map,
    pub data: File,
    /// The state of its devices, as QEMU wrote it.
    pub state: Vec<u8>,
}

impl Template {
    /// Opens the template of `folder`, whose name is its key, and checks what is small; the memory is checked as it is copied.
    ///
    /// # Errors
    /// When something of it is missing, somebody else's or damaged.
    pub(crate) fn open(folder: &Path) -> Result<Self, TemplateError> {
        let key = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let manifest = read_manifest(folder, &key)?;
        let state = read(folder, STATE, STATE_MAX)?;
        let map = read(folder, MAP, MAP_MAX)?;
        if (state.len() as u64, crc32fast::hash(&state)) != (manifest.state_bytes, manifest.state_crc) {
            return Err(TemplateError::damaged(
                &key,
                "the state of its devices is not the one that was saved",
            ));
        }
        if (map.len() as u64, crc32fast::hash(&map)) != (manifest.map_bytes, manifest.map_crc) {
            return Err(TemplateError::damaged(
                &key,
                "the map of its memory is not the one that was saved",
            ));
        }
        let map = Map::decode(&map, manifest.memory_mib << 20)
            .ok_or_else(|| TemplateError::damaged(&key, "the map of its memory does not fit"))?;
        let data = open(&folder.join(DATA))?;
        let length = data
            .metadata()
            .map_err(TemplateError::io("looking at", &folder.join(DATA)))?
            .len();
        if (length, map.bytes()) != (manifest.data_bytes, manifest.data_bytes) {
            let problem = format!("its memory has {length} bytes where {} were saved", manifest.data_bytes);
            return Err(TemplateError::damaged(&key, problem));
        }
        Ok(Self {
            folder: folder.to_owned(),
            manifest,
            map,
            data,
            state,
        })
    }

    /// Compares all of its memory with what was saved.
    ///
    /// # Errors
    /// When it is damaged or cannot be read.
    pub fn verify(&self) -> Result<(), TemplateError> {
        match self.map.verify(&self.data) {
            Err(error) if memory::is_damage(&error) => Err(TemplateError::damaged(
                &self.manifest.key,
                "its memory is not the one that was saved",
            )),
            result => result.map_err(TemplateError::io("reading", &self.folder.join(DATA))),
        }
    }
}

fn read_manifest(folder: &Path, key: &str) -> Result<Manifest, TemplateError> {
    let text = read(folder, MANIFEST, MANIFEST_MAX)?;
    let sealed: Sealed = serde_json::from_slice(&text)
        .map_err(|error| TemplateError::damaged(key, format!("{MANIFEST} cannot be read: {error}")))?;
    let crc = sealed.crc;
    let again = Sealed::new(sealed.manifest)
        .map_err(|error| TemplateError::damaged(key, format!("{MANIFEST} cannot be checked: {error}")))?;
    if again.crc != crc || again.manifest.key != key {
        return Err(TemplateError::damaged(
            key,
            format!("{MANIFEST} is not the one that was written"),
        ));
    }
    Ok(again.manifest)
}

fn read(folder: &Path, name: &str, at_most: u64) -> Result<Vec<u8>, TemplateError> {
    let path = folder.join(name);
    let mut bytes = Vec::new();
    open(&path)?
        .take(at_most)
        .read_to_end(&mut bytes)
        .map_err(TemplateError::io("reading", &path))?;
    Ok(bytes)
}

/// Opens a file of a template, which has to be ours alone. A template without it is of no use to anybody.
fn open(path: &Path) -> Result<File, TemplateError> {
    let opened = File::options().read(true).custom_flags(libc::O_NOFOLLOW).open(path);
    let file = opened.map_err(|error| {
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match path.parent() {
            Some(folder) if error.kind() == io::ErrorKind::NotFound => {
                TemplateError::damaged(&name(folder), format!("it has no {}", name(path)))
            }
            _ => TemplateError::io("opening", path)(error),
        }
    })?;
    let metadata = file.metadata().map_err(TemplateError::io("looking at", path))?;
    ours_alone(path, &metadata)?;
    Ok(file)
}

fn ours_alone(path: &Path, metadata: &std::fs::Metadata) -> Result<(), TemplateError> {
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o7777);
    if owner != nix::unistd::geteuid().as_raw() || mode & 0o077 != 0 {
        return Err(TemplateError::NotOurs {
            path: path.to_owned(),
            owner,
            mode,
        });
    }
    Ok(())
}
