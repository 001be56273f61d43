//! The cgroup of a machine's processes, in every hierarchy that the node has: one of version 2, those of version 1, or both.
//! Limits are not set here: they are the pod's, on the directories above.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use tokio::time::{Instant, sleep};

/// A killed process leaves its cgroup within moments.
const EMPTYING: Duration = Duration::from_secs(3);

/// A cgroup that could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "{0:?} is no cgroup of a machine: a path below the hierarchies' roots or `slice:prefix:name` of systemd is expected"
    )]
    Path(PathBuf),
    #[error("{what} the cgroup directory {} failed", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl CgroupError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// The directory that `linux.cgroupsPath` of the OCI runtime specification means, relative to the hierarchies' roots: a path as
/// it is, or systemd's `slice:prefix:name`, where `a-b.slice` lies in `a.slice` (systemd.slice(5)).
///
/// # Errors
/// When it leaves the root or names the root itself.
pub fn directory(cgroups_path: &str) -> Result<PathBuf, CgroupError> {
    let invalid = || CgroupError::Path(cgroups_path.into());
    let path = match cgroups_path.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, name] if !cgroups_path.contains('/') => {
            let stem = slice.strip_suffix(".slice").ok_or_else(invalid)?;
            let mut path = PathBuf::new();
            if stem != "-" {
                let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
                ends.for_each(|end| path.push(format!("{}.slice", &stem[..end])));
            }
            path.join(format!("{prefix}-{name}.scope"))
        }
        _ => PathBuf::from(cgroups_path.trim_start_matches('/')),
    };
    let inside = path
        .components()
        .all(|component| matches!(component, Component::Normal(_)));
    if inside && path.components().next().is_some() {
        Ok(path)
    } else {
        Err(invalid())
    }
}

/// Makes the directory in every hierarchy and opens each one's `cgroup.procs`: a process that writes "0" there has entered.
///
/// # Errors
/// When a directory cannot be made or entered; those made before stay, for [`remove`].
pub fn create(directory: &Path) -> Result<Vec<File>, CgroupError> {
    let mut procs = Vec::new();
    for root in hierarchies()? {
        let mut path = root.clone();
        for part in directory.components() {
            path.push(part);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(CgroupError::io("making", &path)(error));
                }
                _ => inherit_cpuset(&path).map_err(CgroupError::io("giving processors to", &path))?,
            }
        }
        let file = path.join("cgroup.procs");
        procs.push(
            OpenOptions::new()
                .write(true)
                .open(&file)
                .map_err(CgroupError::io("opening", &file))?,
        );
    }
    Ok(procs)
}

/// Removes the directory from every hierarchy, as soon as its processes are gone; one that is not there is no error.
///
/// # Errors
/// When one stays, all having been tried.
pub async fn remove(directory: &Path) -> Result<(), CgroupError> {
    let mut result = Ok(());
    let deadline = Instant::now() + EMPTYING;
    for root in hierarchies()? {
        let path = root.join(directory);
        let outcome = loop {
            match fs::remove_dir(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    sleep(Duration::from_millis(5)).await;
                }
                outcome => break outcome,
            }
        };
        if let Err(error) = outcome {
            result = Err(CgroupError::io("removing", &path)(error));
        }
    }
    result
}

/// Roots of the mounted hierarchies, from proc_pid_mountinfo(5).
fn hierarchies() -> Result<Vec<PathBuf>, CgroupError> {
    let mountinfo = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(mountinfo).map_err(CgroupError::io("finding", mountinfo))?;
    Ok(parse_hierarchies(&text))
}

fn parse_hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| {
            let (mount, kind) = line.split_once(" - ")?;
            let kind = kind.split(' ').next()?;
            // Field 4 is the part of the hierarchy that is mounted: only a whole one is a root.
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            (matches!(kind, "cgroup" | "cgroup2") && root == "/").then(|| PathBuf::from(point))
        })
        .collect();
    roots.sort();
    roots.dedup();
    roots
}

/// A new cgroup of the cpuset controller of version 1 has no processors and no memory, and takes no process before it has:
/// cpusets(7). It gets those of the directory above.
fn inherit_cpuset(path: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let own = path.join(name);
        let Some(above) = path.parent().map(|above| above.join(name)) else {
            continue;
        };
        if !own.exists() || path.join("cgroup.controllers").exists() || !above.exists() {
            continue;
        }
        if fs::read_to_string(&own)?.trim().is_empty() {
            fs::write(&own, fs::read_to_string(above)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("/k8s.io/abc", Some("k8s.io/abc"))]
    #[case("kubepods/burstable/pod1/abc", Some("kubepods/burstable/pod1/abc"))]
    #[case(
        "kubepods-burstable-pod1.slice:cri-containerd:abc",
        Some("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-abc.scope")
    )]
    #[case("-.slice:cri-containerd:abc", Some("cri-containerd-abc.scope"))]
    #[case("/", None)]
    #[case("", None)]
    #[case("/k8s.io/../../etc", None)]
    #[case("kubepods:cri-containerd:abc", None)]
    fn a_cgroups_path_is_a_directory(#[case] path: &str, #[case] expected: Option<&str>) {
        assert_eq!(directory(path).ok(), expected.map(PathBuf::from));
    }

    #[test]
    fn whole_hierarchies_are_found() {
        let mountinfo = "\
30 25 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro
31 30 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw
33 30 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
34 30 0:29 /docker/1 /mnt/cpu rw - cgroup cgroup rw,cpu
";
        assert_eq!(
            parse_hierarchies(mountinfo),
            [Path::new("/sys/fs/cgroup/cpu"), Path::new("/sys/fs/cgroup/unified")]
        );
    }

    #[tokio::test]
    async fn a_cgroup_takes_a_process_and_goes_again() {
        use std::io::Write as _;
        use std::os::unix::process::CommandExt as _;

        let directory = PathBuf::from(format!("coreos-kvm-test-{}/machine", std::process::id()));
        let mut procs = create(&directory).unwrap();
        let mut command = std::process::Command::new("cat");
        command
            .arg("/proc/self/cgroup")
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped());
        // SAFETY: only write(2) between fork and exec.
        unsafe { command.pre_exec(move || procs.iter_mut().try_for_each(|file| file.write_all(b"0"))) };
        let seen = String::from_utf8(command.output().unwrap().stdout).unwrap();
        let expected = format!("/{}", directory.display());
        assert!(seen.lines().all(|line| line.ends_with(&expected)), "{seen}");
        remove(&directory).await.unwrap();
        remove(directory.parent().unwrap()).await.unwrap();
        remove(&directory).await.unwrap();
    }
}
