//! The folder of all templates. One that is being made stands beside the others under another name until it is whole and on disk;
//! whoever dies meanwhile leaves something that the next one removes.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    DATA, Key, MANIFEST, MAP, Manifest, STATE, Sealed, Template, TemplateError, Uses, memory::Map, ours_alone,
};
use crate::state::{read_bounded, remove_tree, write_atomically};
use nix::fcntl::{Flock, FlockArg};

const USES: &str = "uses";
const UNFINISHED: &str = "partial";
const LOCK: &str = "lock";
/// Room on the disk below which no template is begun, in bytes. The smallest take more, and a boot for one that cannot be kept is in
/// vain; on a disk that is full not even that it failed can be noted.
const ROOM_MIN: u64 = 32 << 20;

/// All templates of the node.
#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
    /// What they may take together, in bytes.
    space: u64,
}

/// A template in the folder, and how it is used.
#[derive(Debug)]
pub struct Entry {
    pub key: String,
    /// What is wrong with it, where it cannot be used.
    pub manifest: Result<Manifest, TemplateError>,
    pub uses: Uses,
    pub last_used: SystemTime,
}

/// The right to make the template of one key. Given back when dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held, not used")] Flock<File>);

impl Store {
    /// Opens `folder`, and makes it if it is not there.
    ///
    /// # Errors
    /// When it cannot be made, or somebody else could write there.
    pub fn open(folder: &Path, space: u64) -> Result<Self, TemplateError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
        made.map_err(TemplateError::io("making the directory", folder))?;
        let metadata = fs::symlink_metadata(folder).map_err(TemplateError::io("looking at", folder))?;
        ours_alone(folder, &metadata)?;
        Ok(Self {
            folder: folder.to_owned(),
            space,
        })
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }

    /// Opens the template; None where there is none.
    ///
    /// # Errors
    /// When it cannot be used; what is damaged is removed, for another can be made.
    pub fn find(&self, key: &Key) -> Result<Option<Template>, TemplateError> {
        let folder = self.path(key.as_str());
        let metadata = match fs::symlink_metadata(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            metadata => metadata.map_err(TemplateError::io("looking at", &folder))?,
        };
        ours_alone(&folder, &metadata)?;
        match Template::open(&folder) {
            // Somebody has just removed it.
            Err(_) if !folder.exists() => Ok(None),
            template => template.map(Some),
        }
    }

    /// Takes the right to make the template `key`; None as long as somebody else has it.
    ///
    /// # Errors
    /// Of the lock's file.
    pub fn try_lock(&self, key: &Key) -> Result<Option<Lock>, TemplateError> {
        let path = self.path(key.as_str()).with_extension(LOCK);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(TemplateError::io("opening", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Lock(lock))),
            Err((_, nix::Error::EWOULDBLOCK)) => Ok(None),
            Err((_, error)) => Err(TemplateError::io("locking", &path)(error)),
        }
    }

    /// Begins a template, over the remains of an attempt that was not finished.
    ///
    /// # Errors
    /// Of the file system, also when it is full.
    pub fn draft(&self, key: &Key, _right: &Lock) -> Result<Draft, TemplateError> {
        let path = self.path(key.as_str()).with_extension(UNFINISHED);
        remove(&path)?;
        let disk = rustix::fs::statvfs(&self.folder).map_err(TemplateError::io("looking at", &self.folder))?;
        let room = disk.f_bavail.saturating_mul(disk.f_frsize);
        // One without a size has room as long as there is memory.
        if disk.f_blocks > 0 && room < ROOM_MIN {
            return Err(TemplateError::NoRoom(format!(
                "there is no space left for it at {}: {} MiB are free",
                self.folder.display(),
                room >> 20
            )));
        }
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(TemplateError::io("making the directory", &path))?;
        Ok(Draft {
            store: self.clone(),
            key: key.clone(),
            path,
        })
    }

    /// All templates, the last used first.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>, TemplateError> {
        let read = fs::read_dir(&self.folder).map_err(TemplateError::io("reading", &self.folder))?;
        let mut entries = Vec::new();
        for entry in read.flatten() {
            let Ok(key) = entry.file_name().into_string() else {
                continue;
            };
            if key.contains('.') || !entry.path().is_dir() {
                continue;
            }
            entries.push(Entry {
                manifest: super::read_manifest(&entry.path(), &key),
                uses: self.uses(&key),
                last_used: self.last_used(&key),
                key,
            });
        }
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.last_used));
        Ok(entries)
    }

    /// Opens the template of that key, as a person writes it.
    ///
    /// # Errors
    /// When it is not there, or cannot be used.
    pub fn open_named(&self, key: &str) -> Result<Template, TemplateError> {
        Template::open(&self.path(key))
    }

    /// Removes a template. Clones that run do not need it any more.
    ///
    /// # Errors
    /// When something of it stays.
    pub fn remove(&self, key: &str) -> Result<bool, TemplateError> {
        // By one step first, so that nobody finds half of it.
        let (path, gone) = (self.path(key), self.path(key).with_extension("removed"));
        remove(&gone)?;
        match fs::rename(&path, &gone) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(TemplateError::io("removing", &path)(error)),
            Ok(()) => remove(&gone).map(|()| true),
        }
    }

    /// Removes what attempts have left that were not finished, and what nobody makes any more. Answers how many bytes that were.
    ///
    /// # Errors
    /// Of the file system.
    pub fn sweep(&self) -> Result<u64, TemplateError> {
        let read = fs::read_dir(&self.folder).map_err(TemplateError::io("reading", &self.folder))?;
        let mut swept = 0;
        for path in read.flatten().map(|entry| entry.path()) {
            let extension = path.extension().unwrap_or_default();
            if extension != UNFINISHED && extension != "removed" {
                continue;
            }
            let Ok(key) = path.file_stem().unwrap_or_default().to_string_lossy().parse() else {
                continue;
            };
            // Somebody may be at it just now.
            if let Some(_right) = self.try_lock(&key)? {
                swept += bytes_of(&path);
                remove(&path)?;
            }
        }
        Ok(swept)
    }

    /// How the template was used so far.
    pub fn uses(&self, key: &str) -> Uses {
        let bytes = read_bounded(&self.path(key).with_extension(USES)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn last_used(&self, key: &str) -> SystemTime {
        let modified = |path: PathBuf| fs::metadata(path).and_then(|file| file.modified());
        let made = modified(self.path(key)).unwrap_or(SystemTime::UNIX_EPOCH);
        modified(self.path(key).with_extension(USES)).map_or(made, |used| used.max(made))
    }

    /// Notes what became of an attempt to clone: None, it came up; else why it did not.
    pub fn note_use(&self, key: &Key, failure: Option<String>) {
        self.change_uses(key, |uses| uses.note(failure));
    }

    /// Begins anew with a template that was left alone.
    pub fn forgive(&self, key: &Key) {
        self.change_uses(key, |uses| uses.failures_in_a_row = 0);
    }

    /// What cannot be noted is not worth a machine.
    fn change_uses(&self, key: &Key, change: impl FnOnce(&mut Uses)) {
        let path = self.path(key.as_str()).with_extension(USES);
        let note = || {
            let open = File::open(&self.folder).map_err(TemplateError::io("opening", &self.folder))?;
            let _lock = Flock::lock(open, FlockArg::LockExclusive)
                .map_err(|(_, error)| TemplateError::io("locking", &self.folder)(error))?;
            let mut uses = self.uses(key.as_str());
            change(&mut uses);
            write_atomically(&path, &uses).map_err(|error| TemplateError::io("writing", &path)(io::Error::other(error)))
        };
        if let Err(error) = note() {
            tracing::warn!(template = %key, error = crate::sentence(&error), "the use of the template is not noted");
        }
    }

    /// Removes templates until `needed` bytes more have room, the one that was not used for the longest time first.
    fn make_room(&self, needed: u64) -> Result<(), TemplateError> {
        if needed > self.space {
            let mib = |bytes: u64| bytes.div_ceil(1 << 20);
            return Err(TemplateError::NoRoom(format!(
                "it takes {} MiB, and `template_space_mib` in the configuration allows {} for all",
                mib(needed),
                mib(self.space)
            )));
        }
        let mut entries = self.entries()?;
        let size = |entry: &Entry| bytes_of(&self.path(&entry.key));
        let mut taken: u64 = entries.iter().map(size).sum();
        while taken + needed > self.space
            && let Some(oldest) = entries.pop()
        {
            tracing::info!(template = oldest.key, "the template makes room for another");
            taken = taken.saturating_sub(size(&oldest));
            self.remove(&oldest.key)?;
        }
        Ok(())
    }
}

/// Bytes that the files of a folder take on disk.
fn bytes_of(folder: &Path) -> u64 {
    let files = fs::read_dir(folder).into_iter().flatten().flatten();
    files
        .filter_map(|file| file.metadata().ok())
        .map(|file| file.blocks() * 512)
        .sum()
}

fn remove(path: &Path) -> Result<(), TemplateError> {
    match remove_tree(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(TemplateError::io("removing", path)(error)),
        _ => Ok(()),
    }
}

/// A template that is being made. Dropping it removes it.
#[derive(Debug)]
pub struct Draft {
    store: Store,
    key: Key,
    path: PathBuf,
}

/// What makes a template.
pub(crate) struct Content<'a> {
    pub(crate) map: &'a Map,
    pub(crate) state: &'a [u8],
    /// Its sizes and checksums are filled in here.
    pub(crate) manifest: Manifest,
}

