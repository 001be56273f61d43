//! The folder that a container starts in.

use std::{
    io,
    path::{Component, Path},
};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};

/// Makes `folder` in the file system below `root`, where it is missing: images may name one that they do not contain. Links in
/// there do not lead out of it.
pub(crate) fn make(root: &Path, folder: &Path) -> io::Result<()> {
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
            Ok(()) | Err(rustix::io::Errno::EXIST) => path.push(name),
            Err(error) => return Err(error.into()),
        }
    }
    open(&path).map(drop).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
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
        make(&root, Path::new("/a/b")).unwrap();
        make(&root, Path::new("/a/b")).unwrap();
        make(&root, Path::new("/link/c")).unwrap();
        assert!(root.join("a/b").is_dir() && root.join("inside/c").is_dir());
        assert!(make(&root, Path::new("/way-out/d")).is_err());
        assert!(!outside.join("d").exists());
    }
}
