//! The pod's volumes as the kubelet has laid them out on the node: below its own directory, by the pod's uid, so that no pod can name a
//! file of another's.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    str::FromStr,
};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::error::{ShimError, sentence};

/// Longest file, in bytes: what etcd takes of a ConfigMap or a Secret, and as much again.
const FILE_MAX: u64 = 2 << 20;

/// The kubelet's name of the plugin for emptyDir volumes, as a folder.
pub(crate) const EMPTY_DIR: &str = "kubernetes.io~empty-dir";

/// The emptyDir volumes of one pod: the folders right in this one (`GetPodVolumeDir` in the kubelet).
#[derive(Debug)]
pub(crate) struct EmptyDirs(PathBuf);

impl EmptyDirs {
    /// None for what is no uid.
    pub(crate) fn of(kubelet_dir: &Path, pod_uid: &str) -> Option<Self> {
        let volumes = is_uid(pod_uid).then(|| kubelet_dir.join("pods").join(pod_uid).join("volumes"))?;
        Some(Self(volumes.join(EMPTY_DIR)))
    }

    /// Whether the path is one of them. It is the path that counts, not where it leads: what a pod can have lead elsewhere is in a volume. A
    /// `subPath` is none, for by its path it may be that of a claim.
    pub(crate) fn contain(&self, path: &Path) -> bool {
        // The file name of `..` is None.
        path.file_name().is_some() && path.parent() == Some(&self.0)
    }
}

fn is_uid(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

/// A file of a ConfigMap or Secret volume: `configmap/<volume>/<key>` or `secret/<volume>/<key>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VolumeFile {
    source: Source,
    volume: String,
    key: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    ConfigMap,
    Secret,
}

impl Source {
    fn name(self) -> &'static str {
        match self {
            Self::ConfigMap => "configmap",
            Self::Secret => "secret",
        }
    }

    /// The kubelet's name of the volume's plugin, as a folder. (`EscapeQualifiedName` in Kubernetes' `pkg/volume/util`.)
    fn folder(self) -> &'static str {
        match self {
            Self::ConfigMap => "kubernetes.io~configmap",
            Self::Secret => "kubernetes.io~secret",
        }
    }
}

impl fmt::Display for VolumeFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.source.name(), self.volume, self.key)
    }
}

impl FromStr for VolumeFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is expected to be configmap/<volume>/<key> or secret/<volume>/<key>, a volume of the pod and a key in it"
            )
        };
        let mut parts = text.splitn(3, '/');
        let mut part = || parts.next().filter(|part| !part.is_empty()).ok_or_else(wrong);
        let source = match part()? {
            "configmap" => Source::ConfigMap,
            "secret" => Source::Secret,
            _ => return Err(wrong()),
        };
        let (volume, key) = (part()?, part()?);
        // The names that Kubernetes allows (RFC 1123 labels; keys of letters, digits, '-', '_' and '.', of which a volume's
        // `items` make paths); none of them leads out of the volume, and how it is opened makes sure of that.
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let of_key = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let part_of_key =
            |part: &str| !part.is_empty() && !part.starts_with("..") && part != "." && part.chars().all(of_key);
        if volume.len() > 63 || !volume.chars().all(label) || key.len() > 1024 || !key.split('/').all(part_of_key) {
            return Err(wrong());
        }
        Ok(Self {
            source,
            volume: volume.to_owned(),
            key: key.to_owned(),
        })
    }
}

impl VolumeFile {
    /// The file's text, in the pod that has this uid.
    ///
    /// # Errors
    /// When the pod has no such volume, the volume no such key, or it is no text of at most 2 MiB.
    pub(crate) fn read(&self, kubelet_dir: &Path, pod_uid: &str) -> Result<String, ShimError> {
        let refused = |what: String| ShimError::InvalidArgument(format!("{self}: {what}"));
        if !is_uid(pod_uid) {
            return Err(refused(
                "the pod has no uid by which its volumes could be found".to_owned(),
            ));
        }
        let pods = kubelet_dir.join("pods");
        let volume = format!("{pod_uid}/volumes/{}/{}", self.source.folder(), self.volume);
        let volume = open_volume(&pods, &volume).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => refused(format!(
                "the pod has no {} volume {:?}, or no container of it mounts that, without which the kubelet does not make it \
                 (looked for below {})",
                self.source.name(),
                self.volume,
                pods.display()
            )),
            _ => refused(format!("the volume cannot be opened: {}", sentence(&error))),
        })?;
        let bytes = read_inside(&volume, &self.key).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => refused(format!("the volume {:?} has no key {:?}", self.volume, self.key)),
            _ => refused(format!("the key cannot be read: {}", sentence(&error))),
        })?;
        String::from_utf8(bytes).map_err(|_| refused("it is not UTF-8 text".to_owned()))
    }
}

