//! Where `devtool setup` puts the real programs.

use std::path::PathBuf;

/// The real libraries behind one program, and the real programs of the same versions.
pub(crate) fn go_program(name: &str) -> PathBuf {
    present(cache().join("tools/go/bin").join(name))
}

/// Debian's `ignition`, as the reference guest runs it.
pub(crate) fn ignition() -> PathBuf {
    present(cache().join("ignition/usr/lib/dracut/modules.d/30ignition/ignition"))
}

/// Debian's `ignition-validate`.
pub(crate) fn ignition_validate() -> PathBuf {
    present(cache().join("ignition/usr/bin/ignition-validate"))
}

fn cache() -> PathBuf {
    std::env::var_os("KUBECEPTION_CACHE").map_or_else(|| PathBuf::from("/var/cache/kubeception"), PathBuf::from)
}

/// A trial that lacks its judge fails: one that passes without it would say nothing.
fn present(path: PathBuf) -> PathBuf {
    assert!(
        path.is_file(),
        "{} is not there; do: sudo ./devtool setup",
        path.display()
    );
    path
}
