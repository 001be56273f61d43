//! What a `data:` URL of a configuration holds, as Ignition reads it (RFC 2397; a `#` in it is text, not a fragment).

use std::io::Read;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::read::MultiGzDecoder;
use serde_json::Value;

/// The bytes of a resource (`{"source": …, "compression": …}`); none if it has no source.
pub(crate) fn contents_of(resource: &Value) -> Result<Vec<u8>, String> {
    let Some(source) = resource
        .get("source")
        .and_then(Value::as_str)
        .filter(|source| !source.is_empty())
    else {
        return Ok(Vec::new());
    };
    let bytes = decode(source).ok_or_else(|| format!("{source:.80} is not a data: URL that can be read"))?;
    match resource.get("compression").and_then(Value::as_str).unwrap_or_default() {
        "" => Ok(bytes),
        "gzip" => {
            let mut plain = Vec::new();
            MultiGzDecoder::new(bytes.as_slice())
                .read_to_end(&mut plain)
                .map_err(|error| error.to_string())?;
            Ok(plain)
        }
        other => Err(format!("compression {other} is unknown")),
    }
}

fn decode(source: &str) -> Option<Vec<u8>> {
    let (head, body) = source.strip_prefix("data:")?.split_once(',')?;
    let bytes = unescape(body)?;
    if head.ends_with(";base64") {
        STANDARD.decode(bytes).ok()
    } else {
        Some(bytes)
    }
}

fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = after.get(2..)?;
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    Some(bytes)
}