impl Draft {
    pub fn key(&self) -> &Key {
        &self.key
    }

    /// The file that the memory goes to.
    ///
    /// # Errors
    /// Of the file system.
    pub fn data(&self) -> Result<File, TemplateError> {
        self.create(DATA)
    }

    fn create(&self, name: &str) -> Result<File, TemplateError> {
        let path = self.path.join(name);
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(TemplateError::io("making", &path))
    }

    /// Puts the template among the others.
    ///
    /// # Errors
    /// Of the file system, and when all templates together may not take so much.
    pub(crate) fn finish(self, data: &File, content: Content<'_>) -> Result<Template, TemplateError> {
        let path = |name: &str| self.path.join(name);
        let data_bytes = data
            .metadata()
            .map_err(TemplateError::io("looking at", &path(DATA)))?
            .len();
        data.sync_all().map_err(TemplateError::io("writing", &path(DATA)))?;
        let map = content.map.encode();
        let manifest = Manifest {
            data_bytes,
            state_bytes: content.state.len() as u64,
            map_bytes: map.len() as u64,
            state_crc: crc32fast::hash(content.state),
            map_crc: crc32fast::hash(&map),
            ..content.manifest
        };
        self.store.make_room(manifest.bytes())?;
        let sealed = Sealed::new(manifest).and_then(|sealed| serde_json::to_vec_pretty(&sealed));
        let sealed = sealed.map_err(|error| TemplateError::io("writing", &path(MANIFEST))(io::Error::other(error)))?;
        for (name, bytes) in [(MAP, map.as_slice()), (STATE, content.state), (MANIFEST, &sealed)] {
            let mut file = self.create(name)?;
            let written = file.write_all(bytes).and_then(|()| file.sync_all());
            written.map_err(TemplateError::io("writing", &path(name)))?;
        }
        sync(&self.path)?;
        let place = self.store.path(self.key.as_str());
        // One that is damaged may be there.
        self.store.remove(self.key.as_str())?;
        fs::rename(&self.path, &place).map_err(TemplateError::io("making", &place))?;
        sync(&self.store.folder)?;
        Template::open(&place)
    }
}

/// Waits until a folder's names are on disk.
fn sync(folder: &Path) -> Result<(), TemplateError> {
    let synced = File::open(folder).and_then(|open| open.sync_all());
    synced.map_err(TemplateError::io("writing", folder))
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "a template that was not finished is left behind");
        }
    }
}

#[cfg(test)]
mod tests;
