//! `data:` URLs (RFC 2397), in which a configuration carries the contents of files.

use std::io::{Read, Write};

use base64::{Engine, prelude::BASE64_STANDARD};
use flate2::{Compression, read::MultiGzDecoder, write::GzEncoder};

/// Longest contents that are looked into, in bytes; a small gzip can stand for any amount.
pub(crate) const CONTENTS_MAX: usize = 64 << 20;

/// Percent-encoded: `data:,` and the bytes, those that RFC 2396 calls unreserved as they are, as Butane and `ct` do it.
pub(crate) fn percent(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let mut url = String::with_capacity(bytes.len() + 8);
    url.push_str("data:,");
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_.!~*'()".contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push('%');
            url.push(char::from(DIGITS[usize::from(byte >> 4)]));
            url.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
    }
    url
}

/// In base64: `data:;base64,` and the bytes.
pub(crate) fn base64(bytes: &[u8]) -> String {
    format!("data:;base64,{}", BASE64_STANDARD.encode(bytes))
}

/// The shortest URL of the bytes, and whether they are compressed in it (gzip), which happens only if `compress` allows it.
pub(crate) fn shortest(bytes: &[u8], compress: bool) -> (String, bool) {
    let mut best = (percent(bytes), false);
    let plain = base64(bytes);
    if plain.len() < best.0.len() {
        best = (plain, false);
    }
    if compress {
        let compressed = base64(&gzip(bytes));
        // `compression` has to say so, which takes its room too.
        if compressed.len() + "gzip".len() < best.0.len() {
            best = (compressed, true);
        }
    }
    best
}

/// RFC 1952; no name and no time in it, so that the same bytes give the same bytes.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    // Writing to a vector cannot fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

/// What was compressed; None if it is no gzip, or longer than [`CONTENTS_MAX`].
pub(crate) fn gunzip(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let limit = u64::try_from(CONTENTS_MAX).ok()?;
    MultiGzDecoder::new(bytes).take(limit + 1).read_to_end(&mut out).ok()?;
    (out.len() <= CONTENTS_MAX).then_some(out)
}

/// The bytes of a `data:` URL.
///
/// # Errors
/// A sentence that says why it is none.
pub(crate) fn decode(url: &str) -> Result<Vec<u8>, String> {
    let parsed = data_url::DataUrl::process(url).map_err(|_| "is no data: URL (data:,text or data:;base64,...)")?;
    let (bytes, _) = parsed
        .decode_to_vec()
        .map_err(|_| "is a data: URL whose base64 is broken")?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&percent(&bytes)).unwrap(), bytes);
        assert_eq!(decode(&base64(&bytes)).unwrap(), bytes);
        assert_eq!(gunzip(&gzip(&bytes)).unwrap(), bytes);
    }

    #[test]
    fn the_shortest_wins() {
        assert_eq!(shortest(b"hello", true), ("data:,hello".to_owned(), false));
        assert!(shortest(&b"\n".repeat(1000), true).1);
        assert!(shortest(&b"\n".repeat(1000), false).0.starts_with("data:;base64,"));
    }

    #[rstest::rstest]
    #[case("http://a")]
    #[case("data:")]
    #[case("data:;base64,?")]
    fn what_is_no_data_url_is_told(#[case] url: &str) {
        assert!(decode(url).is_err());
    }
}
