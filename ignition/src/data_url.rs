//! `data:` URLs (RFC 2397), in which a configuration carries the contents of files.

use base64::{
    Engine, alphabet,
    engine::{GeneralPurpose, GeneralPurposeConfig},
    prelude::BASE64_STANDARD,
};

use crate::gzip::Packer;

/// Whether RFC 2396 calls it unreserved.
const fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'!' | b'~' | b'*' | b'\'' | b'(' | b')')
}

/// Percent-encoded: `data:,` and the bytes, those that RFC 2396 calls unreserved as they are, as Butane and `ct` do it.
pub(crate) fn percent(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let mut url = String::with_capacity(percent_length(bytes));
    url.push_str("data:,");
    for &byte in bytes {
        if is_unreserved(byte) {
            url.push(char::from(byte));
        } else {
            url.push('%');
            url.push(char::from(DIGITS[usize::from(byte >> 4)]));
            url.push(char::from(DIGITS[usize::from(byte & 15)]));
        }
    }
    url
}

fn percent_length(bytes: &[u8]) -> usize {
    let reserved = bytes.iter().filter(|byte| !is_unreserved(**byte)).count();
    "data:,".len() + bytes.len() + 2 * reserved
}

/// In base64: `data:;base64,` and the bytes.
pub(crate) fn base64(bytes: &[u8]) -> String {
    format!("data:;base64,{}", BASE64_STANDARD.encode(bytes))
}

fn base64_length(bytes: &[u8]) -> usize {
    "data:;base64,".len() + bytes.len().div_ceil(3) * 4
}

/// Longest that bytes may be for their [`base64`] to be shorter than `length`.
fn most_in_base64(length: usize) -> usize {
    length.saturating_sub("data:;base64,".len() + 1) / 4 * 3
}

/// The shortest URL of the bytes, and whether they are compressed in it (gzip), which happens only if there is a `packer`.
pub(crate) fn shortest(bytes: &[u8], packer: Option<&mut Packer>) -> (String, bool) {
    // The lengths are known before anything is written, but for the compressed one.
    let (escaped, plain) = (percent_length(bytes), base64_length(bytes));
    if let Some(packer) = packer {
        // `compression` has to say so, which takes its room too.
        let most = most_in_base64(escaped.min(plain).saturating_sub("gzip".len()));
        if let Some(packed) = packer.pack(bytes, most) {
            return (base64(&packed), true);
        }
    }
    let url = if plain < escaped { base64(bytes) } else { percent(bytes) };
    (url, false)
}

/// The bytes of a `data:` URL. What Ignition refuses is refused: blanks and other characters that no URL has, base64 without
/// its padding, media types of other kinds than those of RFC 2045.
///
/// # Errors
/// A sentence that says why it is none.
pub(crate) fn decode(url: &str) -> Result<Vec<u8>, String> {
    let rest = url
        .strip_prefix("data:")
        .ok_or("is no data: URL (data:,text or data:;base64,...)")?;
    let (head, data) = split_head(rest).ok_or("is a data: URL without a comma before its data")?;
    let is_base64 =
        check_head(head).ok_or("is a data: URL with a broken media type: text/plain;charset=utf-8 is one")?;
    if is_base64 {
        return BASE64
            .decode(data)
            .map_err(|_| "is a data: URL whose base64 is broken".to_owned());
    }
    let mut bytes = Vec::with_capacity(data.len());
    let mut rest = data.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        match byte {
            b'%' => match (rest.next().and_then(digit), rest.next().and_then(digit)) {
                (Some(high), Some(low)) => bytes.push(high * 16 + low),
                _ => return Err("is a data: URL with a % that two hexadecimal digits do not follow".to_owned()),
            },
            b'!'..=b'~' if !b"<>#\"{}|\\^[]`".contains(&byte) => bytes.push(byte),
            _ => {
                let message = "is a data: URL with a character that has to be escaped, as a blank is by %20";
                return Err(message.to_owned());
            }
        }
    }
    Ok(bytes)
}

