//! Statistics as containerd's metrics want them: `io.containerd.cgroups.v2.Metrics`.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use coreos_kvm_proto::agent::StatsResponse;
use protobuf::{Message, MessageField, well_known_types::any::Any};

use crate::error::ShimError;

const TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// # Errors
/// When the message cannot be written.
pub(crate) fn any(metrics: &Metrics) -> Result<Any, ShimError> {
    Ok(Any {
        type_url: TYPE.to_owned(),
        value: metrics
            .write_to_bytes()
            .map_err(ShimError::while_doing("writing the statistics"))?,
        ..Default::default()
    })
}

/// A container's, as its cgroup in the guest has them.
pub(crate) fn of_container(stats: StatsResponse) -> Metrics {
    let stat = |name: &str| stats.memory_stat.get(name).copied().unwrap_or_default();
    let event = |name: &str| stats.memory_events.get(name).copied().unwrap_or_default();
    let memory = MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        usage: stats.memory_usage,
        usage_limit: stats.memory_limit,
        swap_usage: stats.memory_swap_usage,
        swap_limit: stats.memory_swap_limit,
        ..Default::default()
    };
    let events = MemoryEvents {
        low: event("low"),
        high: event("high"),
        max: event("max"),
        oom: event("oom"),
        oom_kill: event("oom_kill"),
        ..Default::default()
    };
    let io = stats.io.iter().map(|entry| IOEntry {
        major: entry.major,
        minor: entry.minor,
        rbytes: entry.rbytes,
        wbytes: entry.wbytes,
        rios: entry.rios,
        wios: entry.wios,
        ..Default::default()
    });
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            nr_periods: stats.cpu_nr_periods,
            nr_throttled: stats.cpu_nr_throttled,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        io: MessageField::some(IOStat {
            usage: io.collect(),
            ..Default::default()
        }),
        memory: MessageField::some(memory),
        memory_events: MessageField::some(events),
        ..Default::default()
    }
}

/// A machine's, from the outside: time and memory of QEMU's process (proc_pid_stat(5), fields 14, 15, 20 and 24).
///
/// # Errors
/// When the process is gone.
pub(crate) fn of_process(pid: u32) -> Result<Metrics, ShimError> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).map_err(ShimError::while_doing(format!("reading {path}")))?;
    // SAFETY: sysconf(3) only answers.
    let (ticks, page) = unsafe { (libc::sysconf(libc::_SC_CLK_TCK), libc::sysconf(libc::_SC_PAGESIZE)) };
    let (ticks, page) = (
        u64::try_from(ticks).unwrap_or(100).max(1),
        u64::try_from(page).unwrap_or(4096),
    );
    // The name, in parentheses, may hold anything; behind it comes field 3.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_ascii_whitespace()
        .collect();
    let field = |number: usize| {
        fields
            .get(number - 3)
            .and_then(|text| text.parse::<u64>().ok())
            .unwrap_or_default()
    };
    let microseconds = |field: u64| field * (1_000_000 / ticks);
    let (user, system) = (microseconds(field(14)), microseconds(field(15)));
    let resident = field(24) * page;
    Ok(Metrics {
        pids: MessageField::some(PidsStat {
            current: field(20),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: user + system,
            user_usec: user,
            system_usec: system,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            usage: resident,
            anon: resident,
            ..Default::default()
        }),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_measured_by_its_own_numbers() {
        let metrics = of_process(std::process::id()).unwrap();
        assert!(metrics.memory.usage > 100_000 && metrics.memory.usage < 1 << 32);
        assert!(metrics.pids.current >= 1);
        assert_eq!(any(&metrics).unwrap().type_url, TYPE);
    }
}
