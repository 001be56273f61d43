//! gzip (RFC 1952). A small gzip can stand for any amount, and a text of aliases too, so whatever packs or unpacks does so for
//! one configuration, and has a bound for all of it together.

use std::io::{self, Read};

use flate2::{Compress, Compression, Crc, FlushCompress, Status, read::MultiGzDecoder};

/// Most bytes that are unpacked for one configuration.
pub(crate) const UNPACKED_MAX: usize = 16 << 20;

/// Most bytes that are packed for one configuration; what comes after them stays as it is.
const PACKED_MAX: usize = 16 << 20;

/// How many of them are packed as well as can be, which takes up to a second for some texts; the others are packed in haste.
const PACKED_WELL: usize = 2 << 20;

/// Deflate; no name and no time, so that the same bytes give the same bytes; how hard it tried; written by no known system.
const fn header(effort: u8) -> [u8; 10] {
    [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, effort, 0xff]
}
const HEADER: usize = header(0).len();
const WELL: u8 = 2;
const IN_HASTE: u8 = 4;

/// The checksum and the length.
const TRAILER: usize = 8;
/// The shortest that deflate makes of anything.
const DEFLATED_MIN: usize = 2;

/// Compresses the contents of one configuration.
#[derive(Debug)]
pub(crate) struct Packer {
    /// Its tables are large: one for a thousand small files.
    deflate: Option<(u8, Compress)>,
    /// Bytes that may still be packed.
    left: usize,
}

impl Default for Packer {
    fn default() -> Self {
        Self {
            deflate: None,
            left: PACKED_MAX,
        }
    }
}

impl Packer {
    /// The bytes compressed, if that takes at most `most` bytes.
    pub(crate) fn pack(&mut self, bytes: &[u8], most: usize) -> Option<Vec<u8>> {
        if most < HEADER + DEFLATED_MIN + TRAILER {
            return None;
        }
        self.left = self.left.checked_sub(bytes.len())?;
        let (effort, level) = if PACKED_MAX - self.left <= PACKED_WELL {
            (WELL, Compression::best())
        } else {
            (IN_HASTE, Compression::fast())
        };
        // Once there is haste, there always is.
        self.deflate = self.deflate.take().filter(|(used, _)| *used == effort);
        let (_, deflate) = self
            .deflate
            .get_or_insert_with(|| (effort, Compress::new(level, false)));
        deflate.reset();
        let mut packed = Vec::with_capacity(most);
        packed.extend(header(effort));
        // It writes no more than there is room for, and does not end then.
        match deflate.compress_vec(bytes, &mut packed, FlushCompress::Finish) {
            Ok(Status::StreamEnd) => {}
            _ => return None,
        }
        let mut sum = Crc::new();
        sum.update(bytes);
        packed.extend(sum.sum().to_le_bytes());
        packed.extend(sum.amount().to_le_bytes());
        (packed.len() <= most).then_some(packed)
    }
}

/// Decompresses the contents of one configuration.
#[derive(Debug)]
pub(crate) struct Unpacker {
    /// Bytes that may still be unpacked.
    left: usize,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self { left: UNPACKED_MAX }
    }
}

/// Why something was not unpacked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Packed {
    /// It is no gzip, or a broken one.
    Broken,
    /// It would be more than [`UNPACKED_MAX`], with what was unpacked before.
    TooMuch,
}

impl Unpacker {
    /// What was compressed.
    pub(crate) fn unpack(&mut self, packed: &[u8]) -> Result<Vec<u8>, Packed> {
        let mut bytes = Vec::new();
        self.read(packed, |reader| io::copy(reader, &mut bytes))?;
        Ok(bytes)
    }

    /// Whether something can be unpacked.
    pub(crate) fn check(&mut self, packed: &[u8]) -> Result<(), Packed> {
        self.read(packed, |reader| io::copy(reader, &mut io::sink()))
    }

    fn read(&mut self, packed: &[u8], read: impl FnOnce(&mut dyn Read) -> io::Result<u64>) -> Result<(), Packed> {
        if self.left == 0 {
            return Err(Packed::TooMuch);
        }
        let left = u64::try_from(self.left).unwrap_or(u64::MAX);
        let mut reader = MultiGzDecoder::new(packed).take(left + 1);
        let outcome = read(&mut reader);
        // What was unpacked in vain was work, too.
        let rest = reader.limit().saturating_sub(1);
        self.left = usize::try_from(rest).unwrap_or_default();
        match outcome {
            Err(_) => Err(Packed::Broken),
            Ok(length) if length > left => Err(Packed::TooMuch),
            Ok(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked() {
        let mut packer = Packer::default();
        for bytes in [b"".to_vec(), b"a".repeat(1000), (0..=255).collect(), b"a".repeat(1000)] {
            let packed = packer.pack(&bytes, 1000).unwrap();
            assert_eq!(Unpacker::default().unpack(&packed).unwrap(), bytes);
            assert_eq!(packer.pack(&bytes, packed.len()), Some(packed.clone()));
            assert_eq!(packer.pack(&bytes, packed.len() - 1), None);
        }
    }

    #[test]
    fn what_is_packed_has_a_bound() {
        let mut packer = Packer::default();
        assert!(packer.pack(&vec![0; PACKED_MAX], PACKED_MAX).is_some());
        assert_eq!(packer.pack(b"\n", 100), None);
        let mut packer = Packer::default();
        for _ in 0..5 {
            let packed = packer.pack(&vec![0; 1 << 20], 1 << 20).unwrap();
            assert_eq!(Unpacker::default().unpack(&packed), Ok(vec![0; 1 << 20]));
        }
    }

    #[test]
    fn what_is_unpacked_has_a_bound() {
        let pack = |length| Packer::default().pack(&vec![0; length], UNPACKED_MAX).unwrap();
        let (half, small) = (pack(UNPACKED_MAX / 2), pack(1));
        let mut unpacker = Unpacker::default();
        assert_eq!(unpacker.check(b"gzip"), Err(Packed::Broken));
        assert_eq!(unpacker.check(&half), Ok(()));
        assert_eq!(unpacker.check(&half), Ok(()));
        assert_eq!(unpacker.check(&small), Err(Packed::TooMuch));
        assert_eq!(Unpacker::default().check(&half[..half.len() / 2]), Err(Packed::Broken));
    }
}
