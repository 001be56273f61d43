//! Amounts of memory and disk as people write them: `4G`, `512M`, `12Gi`.

use std::{fmt, str::FromStr};

/// An amount in bytes, more than none. Units are powers of 1,024, with or without the `i` of IEC 80000-13 (`4G` and `4Gi`
/// are the same), as QEMU reads its `-m`; a number alone is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

/// A text that is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidSize {
    #[error("{0:?} is no size: a whole number with a unit is expected, such as 512M, 4G or 4Gi")]
    Form(String),
    #[error("{0:?} is no size: it has to be more than nothing, such as 512M or 4G")]
    Nothing(String),
    #[error("{0:?} is more than there can be: at most 16E fit, and far less is meant by a size such as 4G")]
    TooMuch(String),
}

/// The units, by the power of two that each stands for.
const UNITS: [(char, u32); 6] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50), ('E', 60)];

impl Size {
    /// So many mebibytes.
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// So many bytes, if any.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes == 0 { None } else { Some(Self(bytes)) }
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// In MiB; what is left of one is left out.
    pub const fn mib(self) -> u64 {
        self.0 >> 20
    }
}

impl FromStr for Size {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || InvalidSize::Form(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let mut unit = unit.chars();
        let shift = match (unit.next(), unit.next(), unit.next()) {
            (None, ..) => 0,
            (Some(letter), None | Some('i'), None) => {
                let letter = letter.to_ascii_uppercase();
                let unit = UNITS.iter().find(|(name, _)| *name == letter);
                unit.map(|(_, shift)| *shift).ok_or_else(form)?
            }
            _ => return Err(form()),
        };
        if number.is_empty() {
            return Err(form());
        }
        let too_much = || InvalidSize::TooMuch(text.to_owned());
        // Digits alone can only be too many.
        let number: u64 = number.parse().map_err(|_| too_much())?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err(InvalidSize::Nothing(text.to_owned())),
            Some(bytes) => Ok(Self(bytes)),
            None => Err(too_much()),
        }
    }
}

/// In the largest unit that leaves a whole number.
impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fitting = UNITS.iter().rev().find(|(_, shift)| self.0.trailing_zeros() >= *shift);
        match fitting {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("4G", 4 << 30)]
    #[case("4Gi", 4 << 30)]
    #[case("12g", 12 << 30)]
    #[case("512M", 512 << 20)]
    #[case("64Ki", 64 << 10)]
    #[case("2T", 2 << 40)]
    #[case("4096", 4096)]
    #[case("15E", 15 << 60)]
    fn sizes_are_powers_of_1024(#[case] text: &str, #[case] bytes: u64) {
        assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes);
    }

    #[rstest::rstest]
    #[case("", "is no size")]
    #[case("0", "more than nothing")]
    #[case("0G", "more than nothing")]
    #[case("-1", "is no size")]
    #[case("+1G", "is no size")]
    #[case("1e99", "is no size")]
    #[case("1.5G", "is no size")]
    #[case("4 G", "is no size")]
    #[case("4GB", "is no size")]
    #[case("4GiB", "is no size")]
    #[case("G", "is no size")]
    #[case("4X", "is no size")]
    #[case("0x10", "is no size")]
    #[case("4G,share=on", "is no size")]
    #[case("16E", "more than there can be")]
    #[case("99999999999999999999999", "more than there can be")]
    #[case("\u{664}G", "is no size")]
    fn what_is_no_size_is_refused_in_a_sentence(#[case] text: &str, #[case] expected: &str) {
        let error = text.parse::<Size>().unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("4G"), "{error}");
    }

    #[rstest::rstest]
    #[case(4 << 30, "4G")]
    #[case(1536 << 20, "1536M")]
    #[case(1000, "1000 bytes")]
    fn a_size_is_said_as_it_could_be_written(#[case] bytes: u64, #[case] expected: &str) {
        assert_eq!(Size(bytes).to_string(), expected);
    }
}
