//! The host's processor, by the first of /proc/cpuinfo: proc_cpuinfo(5).

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
};

const PROCESSORS: &str = "/proc/cpuinfo";
/// What the host's kernel would have for a clock. Of a counter that it has found to be unsteady, or not the same for all processors, it would not.
const CLOCKS: &str = "/sys/devices/system/clocksource/clocksource0/available_clocksource";

/// What a guest may depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processor {
    /// What it is and what it can do, which a guest under KVM sees.
    pub identity: String,
    /// The frequency of the time stamp counter, in MHz, where it runs at one frequency, also while the processor rests, and can be a clock.
    pub counter_mhz: Option<u32>,
}

impl Processor {
    /// This host's.
    ///
    /// # Errors
    /// When /proc/cpuinfo cannot be read.
    pub fn of_the_host() -> io::Result<Self> {
        let mut lines = Vec::new();
        // Of the first processor alone; the whole is long where there are many.
        for line in BufReader::new(File::open(PROCESSORS)?).lines() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        let clocks = std::fs::read_to_string(CLOCKS).unwrap_or_default();
        Ok(Self::parse(&lines, &clocks))
    }

    fn parse(lines: &[String], clocks: &str) -> Self {
        const IDENTITY: [&str; 6] = ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"];
        let name = |line: &str| line.split(':').next().unwrap_or_default().trim().to_owned();
        let identity = lines.iter().filter(|line| IDENTITY.contains(&name(line).as_str()));
        let value = |wanted: &str| {
            let line = lines.iter().find(|line| name(line) == wanted)?;
            Some(line.split_once(':')?.1.trim())
        };
        let has = |flag: &str| value("flags").is_some_and(|flags| is_word_of(flag, flags));
        let steady = has("constant_tsc") && has("nonstop_tsc") && is_word_of("tsc", clocks);
        // Two loops for each count.
        let loops: Option<f64> = value("bogomips").and_then(|value| value.parse().ok());
        Self {
            identity: identity.cloned().collect::<Vec<_>>().join("\n"),
            counter_mhz: loops.filter(|_| steady).map(|loops| (loops / 2.0).round() as u32),
        }
    }
}

fn is_word_of(word: &str, text: &str) -> bool {
    text.split_ascii_whitespace().any(|one| one == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(flags: &str, clocks: &str) -> Processor {
        let text =
            format!("processor\t: 0\nmodel\t\t: 6\ncpu MHz\t\t: 1800.000\nflags\t\t: {flags}\nbogomips\t: 4199.98");
        Processor::parse(&text.lines().map(str::to_owned).collect::<Vec<_>>(), clocks)
    }

    #[rstest::rstest]
    #[case::steady("fpu constant_tsc nonstop_tsc", "kvm-clock tsc acpi_pm", Some(2100))]
    #[case::not_trusted("fpu constant_tsc nonstop_tsc", "hpet acpi_pm", None)]
    #[case::may_stop("fpu constant_tsc", "tsc", None)]
    #[case::may_change("fpu nonstop_tsc", "tsc", None)]
    #[case::none("fpu tsc", "tsc", None)]
    fn a_counter_is_a_clock_when_it_never_changes_its_pace(
        #[case] flags: &str,
        #[case] clocks: &str,
        #[case] expected: Option<u32>,
    ) {
        assert_eq!(processor(flags, clocks).counter_mhz, expected);
    }

    #[test]
    fn what_changes_from_moment_to_moment_is_no_part_of_the_identity() {
        assert_eq!(processor("fpu tsc", "tsc").identity, "model\t\t: 6\nflags\t\t: fpu tsc");
    }

    #[test]
    fn the_hosts_own_can_be_read() {
        assert!(!Processor::of_the_host().unwrap().identity.is_empty());
    }
}
