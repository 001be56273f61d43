//! How the merged configuration reaches the guest's Ignition. The way that every guest knows is fw_cfg, which its kernel reads
//! in steps of 4,096 bytes, each from the entry's beginning: 256 KiB cost some two thousand times 4 KiB, 1 MiB sixteen times
//! that. Longer ones travel on a disk where the guest can read that, else compressed.

use std::io::Write;

use base64::{Engine, engine::general_purpose::STANDARD};
use flate2::{Compression, write::GzEncoder};
use serde::Deserialize;
use serde_json::json;

use crate::guest::Guest;

/// Bytes that fw_cfg carries in bearable time.
pub const FW_CFG_MAX: usize = 256 * 1024;
/// Bytes of a configuration on a disk. Ignition holds it in memory several times over.
pub const DISK_MAX: usize = 16 * 1024 * 1024;

/// What a disk is read in, in bytes.
const SECTOR: usize = 512;

/// A configuration on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Carriage {
    /// As the guest's fw_cfg entry.
    FwCfg(String),
    /// As the fw_cfg entry: a small configuration that Ignition replaces by the compressed one in it (`ignition.config.replace`
    /// with `compression`, specification 3.1 and later).
    FwCfgCompressed(String),
    /// On a read-only disk: text that fills whole sectors.
    Disk { serial: String, content: String },
}

/// A configuration that is too long for every way into the guest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CarriageError {
    #[error(
        "the Ignition configuration has {size} bytes with what the guest needs added; at most {DISK_MAX} are possible: \
         leave out large files, and have a unit fetch them"
    )]
    Long { size: usize },
    #[error(
        "the Ignition configuration has {size} bytes with what the guest needs added, and the guest {guest:?} takes \
         {FW_CFG_MAX}{even}: leave out large files, and have a unit fetch them; or, where the guest's Ignition can read a \
         disk, name its serial number as `ignition_disk` in guest.toml"
    )]
    FwCfg {
        size: usize,
        guest: String,
        even: &'static str,
    },
}

/// Decides how `json`, the merged configuration, reaches `guest`.
///
/// # Errors
/// When it is too long for it.
pub fn carry(json: String, guest: &Guest) -> Result<Carriage, CarriageError> {
    let size = json.len();
    if size <= FW_CFG_MAX {
        return Ok(Carriage::FwCfg(json));
    }
    if size > DISK_MAX {
        return Err(CarriageError::Long { size });
    }
    if let Some(serial) = &guest.ignition_disk {
        let serial = serial.clone();
        let content = padded(json);
        return Ok(Carriage::Disk { serial, content });
    }
    let too_long = |even| CarriageError::FwCfg {
        size,
        guest: guest.name.clone(),
        even,
    };
    let version = version(&json).filter(|version| knows_compression(version));
    let version = version.ok_or_else(|| too_long(" of its version"))?;
    match wrapped(&json, &version) {
        Some(wrapped) if wrapped.len() <= FW_CFG_MAX => Ok(Carriage::FwCfgCompressed(wrapped)),
        _ => Err(too_long(" even compressed")),
    }
}

/// JSON may end with any white space: RFC 8259, section 2.
fn padded(mut json: String) -> String {
    let length = json.len().next_multiple_of(SECTOR);
    json.extend(std::iter::repeat_n(' ', length - json.len()));
    json
}

fn version(json: &str) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        ignition: Ignition,
    }
    #[derive(Deserialize)]
    struct Ignition {
        version: String,
    }
    let config: Config = serde_json::from_str(json).ok()?;
    Some(config.ignition.version)
}

/// Resources have `compression` in configurations since 3.1.0.
fn knows_compression(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(3), Some(1))
}

