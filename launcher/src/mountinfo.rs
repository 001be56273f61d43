//! What is mounted where, as the calling thread sees it: proc_pid_mountinfo(5).

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The number that statx(2) has for it, too (STATX_MNT_ID).
    pub id: u64,
    pub point: PathBuf,
    /// Its own, of which the file system's are no part: `rw,nosuid`.
    pub options: String,
}

/// All mounts.
///
/// # Errors
/// Of reading the kernel's list.
pub fn mounts() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/thread-self/mountinfo")?))
}

/// The mount points that are below `folder`, which has no links in it; not itself.
pub fn below<'a>(folder: &'a Path, mounts: &'a [Mount]) -> impl Iterator<Item = &'a PathBuf> {
    let points = mounts.iter().map(|mount| &mount.point);
    points.filter(move |point| *point != folder && point.starts_with(folder))
}

/// Whether what is mounted below all of these paths, now or later, shows in mount namespaces that are made as slaves of this one:
/// systemd's default.
///
/// # Errors
/// Of reading the kernel's list.
pub fn are_shared(paths: &[&Path]) -> io::Result<bool> {
    let mountinfo = std::fs::read("/proc/thread-self/mountinfo")?;
    Ok(paths.iter().all(|path| is_shared(path, &mountinfo)))
}

/// Of the mount that the path is on. Its optional fields are between the sixth and a dash.
fn is_shared(path: &Path, mountinfo: &[u8]) -> bool {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let mounts = lines.filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(4);
        let point = PathBuf::from(OsString::from_vec(unescape(fields.next()?)));
        let mut optional = fields.skip(1).take_while(|field| *field != b"-");
        let shared = optional.any(|field| field.starts_with(b"shared:"));
        path.starts_with(&point).then(|| (point.components().count(), shared))
    });
    // Of those at the same place the last is on top.
    mounts.max_by_key(|(depth, _)| *depth).is_some_and(|(_, shared)| shared)
}

fn parse(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// Its fields are: number, that of its parent, device, root, mount point, options.
fn mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let point = OsString::from_vec(unescape(fields.nth(3)?)).into();
    let options = String::from_utf8_lossy(fields.next()?).into_owned();
    Some(Mount { id, point, options })
}

/// White space and backslashes are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| byte == b'\\');
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_mount_is_told_from_a_private_one() {
        let with = |optional: &str, path: &str| {
            let root = format!("1 1 0:1 / / rw - rootfs none rw\n21 1 0:20 / / rw {optional}- ext4 /dev/vda rw\n");
            let below = "22 21 0:21 / /data rw - ext4 /dev/vdb rw\n";
            is_shared(Path::new(path), format!("{root}{below}").as_bytes())
        };
        assert!(with("shared:1 ", "/var/lib"));
        assert!(with("master:3 shared:1 ", "/"));
        assert!(!with("master:3 ", "/"));
        assert!(!with("", "/database"));
        assert!(with("shared:1 ", "/database"));
        assert!(!with("shared:1 ", "/data/volumes"));
    }

    #[test]
    fn mounts_are_found_below_a_folder_alone() {
        let mountinfo = b"\
21 1 0:20 / / rw - tmpfs tmpfs rw
22 21 0:21 / /run/coreos-kvm/a/shared/c1 rw - overlay overlay rw
23 21 0:21 / /run/coreos-kvm/a/shared/with\\040space rw master:1 - overlay overlay rw
24 21 0:21 / /run/coreos-kvm/ab/shared rw - overlay overlay rw
25 21 0:21 / /run/coreos-kvm/a rw - tmpfs tmpfs rw
26 21 0:21 / /mnt/of\xffbytes rw - tmpfs tmpfs rw
";
        let mounts = parse(mountinfo);
        assert_eq!(mounts.len(), 6);
        assert_eq!((mounts[2].id, &*mounts[2].options), (23, "rw"));
        assert_eq!(
            below(Path::new("/run/coreos-kvm/a"), &mounts).collect::<Vec<_>>(),
            [
                Path::new("/run/coreos-kvm/a/shared/c1"),
                Path::new("/run/coreos-kvm/a/shared/with space")
            ]
        );
    }
}
