//! What a container uses, from its cgroup: `Documentation/admin-guide/cgroup-v2.rst` of the kernel.

use std::{collections::HashMap, fs, io, path::Path};

use coreos_kvm_proto::agent::{IoEntry, StatsResponse};

/// Reads everything that the cgroup's controllers say; what a missing controller would say is 0.
pub(crate) fn read(directory: &Path) -> io::Result<StatsResponse> {
    // The one file that every cgroup has.
    fs::metadata(directory.join("cgroup.procs"))?;
    let text = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let number = |name: &str, none: u64| number(&text(name), none);
    let cpu = flat(&text("cpu.stat"));
    let of_cpu = |key: &str| cpu.get(key).copied().unwrap_or_default();
    Ok(StatsResponse {
        cpu_usage_us: of_cpu("usage_usec"),
        cpu_user_us: of_cpu("user_usec"),
        cpu_system_us: of_cpu("system_usec"),
        cpu_nr_periods: of_cpu("nr_periods"),
        cpu_nr_throttled: of_cpu("nr_throttled"),
        cpu_throttled_us: of_cpu("throttled_usec"),
        memory_usage: number("memory.current", 0),
        memory_limit: number("memory.max", u64::MAX),
        memory_stat: flat(&text("memory.stat")),
        memory_swap_usage: number("memory.swap.current", 0),
        memory_swap_limit: number("memory.swap.max", u64::MAX),
        memory_events: flat(&text("memory.events")),
        pids_current: number("pids.current", 0),
        pids_limit: number("pids.max", 0),
        io: io_entries(&text("io.stat")),
        ..Default::default()
    })
}

/// One number, or `max`, for which `none` stands.
fn number(text: &str, none: u64) -> u64 {
    match text.trim() {
        "max" => none,
        "" => 0,
        digits => digits.parse().unwrap_or_default(),
    }
}

/// Lines of a key and a number.
fn flat(text: &str) -> HashMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

/// Lines of `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N ...`.
fn io_entries(text: &str) -> Vec<IoEntry> {
    text.lines()
        .filter_map(|line| {
            let (device, rest) = line.split_once(' ')?;
            let (major, minor) = device.split_once(':')?;
            let values: HashMap<&str, u64> = rest
                .split(' ')
                .filter_map(|pair| pair.split_once('='))
                .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
                .collect();
            let of = |key: &str| values.get(key).copied().unwrap_or_default();
            Some(IoEntry {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                rbytes: of("rbytes"),
                wbytes: of("wbytes"),
                rios: of("rios"),
                wios: of("wios"),
                ..Default::default()
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_is_read_whole() {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("cgroup.procs", "1\n"),
            ("cpu.stat", "usage_usec 12\nuser_usec 7\nsystem_usec 5\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1024\nfile 2048\n"),
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n"),
        ] {
            fs::write(root.path().join(name), text).unwrap();
        }
        let stats = read(root.path()).unwrap();
        assert_eq!((stats.cpu_usage_us, stats.cpu_user_us, stats.cpu_system_us), (12, 7, 5));
        assert_eq!(
            (stats.memory_usage, stats.memory_limit, stats.memory_stat["file"]),
            (4096, u64::MAX, 2048)
        );
        assert_eq!((stats.pids_current, stats.pids_limit), (3, 0));
        assert_eq!((stats.io[0].major, stats.io[0].wios), (254, 4));
    }

    #[test]
    fn a_cgroup_that_is_gone_is_an_error() {
        assert!(read(Path::new("/nonexistent")).is_err());
    }
}
