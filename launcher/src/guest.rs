//! An operating system on disk that machines boot: a folder with `guest.toml` and the files that it names. The folder is
//! written by the guest's build; here it is read and held against what it says of itself.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// A guest whose files stand complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    /// Its name, which is its folder's.
    pub name: String,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    /// Image of the root file system's disk, attached read-only.
    pub root: PathBuf,
    pub root_format: DiskFormat,
    /// Kernel arguments that this guest needs to boot.
    pub kernel_args: Vec<String>,
    /// Name of the fw_cfg entry from which the guest's Ignition reads its configuration.
    pub ignition_fw_cfg: String,
    /// Serial number of a disk from which the guest's Ignition can read its configuration instead.
    pub ignition_disk: Option<String>,
    /// Versions of the Ignition specification that the guest understands.
    pub ignition_versions: Vec<String>,
    /// Memory without which the guest does not come up, in MiB.
    pub min_memory_mib: u64,
}

/// Format of a disk image, in QEMU's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

impl DiskFormat {
    /// The name of QEMU's block driver.
    pub fn driver(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A guest that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    #[error(
        "{0:?} cannot name a guest: it is the name of a folder in guests_dir, of letters, digits, '.', '_' and '-'"
    )]
    Name(String),
    #[error("there is no guest {name:?}: {} is missing; {}", description.display(), installed(others))]
    Missing {
        name: String,
        description: PathBuf,
        others: Vec<String>,
    },
    #[error("the guest's file {} cannot be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}: {problem}; `devtool image` makes the guest anew", path.display())]
    Description { path: PathBuf, problem: String },
    #[error("the guest's file {} is missing; `devtool image` makes the guest anew", path.display())]
    FileMissing { path: PathBuf },
    #[error(
        "the guest's file {} is truncated or not the one that was built: it has {found} bytes where guest.toml says {recorded}; \
         `devtool image` makes the guest anew",
        path.display()
    )]
    Size { path: PathBuf, found: u64, recorded: u64 },
    #[error("the guest's file {} is not readable by everybody, as QEMU, which runs unprivileged, needs it: `chmod o+r` mends that", path.display())]
    Mode { path: PathBuf },
}

fn installed(others: &[String]) -> String {
    if others.is_empty() {
        "no guest is installed; `devtool image` makes the reference guest".to_owned()
    } else {
        format!("installed are: {}", others.join(", "))
    }
}

/// `guest.toml` as it is written.
#[derive(Deserialize)]
struct Description {
    name: String,
    kernel: String,
    initramfs: String,
    root: String,
    root_format: DiskFormat,
    kernel_args: String,
    ignition_fw_cfg: String,
    ignition_disk: Option<String>,
    ignition_versions: Vec<String>,
    min_memory_mib: u64,
    files: BTreeMap<String, File>,
}

#[derive(Deserialize)]
struct File {
    size: u64,
}

/// Whether `name` can be a guest's: a folder's name that stays inside its parent.
pub fn check_name(name: &str) -> Result<(), GuestError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.len() <= 64 && name.chars().all(allowed) {
        Ok(())
    } else {
        Err(GuestError::Name(name.to_owned()))
    }
}

impl Guest {
    /// Reads the description of the guest `name` below `guests_dir` and checks that its files are there in full. The hashes
    /// in it are for the build and for whoever copies images; hashing 100 MB before each boot would cost more than it finds.
    ///
    /// # Errors
    /// When the name is none, the folder or a file is missing, has another size than recorded, or the description is wrong.
    pub fn load(guests_dir: &Path, name: &str) -> Result<Self, GuestError> {
        check_name(name)?;
        let folder = guests_dir.join(name);
        let path = folder.join("guest.toml");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let others = names_in(guests_dir);
                return Err(GuestError::Missing {
                    name: name.to_owned(),
                    description: path,
                    others,
                });
            }
            Err(source) => return Err(GuestError::Unreadable { path, source }),
        };
        let wrong = |problem: String| GuestError::Description {
            path: path.clone(),
            problem,
        };
        let description: Description =
            toml::from_str(&text).map_err(|error| wrong(error.to_string().replace('\n', " ")))?;
        if description.name != name {
            return Err(wrong(format!(
                "it describes the guest {:?}, not {name:?}",
                description.name
            )));
        }
        if !description.ignition_fw_cfg.starts_with("opt/") || description.ignition_fw_cfg.contains(',') {
            return Err(wrong(format!(
                "ignition_fw_cfg is {:?}; a name below opt/ is needed",
                description.ignition_fw_cfg
            )));
        }
        // VIRTIO_BLK_ID_BYTES: a longer one would reach the guest cut off.
        if let Some(serial) = &description.ignition_disk
            && (serial.len() > 20 || check_name(serial).is_err())
        {
            return Err(wrong(format!(
                "ignition_disk is {serial:?}; a serial number of at most 20 letters, digits, '.', '_' and '-' is needed"
            )));
        }

        let file = |name: &str| {
            check_name(name).map_err(|_| wrong(format!("{name:?} is no file name in the guest's folder")))?;
            let recorded = description
                .files
                .get(name)
                .ok_or_else(|| wrong(format!("files has no entry for {name:?}")))?
                .size;
            complete(folder.join(name), recorded)
        };
        Ok(Self {
            kernel: file(&description.kernel)?,
            initramfs: file(&description.initramfs)?,
            root: file(&description.root)?,
            root_format: description.root_format,
            kernel_args: description
                .kernel_args
                .split_ascii_whitespace()
                .map(str::to_owned)
                .collect(),
            ignition_fw_cfg: description.ignition_fw_cfg,
            ignition_disk: description.ignition_disk,
            ignition_versions: description.ignition_versions,
            min_memory_mib: description.min_memory_mib,
            name: description.name,
        })
    }
}

