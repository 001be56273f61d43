//! Numbers with units: sizes of partitions (`10GiB`) and lengths of time (`1h30m`).

/// Longest that Go's `time.Duration` holds, in nanoseconds; the same number of bytes bounds a size.
const MAX: f64 = 9_223_372_036_854_775_807.0;

/// Bytes in a sector of a partition table.
const SECTOR: f64 = 512.0;

const NANOSECONDS: &[(&str, f64)] = &[
    ("ns", 1.0),
    ("us", 1e3),
    ("µs", 1e3),
    ("μs", 1e3),
    ("ms", 1e6),
    ("s", 1e9),
    ("m", 60e9),
    ("h", 3600e9),
];

/// Each of these is a power of 1024, with `iB` and with `B` alike.
const PREFIXES: [&str; 6] = ["K", "M", "G", "T", "P", "E"];

/// Sectors of 512 bytes that a size takes, as `100MB` or `1GiB512MiB`, both in powers of 1024; 0 for an empty text.
pub(super) fn sectors(text: &str) -> Option<i64> {
    if text.is_empty() {
        return Some(0);
    }
    let bytes = ["iB", "B"].into_iter().find_map(|suffix| {
        let mut units = vec![("B".to_owned(), 1.0)];
        let mut factor = 1.0;
        for prefix in PREFIXES {
            factor *= 1024.0;
            units.push((format!("{prefix}{suffix}"), factor));
        }
        let units: Vec<_> = units.iter().map(|(name, factor)| (name.as_str(), *factor)).collect();
        parse(text, &units)
    })?;
    // A part of a byte is none, a part of a sector is one. Below 2^63, as `parse` sees to.
    (bytes >= 0.0).then(|| (bytes.trunc() / SECTOR).ceil() as i64)
}

/// Whether the text is a length of time as Go writes it (`time.ParseDuration`).
pub(super) fn is_duration(text: &str) -> bool {
    parse(text, NANOSECONDS).is_some()
}

/// The sum of numbers with units; None if the text is none.
fn parse(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let (sign, mut rest) = match text.strip_prefix('-') {
        Some(rest) => (-1.0, rest),
        None => (1.0, text.strip_prefix('+').unwrap_or(text)),
    };
    if rest == "0" {
        return Some(0.0);
    }
    if rest.is_empty() {
        return None;
    }
    let mut sum = 0.0;
    let is_number = |c: char| c.is_ascii_digit() || c == '.';
    while !rest.is_empty() {
        let (number, tail) = rest.split_at(rest.find(|c| !is_number(c)).unwrap_or(rest.len()));
        let (unit, tail) = tail.split_at(tail.find(is_number).unwrap_or(tail.len()));
        let factor = units.iter().find(|(name, _)| *name == unit)?.1;
        let number: f64 = number.parse().ok()?;
        sum += number * factor;
        if sum >= MAX {
            return None;
        }
        rest = tail;
    }
    Some(sign * sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("", Some(0))]
    #[case("0", Some(0))]
    #[case("512B", Some(1))]
    #[case("513B", Some(2))]
    #[case("100MB", Some(204_800))]
    #[case("100MiB", Some(204_800))]
    #[case("1.5GiB", Some(3_145_728))]
    #[case("1GiB512MiB", Some(3_145_728))]
    #[case(".5KB", Some(1))]
    #[case("1GiB512MB", None)]
    #[case("100", None)]
    #[case("100M", None)]
    #[case("1..5GB", None)]
    #[case("-1GB", None)]
    #[case("GB", None)]
    #[case("9EB", None)]
    fn sizes(#[case] text: &str, #[case] expected: Option<i64>) {
        assert_eq!(sectors(text), expected);
    }

    #[rstest::rstest]
    #[case("2h", true)]
    #[case("1h30m", true)]
    #[case("1.5h", true)]
    #[case("-1h", true)]
    #[case("2", false)]
    #[case("2 h", false)]
    #[case("1d", false)]
    fn durations(#[case] text: &str, #[case] expected: bool) {
        assert_eq!(is_duration(text), expected);
    }
}
