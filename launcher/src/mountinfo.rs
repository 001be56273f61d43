//! Where something is mounted, as this process sees it: proc_pid_mountinfo(5).

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
};

/// All mount points.
///
/// # Errors
/// Of reading the kernel's list.
pub fn mount_points() -> io::Result<Vec<PathBuf>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// Those of the mount points that are below `folder`, which has no links in it; not itself.
pub fn below<'a>(folder: &'a Path, mount_points: &'a [PathBuf]) -> impl Iterator<Item = &'a PathBuf> {
    mount_points
        .iter()
        .filter(move |point| *point != folder && point.starts_with(folder))
}

/// Whether what is mounted below all of these paths, now or later, shows in mount namespaces that are made as slaves of this one:
/// systemd's default.
///
/// # Errors
/// Of reading the kernel's list.
pub fn are_shared(paths: &[&Path]) -> io::Result<bool> {
    let mountinfo = std::fs::read("/proc/self/mountinfo")?;
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

fn parse(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let fields = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    fields.map(|field| OsString::from_vec(unescape(field)).into()).collect()
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
        let points = parse(mountinfo);
        assert_eq!(points.len(), 6);
        assert_eq!(
            below(Path::new("/run/coreos-kvm/a"), &points).collect::<Vec<_>>(),
            [
                Path::new("/run/coreos-kvm/a/shared/c1"),
                Path::new("/run/coreos-kvm/a/shared/with space")
            ]
        );
    }
}
