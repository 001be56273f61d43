//! What containers may use together: the size that their machine is to have.

use coreos_kvm_launcher::vm::MachineSize;
use oci_spec::runtime::{LinuxResources, Spec};

/// A container's limits; none where it has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    /// In thousandths of a processor.
    millicpus: Option<u64>,
    /// In bytes.
    memory: Option<u64>,
}

impl Limits {
    /// Those that a container is created with.
    pub(crate) fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| Self::default().changed(resources))
    }

    /// Those of a whole pod, as a kubelet tells them: quota and period of its processors in µs, memory in bytes. What is not above zero
    /// is not limited.
    pub(crate) fn of_pod(cpu_quota: i64, cpu_period: i64, memory: i64) -> Self {
        let above_zero = |limit: i64| u64::try_from(limit).ok().filter(|limit| *limit > 0);
        let cpu = above_zero(cpu_quota).zip(above_zero(cpu_period));
        Self {
            millicpus: cpu.map(|(quota, period)| millicpus(quota, period)),
            memory: above_zero(memory),
        }
    }

    /// These after a change, which leaves alone what it does not speak of. Anything below zero means that there is no limit.
    pub(crate) fn changed(self, resources: &LinuxResources) -> Self {
        let mut limits = self;
        if let Some(cpu) = resources.cpu() {
            let period = cpu.period().filter(|period| *period > 0).unwrap_or(CFS_PERIOD);
            if let Some(quota) = cpu.quota() {
                let quota = u64::try_from(quota).ok().filter(|quota| *quota > 0);
                limits.millicpus = quota.map(|quota| millicpus(quota, period));
            }
        }
        if let Some(limit) = resources.memory().as_ref().and_then(|memory| memory.limit()) {
            limits.memory = u64::try_from(limit).ok().filter(|limit| *limit > 0);
        }
        limits
    }

    /// The size of a machine for containers of these limits whose guest needs `overhead_mib` beside them. Zero of what none of
    /// them limits, which is less than any machine has.
    pub(crate) fn size(all: impl IntoIterator<Item = Self>, overhead_mib: u64) -> MachineSize {
        let (mut millicpus, mut memory) = (0_u64, 0_u64);
        for limits in all {
            millicpus = millicpus.saturating_add(limits.millicpus.unwrap_or(0));
            memory = memory.saturating_add(limits.memory.unwrap_or(0));
        }
        MachineSize {
            vcpus: u32::try_from(millicpus.div_ceil(1000)).unwrap_or(u32::MAX),
            memory_mib: match memory {
                0 => 0,
                memory => memory.div_ceil(1 << 20).saturating_add(overhead_mib),
            },
        }
    }
}

fn millicpus(quota: u64, period: u64) -> u64 {
    quota.saturating_mul(1000).div_ceil(period)
}

/// The size of a machine's memory that holds so many MiB and that other machines have as well, for those of one size are clones of
/// one template: what it has more costs nothing as long as nobody uses it. Not above `most_mib`, unless that is what is wanted.
pub(crate) fn class_mib(wanted_mib: u64, most_mib: u64) -> u64 {
    const STEPS: [(u64, u64); 3] = [(1 << 10, 128), (4 << 10, 512), (16 << 10, 1 << 10)];
    let step = STEPS.iter().find(|(until, _)| wanted_mib <= *until);
    let class = wanted_mib.next_multiple_of(step.map_or(4 << 10, |(_, step)| *step));
    class.min(most_mib).max(wanted_mib)
}

/// What a quota is of where nobody says: 100 ms in µs, `default_cfs_period` in kernel/sched/core.c.
const CFS_PERIOD: u64 = 100_000;

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn limits(resources: Value) -> Limits {
        Limits::default().changed(&serde_json::from_value(resources).unwrap())
    }

    #[test]
    fn a_machine_has_what_its_containers_may_use_together_and_what_its_guest_needs() {
        let one = limits(json!({"cpu": {"quota": 150_000, "period": 100_000}, "memory": {"limit": 300 << 20}}));
        let other = limits(json!({"cpu": {"quota": 60_000}, "memory": {"limit": (100 << 20) + 1}}));
        let size = Limits::size([one, other, Limits::default()], 128);
        assert_eq!((size.vcpus, size.memory_mib), (3, 300 + 101 + 128));
        let size = Limits::size([Limits::default()], 128);
        assert_eq!((size.vcpus, size.memory_mib), (0, 0));
    }

    #[rstest::rstest]
    #[case::small(1, 128)]
    #[case::exact(384, 384)]
    #[case::between(385, 512)]
    #[case::first_of_the_next_step(1025, 1536)]
    #[case::large(4097, 5120)]
    #[case::very_large(16_385, 20_480)]
    #[case::not_more_than_is_allowed(29_000, 30_000)]
    #[case::what_is_not_allowed_is_refused_elsewhere(31_000, 31_000)]
    fn machines_of_about_one_size_have_one_size(#[case] wanted: u64, #[case] size: u64) {
        assert_eq!(class_mib(wanted, 30_000), size);
    }

    #[test]
    fn a_change_leaves_alone_what_it_does_not_speak_of() {
        let before = limits(json!({"cpu": {"quota": 50_000, "period": 100_000}, "memory": {"limit": 1 << 20}}));
        let change = |resources: Value| before.changed(&serde_json::from_value(resources).unwrap());
        assert_eq!(change(json!({"cpu": {"shares": 10}})), before);
        assert_eq!(change(json!({"memory": {"limit": -1}})).memory, None);
        assert_eq!(change(json!({"cpu": {"quota": -1}})).millicpus, None);
        assert_eq!(change(json!({"cpu": {"quota": 25_000}})).millicpus, Some(250));
        assert_eq!(
            change(json!({"cpu": {"quota": i64::MAX, "period": 1}})).millicpus,
            Some(u64::MAX)
        );
    }
}
