//! The writable disk of a machine: found in the guest by its serial number, gone with the machine unless it is a file that
//! somebody named.

use std::{
    fs::File,
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::FlockOperation;

use crate::size::Size;

/// Serial number by which the guest finds the disk: `/dev/disk/by-id/virtio-coreos-kvm-data`.
pub const DATA_DISK_SERIAL: &str = "coreos-kvm-data";

/// What a disk is made of, in bytes.
const SECTOR: u64 = 512;

/// A disk of the guest's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Of a file that exists already, its own size counts.
    pub size: Size,
    pub storage: Storage,
}

/// Where a disk's content is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Storage {
    /// In a file without a name below TMPDIR, else /var/tmp (file-hierarchy(7)): it takes as much room as the guest has
    /// written, and is gone with the machine. Not in the machine's folder, for /run is memory.
    Ephemeral,
    /// In this file, which stays. Made where it is missing.
    File(PathBuf),
}

/// A disk that a machine cannot be given.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("making a disk of {size} in {} failed", folder.display())]
    Ephemeral {
        size: Size,
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("opening the disk {} failed", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the disk {} is in use by another machine: end that one, or name another file", path.display())]
    InUse { path: PathBuf },
    #[error("the disk {} has {size}, too small for the guest, which needs at least {min}: name another file", path.display())]
    TooSmall { path: PathBuf, size: Size, min: Size },
    #[error("{} is no disk image: a file of whole {SECTOR}-byte sectors is expected", path.display())]
    NoImage { path: PathBuf },
}

/// Opens the disk for reading and writing; of a file, nobody else gets it as long as the descriptor, or one inherited
/// from it, is open. A file that exists has to have `min`.
///
/// # Errors
/// Of [`DiskError`].
pub fn open(disk: &Disk, min: Size) -> Result<File, DiskError> {
    match &disk.storage {
        Storage::Ephemeral => {
            let folder = std::env::var_os("TMPDIR")
                .filter(|folder| !folder.is_empty())
                .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
            nameless(&folder, disk.size).map_err(|source| DiskError::Ephemeral {
                size: disk.size,
                folder,
                source,
            })
        }
        Storage::File(path) => named(path, disk.size, min),
    }
}

fn nameless(folder: &Path, size: Size) -> io::Result<File> {
    let file = tempfile::tempfile_in(folder)?;
    file.set_len(whole(size))?;
    Ok(file)
}

fn named(path: &Path, size: Size, min: Size) -> Result<File, DiskError> {
    let failed = |source| DiskError::Open {
        path: path.to_owned(),
        source,
    };
    let no_image = || DiskError::NoImage { path: path.to_owned() };
    match std::fs::metadata(path) {
        Ok(there) if !there.is_file() || there.len() % SECTOR != 0 => return Err(no_image()),
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(failed)?;
    // The lock is the open file's, and lasts until QEMU, which inherits it, has ended.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(DiskError::InUse { path: path.to_owned() }),
        Err(error) => return Err(failed(error.into())),
    }
    match Size::from_bytes(file.metadata().map_err(failed)?.len()) {
        None => file.set_len(whole(size)).map_err(failed)?,
        Some(size) if size < min => {
            return Err(DiskError::TooSmall {
                path: path.to_owned(),
                size,
                min,
            });
        }
        Some(_) => {}
    }
    Ok(file)
}

/// In bytes, up to a whole sector.
fn whole(size: Size) -> u64 {
    size.bytes().next_multiple_of(SECTOR)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIN: Size = Size::from_mib(64);

    fn disk(path: &Path) -> Disk {
        Disk {
            size: Size::from_mib(64),
            storage: Storage::File(path.to_owned()),
        }
    }

    #[test]
    fn an_ephemeral_disk_has_no_name_and_takes_no_room() {
        let folder = tempfile::tempdir().unwrap();
        let file = nameless(folder.path(), Size::from_mib(12 * 1024)).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (12 << 30, 0));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_named_disk_is_made_once_and_used_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let first = open(&disk(&path), MIN).unwrap();
        assert_eq!(first.metadata().unwrap().len(), 64 << 20);
        assert!(matches!(open(&disk(&path), MIN), Err(DiskError::InUse { .. })));
        drop(first);
        let larger = Disk {
            size: Size::from_mib(128),
            ..disk(&path)
        };
        assert_eq!(
            open(&larger, MIN).unwrap().metadata().unwrap().len(),
            64 << 20,
            "it keeps its size"
        );
    }

    #[test]
    fn what_is_no_image_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(
            open(&disk(folder.path()), MIN),
            Err(DiskError::NoImage { .. })
        ));
        let path = folder.path().join("notes.txt");
        std::fs::write(&path, "not a disk").unwrap();
        assert!(matches!(open(&disk(&path), MIN), Err(DiskError::NoImage { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "not a disk");
    }

    #[test]
    fn a_disk_has_whole_sectors_and_is_taken_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        let odd = Disk {
            size: "1000000001".parse().unwrap(),
            ..disk(&path)
        };
        for _ in 0..2 {
            assert_eq!(open(&odd, MIN).unwrap().metadata().unwrap().len(), 1_000_000_512);
        }
    }

    #[test]
    fn a_file_that_is_too_small_is_no_disk_for_the_guest() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, [0; 512]).unwrap();
        let error = open(&disk(&path), MIN).unwrap_err().to_string();
        assert!(
            error.contains("has 512 bytes, too small for the guest, which needs at least 64M"),
            "{error}"
        );
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 512);
    }
}
