//! The program QEMU: found, and of a version that will do.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use crate::{
    cache::Cache,
    program::{self, ProgramError},
};

/// Oldest QEMU that is known to do what is asked of it.
pub const OLDEST: Version = Version { major: 7, minor: 2 };

/// What it says of itself is a matter of milliseconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A version of QEMU, as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    pub major: u32,
    pub minor: u32,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// There is no QEMU that will do.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    #[error(transparent)]
    Missing(#[from] ProgramError),
    #[error("{} cannot be asked for its version", path.display())]
    Unasked {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} does not answer `--version` as QEMU does: {answer:?}", path.display())]
    NoQemu { path: PathBuf, answer: String },
    #[error("QEMU {found} ({}) is too old: {OLDEST} or later is needed; install it, or name another as `qemu` in the configuration", path.display())]
    TooOld { path: PathBuf, found: Version },
}

/// The QEMU of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    pub path: PathBuf,
    pub version: Version,
    /// It has the device `ivshmem-plain`, which some distributions leave out.
    pub ivshmem: bool,
}

/// Finds the QEMU that the configuration names and makes sure that it is not too old. What it says of itself is kept in
/// `cache_dir`, for it takes longer to say it than to be found.
///
/// # Errors
/// When it is missing, no QEMU, or too old.
pub async fn find(program: &Path, cache_dir: &Path) -> Result<Qemu, QemuError> {
    let path = program::find("QEMU", "qemu", program)?;
    let unasked = |source| QemuError::Unasked {
        path: path.clone(),
        source,
    };
    let cache = cache(&path, cache_dir).map_err(unasked)?;
    let (version, ivshmem) = match cache.as_ref().and_then(Cache::read) {
        Some(said) => said,
        None => {
            let answer = ask(&path, &["--version"]).await.map_err(unasked)?;
            let answer = String::from_utf8_lossy(&answer.stdout);
            let version = parse_version(&answer).ok_or_else(|| QemuError::NoQemu {
                path: path.clone(),
                answer: answer.chars().take(200).collect(),
            })?;
            // Of a device that it has not it says nothing there, and ends as well as ever.
            let ivshmem = ask(&path, &["-device", "ivshmem-plain,help"]).await.map_err(unasked)?;
            let said = (version, ivshmem.stdout.starts_with(b"ivshmem-plain options"));
            if let Some(cache) = cache {
                cache.write(&said);
            }
            said
        }
    };
    new_enough(&path, version)?;
    Ok(Qemu { path, version, ivshmem })
}

fn new_enough(path: &Path, found: Version) -> Result<(), QemuError> {
    if found < OLDEST {
        Err(QemuError::TooOld {
            path: path.to_owned(),
            found,
        })
    } else {
        Ok(())
    }
}

async fn ask(path: &Path, arguments: &[&str]) -> io::Result<Output> {
    let asked = Command::new(path)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    tokio::time::timeout(ANSWER_TIMEOUT, asked).await?
}

/// Where the answers are kept, by device, inode and times of the program's file. None for a script, which may start another program
/// tomorrow and be the same file.
fn cache(path: &Path, directory: &Path) -> io::Result<Option<Cache>> {
    let mut file = File::open(path)?;
    let mut magic = [0; 2];
    if file.read(&mut magic)? == 2 && magic == *b"#!" {
        return Ok(None);
    }
    let file = file.metadata()?;
    let key = format!(
        "{} {} {}.{:09} {}.{:09}",
        file.dev(),
        file.ino(),
        file.mtime(),
        file.mtime_nsec(),
        file.ctime(),
        file.ctime_nsec()
    );
    Ok(Some(Cache::new(directory, ".qemu.json", key)))
}

/// From `QEMU emulator version 7.2.22 (Debian ...)`.
fn parse_version(answer: &str) -> Option<Version> {
    let mut numbers = answer
        .strip_prefix("QEMU emulator version ")?
        .split(|c: char| !c.is_ascii_digit());
    Some(Version {
        major: numbers.next()?.parse().ok()?,
        minor: numbers.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright", Some((7, 2)))]
    #[case("QEMU emulator version 10.0.2", Some((10, 0)))]
    #[case("kvm 1.0", None)]
    fn a_version_is_read_from_the_first_line(#[case] answer: &str, #[case] expected: Option<(u32, u32)>) {
        assert_eq!(
            parse_version(answer).map(|version| (version.major, version.minor)),
            expected
        );
    }

    #[test]
    fn an_old_qemu_is_refused_with_the_version_that_is_needed() {
        let path = Path::new("/usr/bin/qemu");
        let error = new_enough(path, Version { major: 5, minor: 2 })
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("QEMU 5.2 (/usr/bin/qemu) is too old: 7.2 or later is needed"),
            "{error}"
        );
        assert!(new_enough(path, Version { major: 10, minor: 0 }).is_ok());
    }

    #[tokio::test]
    async fn another_program_is_not_taken_for_qemu() {
        let cache = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let error = find(Path::new("/bin/true"), cache.path()).await.unwrap_err();
            assert!(matches!(error, QemuError::NoQemu { .. }), "{error}");
        }
    }

    #[tokio::test]
    async fn a_device_that_was_left_out_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("qemu");
        let help = r#"echo "ivshmem-plain options:"; echo "  acpi-index=<uint32>     -  (default: 0)""#;
        let missing = r#"echo "Device 'ivshmem-plain' not found" >&2"#;
        for (has, answer) in [(true, help), (false, missing)] {
            let text =
                format!("#!/bin/sh\n[ $1 = --version ] && echo QEMU emulator version 9.0.0 && exit 0\n{answer}\n");
            std::fs::write(&script, text).unwrap();
            std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            assert_eq!(find(&script, directory.path()).await.unwrap().ivshmem, has);
        }
    }

    #[tokio::test]
    async fn a_script_is_asked_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("qemu");
        for version in ["8.1", "9.0"] {
            let text = format!("#!/bin/sh\necho QEMU emulator version {version}.0\n");
            std::fs::write(&script, text).unwrap();
            std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
            let found = find(&script, directory.path()).await.unwrap();
            assert_eq!(found.version.to_string(), version);
        }
    }
}
