//! The directory whose files a configuration may take in (`local`, `trees`).

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
};

use coreos_kvm_ignition::{Files, TreeEntry, TreeEntryKind};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

/// Longest file that is taken in, in bytes.
const FILE_MAX: u64 = 64 << 20;
/// Most entries of one tree.
const ENTRIES_MAX: usize = 100_000;

/// A directory, and nothing outside of it, whatever its links say.
pub(crate) struct LocalFiles {
    path: PathBuf,
    directory: OwnedFd,
}

impl LocalFiles {
    /// # Errors
    /// When it is no directory that can be opened.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let directory = openat(
            CWD,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(Self {
            path: path.to_owned(),
            directory,
        })
    }

    fn open_inside(&self, path: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let opened = openat2(&self.directory, path, flags, Mode::empty(), inside);
        match opened {
            Err(rustix::io::Errno::XDEV) => Err(io::Error::other("it lies outside of the directory of local files")),
            opened => Ok(opened?.into()),
        }
    }

    fn cannot(&self, path: &str) -> impl Fn(io::Error) -> String {
        let path = self.path.join(path);
        move |error| format!("{} cannot be read: {error}", path.display())
    }

    fn list(&self, base: &Path, relative: &Path, entries: &mut Vec<TreeEntry>) -> io::Result<()> {
        let mut found: Vec<_> = fs::read_dir(base.join(relative))?.collect::<io::Result<_>>()?;
        found.sort_by_key(fs::DirEntry::file_name);
        for entry in found {
            let relative = relative.join(entry.file_name());
            let not_text = || io::Error::other(format!("the name {} is not UTF-8", relative.display()));
            let path = relative.to_str().ok_or_else(not_text)?.to_owned();
            let metadata = entry.metadata()?;
            let kind = if metadata.is_dir() {
                TreeEntryKind::Directory
            } else if metadata.is_symlink() {
                let target = fs::read_link(entry.path())?;
                TreeEntryKind::Link {
                    target: target.to_str().ok_or_else(not_text)?.to_owned(),
                }
            } else if metadata.is_file() {
                TreeEntryKind::File {
                    executable: metadata.permissions().mode() & 0o111 != 0,
                }
            } else {
                TreeEntryKind::Other
            };
            let directory = kind == TreeEntryKind::Directory;
            entries.push(TreeEntry { path, kind });
            if entries.len() > ENTRIES_MAX {
                return Err(io::Error::other(format!("it has more than {ENTRIES_MAX} entries")));
            }
            if directory {
                self.list(base, &relative, entries)?;
            }
        }
        Ok(())
    }
}

impl Files for LocalFiles {
    fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        let read = || {
            let file = self.open_inside(path, OFlags::empty())?;
            if !file.metadata()?.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            let mut bytes = Vec::new();
            file.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > FILE_MAX {
                return Err(io::Error::other(format!("it has more than {FILE_MAX} bytes")));
            }
            Ok(bytes)
        };
        read().map_err(self.cannot(path))
    }

    fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        let walk = || {
            // Opened first: the directory must lie inside, links or not.
            let directory = self.open_inside(path, OFlags::DIRECTORY)?;
            let base = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&directory)));
            let mut entries = Vec::new();
            self.list(&base, Path::new(""), &mut entries)?;
            Ok(entries)
        };
        walk().map_err(self.cannot(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, LocalFiles) {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("files/tree/sub")).unwrap();
        fs::write(root.path().join("secret"), "outside").unwrap();
        fs::write(root.path().join("files/a"), "inside").unwrap();
        fs::write(root.path().join("files/tree/sub/run"), "#!").unwrap();
        fs::set_permissions(
            root.path().join("files/tree/sub/run"),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
        std::os::unix::fs::symlink("../a", root.path().join("files/tree/link")).unwrap();
        std::os::unix::fs::symlink("../secret", root.path().join("files/out")).unwrap();
        let files = LocalFiles::open(&root.path().join("files")).unwrap();
        (root, files)
    }

    #[test]
    fn what_is_inside_is_read() {
        let (_root, files) = place();
        assert_eq!(files.read("a").unwrap(), b"inside");
        assert_eq!(files.read("tree/link").unwrap(), b"inside");
    }

    #[rstest::rstest]
    #[case("out", "outside of the directory")]
    #[case("../secret", "outside of the directory")]
    #[case("/etc/passwd", "outside of the directory")]
    #[case("none", "No such file")]
    #[case("tree", "no regular file")]
    fn nothing_else_is(#[case] path: &str, #[case] expected: &str) {
        let (_root, files) = place();
        let error = files.read(path).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn a_tree_is_listed_in_order_and_links_are_not_followed() {
        let (_root, files) = place();
        let entries = files.walk("tree").unwrap();
        let found: Vec<_> = entries.iter().map(|entry| (entry.path.as_str(), &entry.kind)).collect();
        let link = TreeEntryKind::Link {
            target: "../a".to_owned(),
        };
        assert_eq!(
            found,
            [
                ("link", &link),
                ("sub", &TreeEntryKind::Directory),
                ("sub/run", &TreeEntryKind::File { executable: true })
            ]
        );
    }
}
