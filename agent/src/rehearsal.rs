//! What a clone does first, done once before its template is saved: what programs and kernel read from disks, look up and set up
//! for it is then in memory, and every clone finds it there. Memory that clones would fill anyway is all it takes.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use coreos_kvm_proto::agent::{ConfigureNetworkRequest, Streams};
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::{
    containers::{Containers, Processes},
    identity::Ids,
    network,
};

/// The container's name, which no pod's container has.
const NAME: &str = "rehearsal";
const FOLDER: &str = "/run/coreos-kvm/rehearsal";
const CGROUP_STAT: &str = "/sys/fs/cgroup/cgroup.stat";
/// A cgroup goes within tenths of seconds, or stays as long as memory has what its processes were the first to read: then all else of
/// it is gone by then.
const SETTLED: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);
/// Of the guest's, what a container of its programs consists of: where they are, and the links that lead there.
const PROGRAMS: &str = "usr";
const LINKS: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Rehearses the start of a clone and of a container in it.
///
/// # Errors
/// When the container does not run as it is to: one of a clone would not either.
pub(crate) async fn rehearse(containers: &Containers, template: Ids) -> Result<()> {
    template.rehearse().context("becoming a machine of its own")?;
    network::configure(&ConfigureNetworkRequest::default())
        .await
        .context("bringing up the loopback interface")?;
    read_own_program().context("reading the agent's own program")?;
    let dying = dying_cgroups()?;
    let made = make_root().context("making a root file system")?;
    let result = run(containers, &made).await.context("running a container");
    fs::remove_dir_all(FOLDER).context("removing the root file system")?;
    result?;
    settle(dying).await
}

/// Has all of it in memory: a clone comes by parts that nothing here does, and the first block that a kernel reads costs a clone more than
/// all that is read here.
fn read_own_program() -> io::Result<()> {
    io::copy(&mut File::open("/proc/self/exe")?, &mut io::sink()).map(drop)
}

/// Waits until the kernel has taken the container apart, for else each clone would go on with that.
async fn settle(dying_before: u64) -> Result<()> {
    let deadline = Instant::now() + SETTLED;
    while dying_cgroups()? > dying_before && Instant::now() < deadline {
        sleep(LOOK).await;
    }
    Ok(())
}

/// cgroups that were removed and of which something is left: cgroup-v2, "cgroup.stat".
fn dying_cgroups() -> Result<u64> {
    let stat = fs::read_to_string(CGROUP_STAT).with_context(|| format!("reading {CGROUP_STAT}"))?;
    let dying = stat.lines().find_map(|line| line.strip_prefix("nr_dying_descendants "));
    dying
        .unwrap_or("0")
        .parse()
        .with_context(|| format!("{CGROUP_STAT} has no number"))
}

/// A root file system that shows the guest's own programs.
fn make_root() -> Result<PathBuf> {
    let root = Path::new(FOLDER).join("root");
    fs::create_dir_all(root.join(PROGRAMS))?;
    for link in LINKS {
        if let Ok(target) = fs::read_link(Path::new("/").join(link)) {
            symlink(target, root.join(link))?;
        }
    }
    Ok(root)
}

async fn run(containers: &Containers, root: &Path) -> Result<()> {
    let spec = serde_json::to_vec(&specification(root))?;
    let streams = Streams {
        stdout: true,
        ..Default::default()
    };
    containers.create(NAME, &spec, streams, Processes::Own).await?;
    let exit = async {
        containers.start(NAME, "").await?;
        containers.wait(NAME, "").await
    };
    let exit = exit.await;
    containers.delete(NAME, "").await?;
    let (exit, _) = exit?;
    ensure!(exit.status == 0, "its program ended with {}", exit.status);
    Ok(())
}

/// With what containers of Kubernetes mostly have.
fn specification(root: &Path) -> serde_json::Value {
    let capabilities = json!(["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["true"],
            "cwd": "/",
            "env": ["PATH=/usr/bin:/bin"],
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "oomScoreAdj": 0,
        },
        "root": {"path": root},
        "mounts": [
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["nosuid", "noexec", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "cgroup"}],
            "resources": {"cpu": {"shares": 1024}, "memory": {}},
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        },
    })
}
