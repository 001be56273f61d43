//! The folder that a container starts in.

use std::{
    io,
    path::{Component, Path},
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, chownat, mkdirat, openat, openat2},
    process::{Gid, Uid},
};

/// Makes `folder` in the file system below `root`, where it is missing: images may name one that they do not contain. Links in
/// there do not lead out of it. What is made belongs to `owner`, user and group, or else to this process.
pub(crate) fn make(root: &Path, folder: &Path, owner: Option<(u32, u32)>) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, root, flags, Mode::empty())?;
    let open = |path: &Path| openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    if open(folder).is_ok() {
        return Ok(());
    }
    let mut path = Path::new("/").to_owned();
    for part in folder.components() {
        let Component::Normal(name) = part else { continue };
        let parent = open(&path)?;
        match mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                if let Some((user, group)) = owner {
                    let (user, group) = (Some(Uid::from_raw(user)), Some(Gid::from_raw(group)));
                    chownat(&parent, name, user, group, AtFlags::SYMLINK_NOFOLLOW)?;
                }
            }
            Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        path.push(name);
    }
    open(&path).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn a_missing_folder_is_made_inside_the_root_only() {
        let place = tempfile::tempdir().unwrap();
        let (root, outside) = (place.path().join("root"), place.path().join("outside"));
        for folder in [&root, &outside, &root.join("inside")] {
            std::fs::create_dir(folder).unwrap();
        }
        std::os::unix::fs::symlink("/inside", root.join("link")).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("way-out")).unwrap();
        make(&root, Path::new("/a/b"), None).unwrap();
        make(&root, Path::new("/a/b"), None).unwrap();
        make(&root, Path::new("/link/c"), Some((1000, 2000))).unwrap();
        assert!(root.join("a/b").is_dir());
        let made = std::fs::metadata(root.join("inside/c")).unwrap();
        assert_eq!((made.is_dir(), made.uid(), made.gid()), (true, 1000, 2000));
        assert!(make(&root, Path::new("/way-out/d"), None).is_err());
        assert!(!outside.join("d").exists());
    }
}
