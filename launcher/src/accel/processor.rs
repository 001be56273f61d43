//! The host's processor, by the first of /proc/cpuinfo: proc_cpuinfo(5).

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::Path,
};

const PATH: &str = "/proc/cpuinfo";

/// What a guest may depend on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processor {
    /// What it is and what it can do. A guest under KVM sees that, and one under TCG has measured how fast the counter runs.
    pub identity: String,
    /// Whether the time stamp counter runs at one frequency, also while the processor rests, so that it can be a clock.
    pub steady_counter: bool,
}

impl Processor {
    /// This host's.
    ///
    /// # Errors
    /// When /proc/cpuinfo cannot be read.
    pub fn of_the_host() -> io::Result<Self> {
        let mut lines = Vec::new();
        // The first processor alone: for each further one the kernel asks that one how fast it runs.
        for line in BufReader::new(File::open(Path::new(PATH))?).lines() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            lines.push(line);
        }
        Ok(Self::parse(&lines))
    }

    fn parse(lines: &[String]) -> Self {
        const IDENTITY: [&str; 7] = [
            "vendor_id",
            "cpu family",
            "model",
            "model name",
            "stepping",
            "microcode",
            "flags",
        ];
        let name = |line: &str| line.split(':').next().unwrap_or_default().trim().to_owned();
        let identity = lines.iter().filter(|line| IDENTITY.contains(&name(line).as_str()));
        let flags = lines.iter().find(|line| name(line) == "flags");
        let has = |flag| flags.is_some_and(|flags| flags.split_ascii_whitespace().any(|one| one == flag));
        Self {
            identity: identity.cloned().collect::<Vec<_>>().join("\n"),
            steady_counter: has("constant_tsc") && has("nonstop_tsc"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn processor(flags: &str) -> Processor {
        let text = format!("processor\t: 0\nmodel name\t: Some\ncpu MHz\t\t: 2100.000\nflags\t\t: {flags}");
        Processor::parse(&text.lines().map(str::to_owned).collect::<Vec<_>>())
    }

    #[rstest::rstest]
    #[case::both("fpu constant_tsc nonstop_tsc", true)]
    #[case::may_stop("fpu constant_tsc", false)]
    #[case::may_change("fpu nonstop_tsc", false)]
    #[case::none("fpu tsc", false)]
    fn a_counter_is_a_clock_when_it_never_changes_its_pace(#[case] flags: &str, #[case] steady: bool) {
        assert_eq!(processor(flags).steady_counter, steady);
    }

    #[test]
    fn what_changes_from_moment_to_moment_is_no_part_of_the_identity() {
        assert_eq!(processor("fpu tsc").identity, "model name\t: Some\nflags\t\t: fpu tsc");
    }

    #[test]
    fn the_hosts_own_can_be_read() {
        assert!(!Processor::of_the_host().unwrap().identity.is_empty());
    }
}