/// Bits that are left over at the end are passed over.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_allow_trailing_bits(true),
);

/// At the comma that ends the media type; one between quotes does not.
fn split_head(text: &str) -> Option<(&str, &str)> {
    let mut quoted = false;
    let mut escaped = false;
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b',' if !quoted => return Some((&text[..index], &text[index + 1..])),
            _ => {}
        }
    }
    None
}

/// Whether a media type and its parameters say that base64 follows; None if they are none.
fn check_head(head: &str) -> Option<bool> {
    const TYPES: [&str; 7] = ["text", "image", "audio", "video", "application", "message", "multipart"];
    let mut parts = split_quoted(head).into_iter();
    let kind = parts.next()?;
    if !kind.is_empty() {
        let (main, sub) = kind.split_once('/')?;
        let extension = main.starts_with("x-") || main.starts_with("X-");
        let known = extension || TYPES.iter().any(|known| main.starts_with(known));
        if !known || !is_token(main) || !is_token(sub) {
            return None;
        }
    }
    let mut base64 = false;
    for parameter in parts {
        if base64 {
            return None;
        }
        match parameter.split_once('=') {
            None if parameter == "base64" => base64 = true,
            None => return None,
            Some((name, value)) => {
                let quoted = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
                let fits = match quoted {
                    Some(value) => value.is_ascii(),
                    None => !value.is_empty() && is_token(value) && decode(&format!("data:,{value}")).is_ok(),
                };
                if name.is_empty() || !is_token(name) || !fits {
                    return None;
                }
            }
        }
    }
    Some(base64)
}

/// At the semicolons that are not between quotes.
fn split_quoted(text: &str) -> Vec<&str> {
    let mut quoted = false;
    text.split(|c| {
        quoted ^= c == '"';
        c == ';' && !quoted
    })
    .collect()
}

/// RFC 2045, section 5.1.
fn is_token(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_graphic() && !b"()<>@,;:\\\"/[]?=".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(decode(&percent(&bytes)).unwrap(), bytes);
        assert_eq!(decode(&base64(&bytes)).unwrap(), bytes);
    }

    #[test]
    fn the_shortest_wins() {
        let mut packer = Packer::default();
        assert_eq!(shortest(b"hello", Some(&mut packer)), ("data:,hello".to_owned(), false));
        assert!(shortest(&b"\n".repeat(1000), Some(&mut packer)).1);
        assert!(shortest(&b"\n".repeat(1000), None).0.starts_with("data:;base64,"));
    }

    #[test]
    fn the_longest_in_base64() {
        for length in 0..100 {
            let most = most_in_base64(length);
            let is_shorter = |bytes: usize| base64_length(&vec![0; bytes]) < length;
            assert!(most == 0 || is_shorter(most), "{length}");
            assert!(!is_shorter(most + 1), "{length}");
        }
    }

    #[rstest::rstest]
    #[case("http://a")]
    #[case("data:")]
    #[case("data:;base64,?")]
    #[case("data:;base64,YQ")]
    #[case("data:;base64,Y Q==")]
    #[case("data:;charset=utf-8;base64;a=b,YQ==")]
    #[case("data:text,a")]
    #[case("data:model/x,a")]
    #[case("data:,a b")]
    #[case("data:,%z1")]
    #[case("data:,é")]
    #[case("data:,a#b")]
    fn what_is_no_data_url_is_told(#[case] url: &str) {
        assert!(decode(url).is_err());
    }

    #[rstest::rstest]
    #[case("data:,", "")]
    #[case("data:;base64,", "")]
    #[case("data:;base64,YQ==", "a")]
    #[case("data:;base64,YR==", "a")]
    #[case("data:text/plain;charset=utf-8;base64,YQ==", "a")]
    #[case("data:text/plain;a=\"b,c;d\",a,b", "a,b")]
    #[case("data:x-a/b,a%2Cb", "a,b")]
    fn what_is_one_is_decoded(#[case] url: &str, #[case] expected: &str) {
        assert_eq!(decode(url).unwrap(), expected.as_bytes());
    }
}
