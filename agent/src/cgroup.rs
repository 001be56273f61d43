//! The containers' cgroups. The agent's service has a subtree of its own (`Delegate=yes`): the agent itself moves to a leaf of
//! it, the containers get leaves beside. cgroups(7), version 2.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::unistd::Pid;

/// Where the guest has the hierarchy.
const ROOT: &str = "/sys/fs/cgroup";

/// Moves `processes`, which are the agent's, to a leaf, and answers the subtree's path relative to the hierarchy's root.
pub(crate) fn own(processes: &[Pid]) -> io::Result<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let own = text.lines().find_map(|line| line.strip_prefix("0::")).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "the guest has no cgroup hierarchy of version 2",
        )
    })?;
    let own = PathBuf::from(own);
    let leaf = directory(&own).join("agent");
    fs::create_dir_all(&leaf)?;
    for pid in processes {
        fs::write(leaf.join("cgroup.procs"), pid.to_string())?;
    }
    let controllers = fs::read_to_string(directory(&own).join("cgroup.controllers"))?;
    for controller in controllers.split_ascii_whitespace() {
        if let Err(error) = fs::write(directory(&own).join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::warn!(controller, %error, "containers are without this controller");
        }
    }
    Ok(own)
}

/// The directory of a cgroup.
pub(crate) fn directory(cgroup: &Path) -> PathBuf {
    Path::new(ROOT).join(cgroup.strip_prefix("/").unwrap_or(cgroup))
}

/// Processes of the cgroup and of those below it.
pub(crate) fn pids(directory: &Path) -> io::Result<Vec<u32>> {
    let mut pids: Vec<u32> = fs::read_to_string(directory.join("cgroup.procs"))?
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            pids.extend(self::pids(&entry.path())?);
        }
    }
    Ok(pids)
}

/// Freezes or thaws it with all its processes.
pub(crate) fn freeze(directory: &Path, frozen: bool) -> io::Result<()> {
    fs::write(directory.join("cgroup.freeze"), if frozen { "1" } else { "0" })
}

/// Kills all its processes, also those that are being made.
pub(crate) fn kill(directory: &Path) -> io::Result<()> {
    fs::write(directory.join("cgroup.kill"), "1")
}

/// All else that the guest runs, set aside: it has the processor only when the agent and its containers leave it alone.
#[derive(Debug)]
pub(crate) struct Others {
    /// Each cgroup with the weight that it had.
    weights: Vec<(PathBuf, String)>,
}

impl Others {
    /// Sets aside the siblings of the agent's cgroup and of those above it.
    pub(crate) fn set_aside(own: &Path) -> Self {
        let own = directory(own);
        let levels = own.ancestors().take_while(|level| *level != Path::new(ROOT));
        let siblings = levels.flat_map(|level| {
            let parent = level.parent().unwrap_or(level);
            let entries = fs::read_dir(parent).into_iter().flatten().flatten();
            let paths = entries.map(|entry| entry.path());
            paths.filter(move |path| path != level).collect::<Vec<_>>()
        });
        let weights = siblings.filter_map(|cgroup| {
            // Files, and cgroups without the controller, have none.
            let weight = fs::read_to_string(cgroup.join("cpu.weight")).ok()?;
            fs::write(cgroup.join("cpu.idle"), "1").ok()?;
            Some((cgroup, weight))
        });
        Self {
            weights: weights.collect(),
        }
    }

    /// Ends that.
    pub(crate) fn let_on(self) {
        for (cgroup, weight) in self.weights {
            let set = fs::write(cgroup.join("cpu.idle"), "0").and_then(|()| {
                // Not all that there is has one other than the default.
                fs::write(cgroup.join("cpu.weight"), weight)
            });
            if let Err(error) = set
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(cgroup = %cgroup.display(), %error, "a cgroup keeps being set aside");
            }
        }
    }
}

/// Whether the kernel has killed a process in it for want of memory.
pub(crate) fn oom_killed(directory: &Path) -> bool {
    fs::read_to_string(directory.join("memory.events")).is_ok_and(|text| {
        text.lines()
            .any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count.trim() != "0"))
    })
}