fn complete(path: PathBuf, recorded: u64) -> Result<PathBuf, GuestError> {
    use std::os::unix::fs::MetadataExt;

    match std::fs::metadata(&path) {
        Ok(metadata) if metadata.len() != recorded => Err(GuestError::Size {
            path,
            found: metadata.len(),
            recorded,
        }),
        Ok(metadata) if metadata.mode() & 0o004 == 0 => Err(GuestError::Mode { path }),
        Ok(_) => Ok(path),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(GuestError::FileMissing { path }),
        Err(source) => Err(GuestError::Unreadable { path, source }),
    }
}

/// The guests that stand in a directory, by name; none where it cannot be read.
pub fn names_in(guests_dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(guests_dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().join("guest.toml").is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    const DESCRIPTION: &str = r#"
name = "small"
kernel = "vmlinuz"
initramfs = "initrd.img"
root = "root.erofs"
root_format = "raw"
kernel_args = "root=/dev/vda  ro"
ignition_fw_cfg = "opt/com.coreos/config"
ignition_versions = ["3.0.0", "3.3.0"]
min_memory_mib = 192
[files."vmlinuz"]
size = 3
sha256 = "00"
[files."initrd.img"]
size = 4
sha256 = "00"
[files."root.erofs"]
size = 5
sha256 = "00"
"#;

    fn guests() -> tempfile::TempDir {
        let guests = tempfile::tempdir().unwrap();
        let folder = guests.path().join("small");
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("guest.toml"), DESCRIPTION).unwrap();
        std::fs::write(folder.join("vmlinuz"), "123").unwrap();
        std::fs::write(folder.join("initrd.img"), "1234").unwrap();
        std::fs::write(folder.join("root.erofs"), "12345").unwrap();
        guests
    }

    #[test]
    fn a_complete_guest_is_read() {
        let guests = guests();
        let guest = Guest::load(guests.path(), "small").unwrap();
        assert_eq!(guest.root, guests.path().join("small/root.erofs"));
        assert_eq!(guest.kernel_args, ["root=/dev/vda", "ro"]);
        assert_eq!(guest.min_memory_mib, 192);
    }

    #[test]
    fn a_truncated_image_is_named_with_both_sizes() {
        let guests = guests();
        let root = guests.path().join("small/root.erofs");
        std::fs::write(&root, "1").unwrap();
        let error = Guest::load(guests.path(), "small").unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("the guest's file {} is truncated", root.display())),
            "{error}"
        );
        assert!(
            error.contains("it has 1 bytes where guest.toml says 5; `devtool image`"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_an_unprivileged_qemu_cannot_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;

        let guests = guests();
        let kernel = guests.path().join("small/vmlinuz");
        std::fs::set_permissions(&kernel, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Guest::load(guests.path(), "small").unwrap_err().to_string();
        assert!(error.contains("small/vmlinuz is not readable by everybody"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let guests = guests();
        std::fs::remove_file(guests.path().join("small/vmlinuz")).unwrap();
        let error = Guest::load(guests.path(), "small").unwrap_err().to_string();
        assert!(error.contains("small/vmlinuz is missing; `devtool image`"), "{error}");
    }

    #[test]
    fn a_missing_guest_is_answered_with_those_that_are_there() {
        let error = Guest::load(guests().path(), "large").unwrap_err().to_string();
        assert!(error.contains("there is no guest \"large\": "), "{error}");
        assert!(error.ends_with("installed are: small"), "{error}");
    }

    #[rstest::rstest]
    #[case("../small")]
    #[case("")]
    #[case(".hidden")]
    fn a_name_stays_inside_the_directory(#[case] name: &str) {
        assert!(matches!(Guest::load(guests().path(), name), Err(GuestError::Name(_))));
    }

    #[rstest::rstest]
    #[case("\"config\"", true)]
    #[case("\"a-serial-number-that-is-too-long\"", false)]
    #[case("\"a,b\"", false)]
    fn a_serial_number_reaches_the_guest_whole(#[case] serial: &str, #[case] good: bool) {
        let guests = guests();
        let path = guests.path().join("small/guest.toml");
        std::fs::write(&path, format!("ignition_disk = {serial}\n{DESCRIPTION}")).unwrap();
        let guest = Guest::load(guests.path(), "small");
        assert_eq!(guest.is_ok(), good, "{guest:?}");
    }

    #[test]
    fn files_stay_inside_the_folder() {
        let guests = guests();
        let path = guests.path().join("small/guest.toml");
        std::fs::write(&path, DESCRIPTION.replace("\"vmlinuz\"", "\"../vmlinuz\"")).unwrap();
        assert!(matches!(
            Guest::load(guests.path(), "small"),
            Err(GuestError::Description { .. })
        ));
    }
}
