//! Where the built and downloaded parts are, as `devtool` lays them out.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// One of the containerds that the runtime is tried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Containerd {
    V1_6,
    V1_7,
    V2_1,
}

impl Containerd {
    pub const ALL: [Self; 3] = [Self::V1_6, Self::V1_7, Self::V2_1];

    /// The full version, the name of its folder in the cache.
    pub fn version(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6.20",
            Self::V1_7 => "1.7.24",
            Self::V2_1 => "2.1.9",
        }
    }

    /// Major and minor version, as the names of trials have it.
    pub fn short(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 => "2.1",
        }
    }
}

impl fmt::Display for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

impl std::str::FromStr for Containerd {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|version| text == version.short() || text == version.version())
            .ok_or_else(|| format!("there is no containerd {text} here, only 1.6, 1.7 and 2.1"))
    }
}

/// The cache that `devtool setup` fills.
pub fn cache() -> PathBuf {
    std::env::var_os("KUBECEPTION_CACHE").map_or_else(|| PathBuf::from("/var/cache/kubeception"), PathBuf::from)
}

/// A program of this repository, in its release build.
pub fn program(name: &str) -> Result<PathBuf> {
    present(release().join(name), "build")
}

/// An example of a crate of this repository, in its release build.
pub fn example(name: &str) -> Result<PathBuf> {
    present(release().join("examples").join(name), "bench")
}

/// A real program that configurations are held against.
pub fn go_program(name: &str) -> Result<PathBuf> {
    present(cache().join("tools/go/bin").join(name), "setup")
}

/// The conformance suite of the Container Runtime Interface.
pub fn critest() -> Result<PathBuf> {
    present(cache().join("tools/go/bin/critest"), "conformance")
}

/// Debian's registry of images.
pub fn registry() -> Result<PathBuf> {
    present(cache().join("registry/usr/bin/docker-registry"), "conformance")
}

/// What stands in for the programs of the suite's images.
pub fn stand_in() -> Result<PathBuf> {
    let program = std::env::current_exe()?.with_file_name("kubeception-stand-in");
    present(program, "conformance")
}

/// The disk with the agent.
pub fn agent_disk() -> Result<PathBuf> {
    present(release().join("agent.erofs"), "build")
}

/// The folder of guests; `reference` is in it.
pub fn guests() -> Result<PathBuf> {
    let guests = cache().join("guests");
    present(guests.join("reference/guest.toml"), "image")?;
    Ok(guests)
}

/// A program that is pinned and built from the Rust package registry.
pub fn tool(name: &str) -> Result<PathBuf> {
    present(cache().join("tools/bin").join(name), "setup")
}

/// The folder with `containerd`, `ctr` and the runc shim of one version.
pub fn containerd(version: Containerd) -> Result<PathBuf> {
    present(
        cache().join("containerd").join(version.version()).join("usr/bin"),
        "setup",
    )
}

pub fn runc() -> Result<PathBuf> {
    present(cache().join("containerd/common/usr/sbin/runc"), "setup")
}

pub fn cni_plugins() -> Result<PathBuf> {
    present(cache().join("containerd/common/usr/lib/cni"), "setup")
}

/// A root folder with Debian's busybox and the libraries it loads.
pub fn busybox_root() -> Result<PathBuf> {
    present(cache().join("busybox"), "setup")
}

/// Where nodes keep the templates of machines: they are good for further runs.
pub fn templates() -> PathBuf {
    cache().join("templates")
}

/// Where the logs of nodes are kept, after the node is gone, too.
pub fn logs() -> PathBuf {
    cache().join("logs")
}

fn release() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/x86_64-unknown-linux-gnu/release")
}

fn present(path: PathBuf, verb: &str) -> Result<PathBuf> {
    ensure!(
        path.exists(),
        "{} is not there; 'sudo ./devtool {verb}' makes it",
        path.display()
    );
    Ok(path)
}