/// Not by a link anywhere below the directory of pods: that is the kubelet's own, but a pod's volumes may be hostPaths beside it.
fn open_volume(pods: &Path, volume: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let pods = openat(CWD, pods, flags, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(openat2(pods, volume, flags, Mode::empty(), resolve)?)
}

/// The kubelet makes of each key a link into a folder of the volume's present version, so that links are followed, but none
/// that leaves the volume.
fn read_inside(volume: &OwnedFd, key: &str) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let file: File = match openat2(volume, key, flags, Mode::empty(), resolve) {
        Err(rustix::io::Errno::XDEV) => return Err(io::Error::other("it lies outside of the volume")),
        opened => opened?.into(),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_MAX {
        return Err(io::Error::other(format!("it has more than {FILE_MAX} bytes")));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use rstest::rstest;

    use super::*;

    const UID: &str = "0f4a2f6c-7b1e-4b0e-9d57-0d6a3f0c6f11";

    #[test]
    fn the_pods_own_empty_dirs_are_told_from_all_else() {
        let root = tempfile::tempdir().unwrap();
        let own = EmptyDirs::of(root.path(), UID).unwrap();
        assert!(EmptyDirs::of(root.path(), "..").is_none() && EmptyDirs::of(root.path(), "").is_none());
        let pod = root.path().join("pods").join(UID);
        assert!(own.contain(&pod.join("volumes/kubernetes.io~empty-dir/data")));
        for path in [
            "volumes/kubernetes.io~empty-dir",
            "volumes/kubernetes.io~empty-dir/..",
            "volumes/kubernetes.io~empty-dir/data/link",
            "volumes/kubernetes.io~secret/data",
            "volume-subpaths/data/web/0",
            "../another/volumes/kubernetes.io~empty-dir/data",
        ] {
            assert!(!own.contain(&pod.join(path)), "{path}");
        }
    }

    /// A kubelet's directory with a pod that has one ConfigMap, laid out as the kubelet does.
    fn kubelet() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let volumes = root.path().join("pods").join(UID).join("volumes");
        let volume = volumes.join("kubernetes.io~configmap/os");
        fs::create_dir_all(volume.join("..2026_01_01/sub")).unwrap();
        fs::write(volume.join("..2026_01_01/config.yaml"), "the text").unwrap();
        fs::write(volume.join("..2026_01_01/sub/other"), "another").unwrap();
        fs::write(volume.join("..2026_01_01/long"), vec![b' '; 3 << 20]).unwrap();
        symlink("..2026_01_01", volume.join("..data")).unwrap();
        for key in ["config.yaml", "sub", "long"] {
            symlink(format!("..data/{key}"), volume.join(key)).unwrap();
        }
        fs::write(root.path().join("secret"), "of the node").unwrap();
        symlink("../../../../../secret", volume.join("out")).unwrap();
        symlink("/etc/passwd", volume.join("absolute")).unwrap();
        rustix::fs::mknodat(CWD, volume.join("pipe"), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        symlink(root.path(), volumes.join("kubernetes.io~configmap/linked")).unwrap();
        root
    }

    fn read(name: &str) -> Result<String, String> {
        let file: VolumeFile = name.parse()?;
        file.read(kubelet().path(), UID).map_err(|error| error.to_string())
    }

    #[rstest]
    #[case("configmap/os/config.yaml", "the text")]
    #[case("configmap/os/sub/other", "another")]
    fn a_key_is_read(#[case] name: &str, #[case] expected: &str) {
        assert_eq!(read(name).unwrap(), expected);
    }

    #[rstest]
    #[case("configmap/os", "is expected to be configmap/<volume>/<key>")]
    #[case("hostpath/os/config.yaml", "is expected to be configmap/<volume>/<key>")]
    #[case("configmap/../config.yaml", "is expected to be")]
    #[case("configmap/os/../../secret", "is expected to be")]
    #[case("configmap/os//etc/passwd", "is expected to be")]
    #[case("configmap/os/..data/config.yaml", "is expected to be")]
    #[case("secret/os/config.yaml", "the pod has no secret volume \"os\"")]
    #[case("configmap/none/config.yaml", "the pod has no configmap volume \"none\"")]
    #[case("configmap/os/none", "has no key \"none\"")]
    #[case("configmap/os/out", "outside of the volume")]
    #[case("configmap/os/absolute", "outside of the volume")]
    #[case("configmap/os/pipe", "no regular file")]
    #[case("configmap/os/sub", "no regular file")]
    #[case("configmap/os/long", "more than 2097152 bytes")]
    #[case("configmap/linked/secret", "cannot be opened")]
    fn nothing_else_is(#[case] name: &str, #[case] expected: &str) {
        let error = read(name).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn a_uid_does_not_lead_elsewhere() {
        let file: VolumeFile = "configmap/os/config.yaml".parse().unwrap();
        for uid in ["", "..", "../other", "a/b"] {
            assert!(file.read(kubelet().path(), uid).is_err());
        }
    }
}
