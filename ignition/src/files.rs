//! The files that a configuration names by `local` and `trees`. The library itself opens none: the caller has them.

/// Files that a configuration may refer to, below one directory.
pub trait Files {
    /// The contents of the file at a path relative to the directory.
    ///
    /// # Errors
    /// A sentence that says why it cannot be read: missing, too long, outside of the directory.
    fn read(&self, path: &str) -> Result<Vec<u8>, String>;

    /// Everything below the directory at a path relative to the directory, in the order of the paths.
    ///
    /// # Errors
    /// A sentence that says why it cannot be listed.
    fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String>;
}

/// Something below a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TreeEntry {
    /// Relative to the directory that was walked, with `/` between its parts.
    pub path: String,
    /// What it is.
    pub kind: TreeEntryKind,
}

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TreeEntryKind {
    /// A regular file.
    File {
        /// Whether anybody may execute it.
        executable: bool,
    },
    /// A directory; what is in it is listed apart.
    Directory,
    /// A symbolic link.
    Link {
        /// As it is written in the link.
        target: String,
    },
    /// A socket, a device or the like, which no configuration can carry.
    Other,
}

/// Most bytes of local files that one configuration may carry.
const LOCAL_MAX: usize = 64 << 20;

/// The caller's files, of which no more is read than a configuration can carry: one may name a file a thousand times.
pub(crate) struct Bounded<'a> {
    files: &'a dyn Files,
    /// Bytes that may still be read.
    left: usize,
}

impl<'a> Bounded<'a> {
    pub(crate) fn new(files: &'a dyn Files) -> Self {
        let left = LOCAL_MAX;
        Self { files, left }
    }

    /// As [`Files::read`]; an error, too, when it was too much.
    pub(crate) fn read(&mut self, path: &str) -> Result<Vec<u8>, String> {
        let too_much = || format!("local files of more than {LOCAL_MAX} bytes in all make no configuration");
        if self.left == 0 {
            return Err(too_much());
        }
        let bytes = self.files.read(path)?;
        let left = self.left.checked_sub(bytes.len());
        self.left = left.unwrap_or_default();
        left.map(|_| bytes).ok_or_else(too_much)
    }

    /// As [`Files::walk`].
    pub(crate) fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        self.files.walk(path)
    }
}

/// No files: whatever a configuration refers to is an error.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoFiles;

impl Files for NoFiles {
    fn read(&self, _: &str) -> Result<Vec<u8>, String> {
        Err(none())
    }

    fn walk(&self, _: &str) -> Result<Vec<TreeEntry>, String> {
        Err(none())
    }
}

fn none() -> String {
    "local files cannot be read here: no directory for them was given (--files-dir)".to_owned()
}