/// Same text, same bytes: gzip's time stamp is left out.
fn wrapped(json: &str, version: &str) -> Option<String> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    // Into memory, which does not fail.
    encoder.write_all(json.as_bytes()).ok()?;
    let source = format!("data:;base64,{}", STANDARD.encode(encoder.finish().ok()?));
    let replace = json!({ "source": source, "compression": "gzip" });
    Some(json!({ "ignition": { "version": version, "config": { "replace": replace } } }).to_string())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;
    use serde_json::Value;

    use super::*;
    use crate::machine::tests::machine;

    fn guest(disk: Option<&str>) -> Guest {
        Guest {
            ignition_disk: disk.map(str::to_owned),
            ..machine().guest
        }
    }

    /// A configuration of exactly `size` bytes.
    fn config(version: &str, size: usize, byte: impl Fn(usize) -> char) -> String {
        let empty = json!({ "ignition": { "version": version }, "x": "" }).to_string();
        let filling: String = (empty.len()..size).map(byte).collect();
        let json = empty.replace("\"x\":\"\"", &format!("\"x\":\"{filling}\""));
        assert_eq!(json.len(), size);
        json
    }

    fn letters(_: usize) -> char {
        'x'
    }

    /// Letters that do not compress to less than a few bits each.
    fn noise(number: usize) -> char {
        let mut bits = number as u64 + 1;
        for _ in 0..3 {
            bits = bits.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            bits ^= bits >> 29;
        }
        char::from(b'A' + (bits % 58).min(25) as u8 + if bits & (1 << 40) == 0 { 0 } else { 32 })
    }

    #[test]
    fn what_is_short_goes_by_fw_cfg() {
        let json = config("3.3.0", FW_CFG_MAX, letters);
        assert_eq!(
            carry(json.clone(), &guest(Some("disk"))),
            Ok(Carriage::FwCfg(json.clone()))
        );
        assert_eq!(carry(json.clone(), &guest(None)), Ok(Carriage::FwCfg(json)));
    }

    #[test]
    fn what_is_long_goes_on_a_disk_of_whole_sectors() {
        let json = config("3.3.0", FW_CFG_MAX + 1, letters);
        let Ok(Carriage::Disk { serial, content }) = carry(json.clone(), &guest(Some("disk"))) else {
            panic!("it has a disk")
        };
        assert_eq!((serial.as_str(), content.len() % SECTOR), ("disk", 0));
        assert_eq!(content.trim_end(), json);
        assert!(content.len() < json.len() + SECTOR);
        serde_json::from_str::<Value>(&content).unwrap();
    }

    #[test]
    fn without_a_disk_it_is_compressed() {
        let json = config("3.1.0", 1024 * 1024, letters);
        let Ok(Carriage::FwCfgCompressed(wrapped)) = carry(json.clone(), &guest(None)) else {
            panic!("it compresses well")
        };
        let wrapped: Value = serde_json::from_str(&wrapped).unwrap();
        assert_eq!(wrapped["ignition"]["version"], "3.1.0");
        let replace = &wrapped["ignition"]["config"]["replace"];
        assert_eq!(replace["compression"], "gzip");
        let source = replace["source"]
            .as_str()
            .unwrap()
            .strip_prefix("data:;base64,")
            .unwrap();
        let mut text = String::new();
        GzDecoder::new(STANDARD.decode(source).unwrap().as_slice())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, json);
    }

    #[rstest::rstest]
    #[case::no_compression_in_this_version("3.0.0", 300 * 1024, letters as fn(usize) -> char, None, "takes 262144 of its version")]
    #[case::nor_in_this("2.3.0", 300 * 1024, letters as fn(usize) -> char, None, "`ignition_disk` in guest.toml")]
    #[case::noise("3.3.0", 1024 * 1024, noise as fn(usize) -> char, None, "takes 262144 even compressed")]
    #[case::a_disk_has_an_end("3.3.0", DISK_MAX + 1, letters as fn(usize) -> char, Some("disk"), "16777217 bytes")]
    fn what_is_too_long_is_told_before_the_machine_starts(
        #[case] version: &str,
        #[case] size: usize,
        #[case] byte: fn(usize) -> char,
        #[case] disk: Option<&str>,
        #[case] expected: &str,
    ) {
        let error = carry(config(version, size, byte), &guest(disk))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(expected) && error.contains("leave out large files"),
            "{error}"
        );
    }
}
