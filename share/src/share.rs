//! The file system as the guest sees it: virtiofsd's, with inode numbers that are unique across the host's file systems, and
//! requests refused that no kernel makes: virtiofsd gives names to the kernel as they come, relying on its root directory,
//! and some offsets would end it.

use std::{
    ffi::{CStr, CString},
    fs::File,
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::fs::{AtFlags, statat};
use virtiofsd::{
    filesystem::{
        Context, DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
        OpenOptions, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
    },
    fuse::{Attr, SetattrIn},
    oslib::ReadvFlags,
    passthrough::{Config, PassthroughFs},
    read_dir::ReadDir,
};

use crate::{
    inode_numbers::{Device, Devices},
    nodes::Nodes,
};

/// How long the guest's kernel may take for true what it is told of nodes of its own: that of virtiofsd's `--cache=always`.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// The served file system.
pub(crate) struct Share {
    files: PassthroughFs,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    devices: Devices,
    nodes: Nodes,
    /// The directory in which the last node was met that the guest had not been told of: most others will be met there, too.
    directory: Option<(u64, File)>,
}

impl State {
    fn forget(&mut self, node: u64, lookups: u64) {
        // A directory that is held open would keep its file system busy.
        if self.nodes.forget(node, lookups) && self.directory.as_ref().is_some_and(|(held, _)| *held == node) {
            self.directory = None;
        }
    }

    fn forget_all(&mut self) {
        self.nodes.forget_all();
        self.directory = None;
    }
}

impl Share {
    /// `own` is the name of the folders that are the guest's own, in folders of the directory.
    ///
    /// # Errors
    /// When the directory cannot be opened.
    pub(crate) fn new(config: Config, own: Option<CString>) -> io::Result<Self> {
        let root = Path::new(&config.root_dir).metadata()?.dev();
        Ok(Self {
            files: PassthroughFs::new(config)?,
            state: Mutex::new(State {
                devices: Devices::new(root),
                nodes: Nodes::new(own),
                directory: None,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `entry`, found as `name` in `parent`, with its number in the guest. Where its device cannot be found out, because
    /// somebody on the host has put another file in its place meanwhile, it is taken for its parent's.
    fn numbered(&self, context: Context, parent: u64, name: &CStr, mut entry: Entry) -> Entry {
        let state = &mut *self.state();
        let device = state.nodes.remembered(entry.inode).unwrap_or_else(|| {
            let found = self.st_dev(&mut state.directory, context, parent, name, entry.attr.ino);
            let device = match found {
                Some(st_dev) => state.devices.device(st_dev),
                None => state.nodes.device_of(parent),
            };
            state.nodes.remember(entry.inode, device, (parent, name));
            device
        });
        entry.attr.ino = device.number(entry.attr.ino);
        if state.nodes.is_own(entry.inode) && is_one(&entry.attr) {
            entry.attr_timeout = DAY;
        }
        if state.nodes.is_own(parent) && is_one(&entry.attr) {
            entry.entry_timeout = DAY;
        }
        entry
    }

    /// The host's device number of the file `name` in `parent`, if it still has the inode number `ino`. [`PassthroughFs`] knows
    /// it and does not tell.
    fn st_dev(
        &self,
        held: &mut Option<(u64, File)>,
        context: Context,
        parent: u64,
        name: &CStr,
        ino: u64,
    ) -> Option<u64> {
        if held.as_ref().is_none_or(|(node, _)| *node != parent) {
            *held = self.directory(context, parent).map(|file| (parent, file));
        }
        let (_, directory) = held.as_ref()?;
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT).ok()?;
        (stat.st_ino == ino).then_some(stat.st_dev)
    }

    /// Opens a directory that the guest knows. Its descriptor comes by the way on which virtiofsd reads files: who reads is
    /// given the file.
    fn directory(&self, context: Context, node: u64) -> Option<File> {
        let (handle, _) = self.files.opendir(context, node, 0).ok()?;
        let handle = handle?;
        let mut directory = Taken(None);
        let taken = self.files.read(context, node, handle, &mut directory, 0, 0, None, 0);
        self.files.releasedir(context, node, 0, handle).ok()?;
        taken.ok().and(directory.0)
    }

    /// Has the guest's kernel keep what it has read of a file of its own when that is opened again.
    fn kept(&self, node: u64) -> OpenOptions {
        match self.state().nodes.is_own(node) {
            true => OpenOptions::KEEP_CACHE,
            false => OpenOptions::empty(),
        }
    }

    fn attributes(&self, node: u64, (mut attributes, mut timeout): (Attr, Duration)) -> (Attr, Duration) {
        let state = self.state();
        attributes.ino = state.nodes.device_of(node).number(attributes.ino);
        if state.nodes.is_own(node) && is_one(&attributes) {
            timeout = DAY;
        }
        (attributes, timeout)
    }
}

/// A file of one name, or a directory, is one node as long as it is there. One with several may become another: overlayfs copies it when it is
/// written to or has one more name, and gives the copy a number of its own (Documentation/filesystems/overlayfs.rst, "Non-standard behavior").
fn is_one(attributes: &Attr) -> bool {
    attributes.nlink <= 1 || attributes.mode & libc::S_IFMT == libc::S_IFDIR
}

/// The answer that there is no such file, for the guest's kernel to remember.
fn nothing() -> Entry {
    Entry {
        inode: 0,
        generation: 0,
        attr: Attr::default(),
        attr_timeout: DAY,
        entry_timeout: DAY,
    }
}

/// Takes the file that it is to read, and reads nothing.
struct Taken(Option<File>);

impl ZeroCopyWriter for Taken {
    fn read_from_file_at(&mut self, file: &File, _: usize, _: u64, _: Option<ReadvFlags>) -> io::Result<usize> {
        self.0 = Some(file.try_clone()?);
        Ok(0)
    }
}

/// Refuses what is not the name of one thing in a directory.
fn component(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(invalid()),
        bytes if bytes.contains(&b'/') => Err(invalid()),
        _ => Ok(name),
    }
}

/// Refuses a place that no file can have. The system calls take signed numbers.
fn within(offset: u64, size: u32) -> io::Result<()> {
    let end = offset.checked_add(size.into()).ok_or_else(invalid)?;
    i64::try_from(end).map(drop).map_err(|_| invalid())
}

fn invalid() -> io::Error {
    rustix::io::Errno::INVAL.into()
}

/// A directory's entries with their numbers in the guest. The number of a mount point is that of the directory below the
/// mount, as readdir(3) has it anywhere, so that it counts with its directory's device.
pub(crate) struct Entries {
    entries: ReadDir<Vec<u8>>,
    device: Device,
}

impl DirectoryIterator for Entries {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let entry = self.entries.next()?;
        Some(DirEntry {
            ino: self.device.number(entry.ino),
            ..entry
        })
    }
}

impl FileSystem for Share {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Entries;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.state().forget_all();
        self.files.init(capable)
    }

    fn destroy(&self) {
        self.state().forget_all();
        self.files.destroy();
    }

    fn lookup(&self, context: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        match self.files.lookup(context, parent, component(name)?) {
            Ok(entry) => Ok(self.numbered(context, parent, name, entry)),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.state().nodes.is_own(parent) => Ok(nothing()),
            Err(error) => Err(error),
        }
    }

    fn forget(&self, context: Context, node: u64, lookups: u64) {
        self.state().forget(node, lookups);
        self.files.forget(context, node, lookups);
    }

    fn batch_forget(&self, context: Context, requests: Vec<(u64, u64)>) {
        let mut state = self.state();
        for (node, lookups) in &requests {
            state.forget(*node, *lookups);
        }
        self.files.batch_forget(context, requests);
    }

    fn getattr(&self, context: Context, node: u64, handle: Option<u64>) -> io::Result<(Attr, Duration)> {
        let attributes = self.files.getattr(context, node, handle)?;
        Ok(self.attributes(node, attributes))
    }

    fn setattr(
        &self,
        context: Context,
        node: u64,
        attributes: SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let attributes = self.files.setattr(context, node, attributes, handle, valid)?;
        Ok(self.attributes(node, attributes))
    }

    fn readlink(&self, context: Context, node: u64) -> io::Result<Vec<u8>> {
        self.files.readlink(context, node)
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let entry = self
            .files
            .symlink(context, target, parent, component(name)?, extensions)?;
        Ok(self.numbered(context, parent, name, entry))
    }

    fn mknod(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        let entry = self.files.mknod(context, parent, name, mode, rdev, umask, extensions)?;
        Ok(self.numbered(context, parent, name, entry))
    }

    fn mkdir(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        let name = component(name)?;
        let entry = self.files.mkdir(context, parent, name, mode, umask, extensions)?;
        Ok(self.numbered(context, parent, name, entry))
    }

    fn unlink(&self, context: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.files.unlink(context, parent, component(name)?)
    }

    fn rmdir(&self, context: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.files.rmdir(context, parent, component(name)?)
    }

    fn rename(
        &self,
        context: Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (old_name, new_name) = (component(old_name)?, component(new_name)?);
        self.files
            .rename(context, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, context: Context, node: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let entry = self.files.link(context, node, parent, component(name)?)?;
        Ok(self.numbered(context, parent, name, entry))
    }

    fn open(
        &self,
        context: Context,
        node: u64,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.files.open(context, node, kill_privileges, flags)?;
        Ok((handle, options | self.kept(node)))
    }

    fn create(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_privileges: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let name = component(name)?;
        let (entry, handle, options) =
            self.files
                .create(context, parent, name, mode, kill_privileges, flags, umask, extensions)?;
        let entry = self.numbered(context, parent, name, entry);
        let options = options | self.kept(entry.inode);
        Ok((entry, handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        context: Context,
        node: u64,
        handle: u64,
        to: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        within(offset, size)?;
        self.files
            .read(context, node, handle, to, size, offset, lock_owner, flags)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        context: Context,
        node: u64,
        handle: u64,
        from: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_privileges: bool,
        flags: u32,
    ) -> io::Result<usize> {
        within(offset, size)?;
        self.files.write(
            context,
            node,
            handle,
            from,
            size,
            offset,
            lock_owner,
            delayed,
            kill_privileges,
            flags,
        )
    }

    fn flush(&self, context: Context, node: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        self.files.flush(context, node, handle, lock_owner)
    }

    fn fsync(&self, context: Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.files.fsync(context, node, data_only, handle)
    }

    fn fallocate(
        &self,
        context: Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.files.fallocate(context, node, handle, mode, offset, length)
    }

    fn release(
        &self,
        context: Context,
        node: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        unlock: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.files
            .release(context, node, flags, handle, flush, unlock, lock_owner)
    }

    fn statfs(&self, context: Context, node: u64) -> io::Result<libc::statvfs64> {
        self.files.statfs(context, node)
    }

    fn setxattr(
        &self,
        context: Context,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        self.files.setxattr(context, node, name, value, flags, extra_flags)
    }

    fn getxattr(&self, context: Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.files.getxattr(context, node, name, size)
    }

    fn listxattr(&self, context: Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.files.listxattr(context, node, size)
    }

    fn removexattr(&self, context: Context, node: u64, name: &CStr) -> io::Result<()> {
        self.files.removexattr(context, node, name)
    }

    fn opendir(&self, context: Context, node: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        self.files.opendir(context, node, flags)
    }

    fn readdir(&self, context: Context, node: u64, handle: u64, size: u32, offset: u64) -> io::Result<Entries> {
        Ok(Entries {
            entries: self.files.readdir(context, node, handle, size, offset)?,
            device: self.state().nodes.device_of(node),
        })
    }

    fn fsyncdir(&self, context: Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.files.fsyncdir(context, node, data_only, handle)
    }

    fn releasedir(&self, context: Context, node: u64, flags: u32, handle: u64) -> io::Result<()> {
        self.files.releasedir(context, node, flags, handle)
    }

    fn access(&self, context: Context, node: u64, mask: u32) -> io::Result<()> {
        self.files.access(context, node, mask)
    }

    fn lseek(&self, context: Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.files.lseek(context, node, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        context: Context,
        from: u64,
        from_handle: u64,
        from_offset: u64,
        to: u64,
        to_handle: u64,
        to_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        self.files.copyfilerange(
            context,
            from,
            from_handle,
            from_offset,
            to,
            to_handle,
            to_offset,
            length,
            flags,
        )
    }

    fn syncfs(&self, context: Context, node: u64) -> io::Result<()> {
        self.files.syncfs(context, node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_component() {
        for good in [c"a", c"...", c".a", c"a b"] {
            assert_eq!(component(good).unwrap(), good);
        }
        for bad in [c"", c".", c"..", c"/", c"a/b", c"../a"] {
            component(bad).unwrap_err();
        }
    }

    #[test]
    fn a_place_in_a_file_fits_the_system_calls() {
        within(0, u32::MAX).unwrap();
        within(i64::MAX as u64, 0).unwrap();
        within(i64::MAX as u64, 1).unwrap_err();
        within(u64::MAX, 1).unwrap_err();
    }
}
