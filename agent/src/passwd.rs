//! A container's passwd(5), read without the C library: its name services would load plug-ins from the container.

use std::{fs::File, io::Read, path::Path};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

/// More than any such file has, in bytes.
const SIZE_MAX: u64 = 1024 * 1024;

/// The home of the user `uid` in the file system below `root`; `/` for one who is not in its /etc/passwd.
pub(crate) fn home(root: &Path, uid: u32) -> String {
    let read = || -> std::io::Result<String> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, root, flags, Mode::empty())?;
        // A link in there must not lead out, nor must a pipe hold us up.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat2(&root, "etc/passwd", flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        let mut text = Vec::new();
        File::from(file).take(SIZE_MAX).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    home_in(&read().unwrap_or_default(), uid)
}

fn home_in(text: &str, uid: u32) -> String {
    let entry = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let number: u32 = fields.nth(2)?.parse().ok()?;
        (number == uid).then_some(fields.nth(2)?)
    });
    entry.filter(|home| !home.is_empty()).unwrap_or("/").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_home_is_the_files_or_the_root() {
        let text = "root:x:0:0:root:/root:/bin/sh\nbroken\nalice:x:1000:1000::/home/alice:/bin/sh\nbob:x:7:7:::\n";
        let homes = [0, 1000, 7, 8].map(|uid| home_in(text, uid));
        assert_eq!(homes, ["/root", "/home/alice", "/", "/"]);
    }

    #[test]
    fn a_link_does_not_lead_out_of_the_root() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let outside = root.path().join("outside");
        std::fs::write(&outside, "root:x:0:0:root:/stolen:\n").unwrap();
        std::os::unix::fs::symlink(&outside, root.path().join("etc/passwd")).unwrap();
        assert_eq!(home(root.path(), 0), "/");
    }
}
