//! What makes a guest this pod's: its name, its clock, its settings; and what it says of itself.

use std::{
    collections::HashMap,
    path::{Component, Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use nix::{
    sys::time::{TimeSpec, TimeValLike},
    time::{ClockId, clock_settime},
};

use crate::error::AgentError;

/// Clocks that differ by less are left: a call takes that long.
const CLOCK_SLACK: Duration = Duration::from_millis(20);

/// `uname -r`.
pub(crate) fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// PRETTY_NAME of os-release(5).
pub(crate) fn os_name() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches(['"', '\'']).to_owned()
}

/// Sets the wall clock; 0 leaves it.
pub(crate) fn set_clock(host_ns: i64) -> Result<(), AgentError> {
    let Ok(host) = u64::try_from(host_ns) else {
        return Err(AgentError::InvalidArgument(format!("{host_ns} is no time")));
    };
    let ours = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if host == 0 || ours.abs_diff(Duration::from_nanos(host)) < CLOCK_SLACK {
        return Ok(());
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::nanoseconds(host_ns))
        .map_err(AgentError::failed("setting the clock failed"))
}

/// Sets the guest's name; an empty one leaves it.
pub(crate) fn set_hostname(name: &str) -> Result<(), AgentError> {
    if name.is_empty() {
        return Ok(());
    }
    nix::unistd::sethostname(name).map_err(AgentError::failed("setting the hostname failed"))
}

/// Sets the pod's sysctls, named with dots or slashes as by sysctl(8).
pub(crate) fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<(), AgentError> {
    for (name, value) in sysctls {
        let path = sysctl_path(name).ok_or_else(|| AgentError::InvalidArgument(format!("{name:?} is no sysctl")))?;
        std::fs::write(&path, value).map_err(AgentError::failed(format!("setting the sysctl {name} failed")))?;
    }
    Ok(())
}

fn sysctl_path(name: &str) -> Option<PathBuf> {
    // With a slash first, dots are part of the names.
    let separator = name.find(['.', '/']).map(|at| name.as_bytes()[at]);
    let relative = if separator == Some(b'.') {
        name.replace('.', "/")
    } else {
        name.to_owned()
    };
    let relative = Path::new(&relative);
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
    (inside && relative.components().count() > 1).then(|| Path::new("/proc/sys").join(relative))
}

/// Ends the guest in order: systemd stops what runs and unmounts.
pub(crate) fn power_off() -> Result<(), AgentError> {
    Command::new("systemctl")
        .args(["--no-block", "poweroff"])
        .spawn()
        .map(drop)
        .map_err(AgentError::failed("asking systemd to power off failed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_are_found_and_stay_in_their_folder() {
        let path = |name| sysctl_path(name).map(|path| path.to_string_lossy().into_owned());
        assert_eq!(
            path("kernel.shm_rmid_forced").unwrap(),
            "/proc/sys/kernel/shm_rmid_forced"
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        for name in ["", "kernel", "../../etc/passwd", "/etc/passwd", "net/../../x"] {
            assert_eq!(path(name), None, "{name}");
        }
    }
}
