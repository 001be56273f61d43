//! URLs, read as Go's `net/url` reads them, since that is what decides what Ignition fetches.

use crate::data_url;

/// What of a URL decides whether Ignition takes it.
#[derive(Debug, PartialEq)]
pub(crate) struct Url<'a> {
    /// In small letters; empty where there is none.
    pub(crate) scheme: String,
    /// What follows the scheme where no slash does, as in `arn:aws:s3:::bucket/key`.
    opaque: &'a str,
    query: &'a str,
}

const NO_URL: &str = "is no URL";

/// # Errors
/// When it is no URL: a sentence that says why.
pub(crate) fn parse(text: &str) -> Result<Url<'_>, String> {
    let (rest, fragment) = text.split_once('#').unwrap_or((text, ""));
    if rest.bytes().any(|byte| byte < b' ' || byte == 0x7f) {
        return Err(format!("{NO_URL}: there is a control character in it"));
    }
    let (scheme, rest) = split_scheme(rest)?;
    let scheme = scheme.to_ascii_lowercase();
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut url = Url {
        scheme,
        opaque: "",
        query,
    };
    if url.scheme.is_empty() {
        let first = rest.split('/').next().unwrap_or_default();
        if first.contains(':') {
            return Err(format!("{NO_URL}: nothing is before the first colon"));
        }
    } else if !rest.starts_with('/') {
        url.opaque = rest;
        unescapes(fragment)?;
        return Ok(url);
    }
    let path = match rest.strip_prefix("//") {
        Some(rest) if !url.scheme.is_empty() || !rest.starts_with('/') => {
            let end = rest.find('/').unwrap_or(rest.len());
            let (authority, path) = rest.split_at(end);
            check_authority(authority)?;
            path
        }
        _ => rest,
    };
    unescapes(path)?;
    unescapes(fragment)?;
    Ok(url)
}

fn split_scheme(text: &str) -> Result<(&str, &str), String> {
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' => {}
            b'0'..=b'9' | b'+' | b'-' | b'.' if index > 0 => {}
            b':' if index == 0 => return Err(format!("{NO_URL}: nothing is before the colon")),
            b':' => return Ok((&text[..index], &text[index + 1..])),
            _ => break,
        }
    }
    Ok(("", text))
}

fn check_authority(authority: &str) -> Result<(), String> {
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (user, host),
        None => ("", authority),
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || "-._:~!$&'()*+,;=%@".contains(c);
    if !user.chars().all(fits) {
        return Err(format!("{NO_URL}: its user has characters that need to be escaped"));
    }
    unescapes(user)?;
    let port = match host.strip_prefix('[') {
        Some(rest) => match rest.rsplit_once(']') {
            Some((_, port)) => port,
            None => return Err(format!("{NO_URL}: `]` is missing in its host")),
        },
        None => host
            .find(':')
            .map_or("", |colon| &host[host.rfind(':').unwrap_or(colon)..]),
    };
    let digits = port.strip_prefix(':').unwrap_or(port);
    if (!port.is_empty() && !port.starts_with(':')) || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(format!("{NO_URL}: its port is no number"));
    }
    // What an address between brackets has beside its zone is of no interest here.
    let name = if host.starts_with('[') { "" } else { host };
    let fits = |c: char| !c.is_ascii() || c.is_ascii_alphanumeric() || "-._~!$&'()*+,;=:]<>\"%".contains(c);
    if !name.chars().all(fits) {
        return Err(format!("{NO_URL}: its host has characters that no host has"));
    }
    // Of ASCII only the percent sign may be escaped in a host.
    let escaped = name.split('%').skip(1);
    if escaped
        .into_iter()
        .any(|rest| !rest.starts_with("25") && rest.starts_with(|c: char| ('0'..='7').contains(&c)))
    {
        return Err(format!("{NO_URL}: its host has escaped characters that no host has"));
    }
    unescapes(host)
}

/// Whether every `%` is followed by two digits.
fn unescapes(text: &str) -> Result<(), String> {
    let mut rest = text;
    while let Some((_, after)) = rest.split_once('%') {
        let digits = after.as_bytes().get(..2);
        if !digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit)) {
            return Err(format!("{NO_URL}: two hexadecimal digits are expected after %"));
        }
        rest = after;
    }
    Ok(())
}

/// The bytes that a part of a query stands for.
fn unescape(text: &str) -> Option<Vec<u8>> {
    unescapes(text).ok()?;
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                digit(rest.next()?)? * 16 + digit(rest.next()?)?
            }
            b'+' => b' ',
            byte => byte,
        });
    }
    Some(bytes)
}

impl Url<'_> {
    /// The first value of a key of the query.
    fn query(&self, key: &str) -> Option<Vec<u8>> {
        self.query
            .split('&')
            .filter(|pair| !pair.contains(';'))
            .filter_map(|pair| {
                let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                Some((unescape(name)?, unescape(value)?))
            })
            .find(|(name, _)| name == key.as_bytes())
            .map(|(_, value)| value)
    }
}

/// Schemes that any version fetches from.
const KNOWN: [&str; 7] = ["http", "https", "tftp", "s3", "gs", "arn", "oem"];

/// Whether Ignition fetches from there.
///
/// # Errors
/// A sentence that says why it does not. `schemes` are those of its version beside `data`.
pub(crate) fn check_source(text: &str, schemes: &[&str]) -> Result<(), String> {
    let url = parse(text)?;
    match url.scheme.as_str() {
        "data" => data_url::decode(text).map(|_| ()),
        scheme if !schemes.contains(&scheme) => {
            let known = schemes.join(", ");
            let what = if scheme.is_empty() {
                "has no scheme".to_owned()
            } else {
                // Any other may be the beginning of something that nobody but the user should see.
                let said = if KNOWN.contains(&scheme) { scheme } else { "that" };
                format!("{said} is none of its schemes")
            };
            Err(format!("{what}: data, {known} are what this version fetches from"))
        }
        "s3" => check_version_id(&url),
        "arn" => check_arn(&url).and_then(|()| check_version_id(&url)),
        _ => Ok(()),
    }
}

fn check_version_id(url: &Url<'_>) -> Result<(), String> {
    if url.query("versionId").is_some_and(|id| id.is_empty()) {
        return Err("the versionId of an S3 object cannot be empty".to_owned());
    }
    Ok(())
}

/// Amazon's name of an object or an access point of S3.
fn check_arn(url: &Url<'_>) -> Result<(), String> {
    let sections: Vec<&str> = url.opaque.splitn(5, ':').collect();
    let slashes = url.opaque.matches('/').count();
    match sections[..] {
        [_, "s3", _, _, resource] if slashes >= if resource.starts_with("accesspoint/") { 2 } else { 1 } => Ok(()),
        _ => Err("is no ARN of an S3 object such as arn:aws:s3:::bucket/key".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const SCHEMES: &[&str] = &["http", "https", "s3", "arn"];

    #[rstest]
    #[case("http://example.com/a", true)]
    #[case("HTTPS://user:pw@example.com:8443/a?b=c#d", true)]
    #[case("http://[fe80::1]:80/", true)]
    #[case("http://[fe80::1", false)]
    #[case("http://example.com:port/", false)]
    #[case("http://example.com:/", true)]
    #[case("http://exa mple.com/", false)]
    #[case("http://exa[mple.com/", false)]
    #[case("http://%41.example.com/", false)]
    #[case("http://%C3%A9.example.com/", true)]
    #[case("http://example.com/%zz", false)]
    #[case("http://example.com/a b", true)]
    #[case("http:example.com", true)]
    #[case("://example.com", false)]
    #[case("example.com", false)]
    #[case("/etc/passwd", false)]
    #[case("tftp://example.com/a", false)]
    #[case("s3://bucket/key", true)]
    #[case("s3://bucket/key?versionId=", false)]
    #[case("s3://bucket/key?versionId=aHUg", true)]
    #[case("arn:aws:s3:::bucket/key", true)]
    #[case("arn:aws:s3:::bucket", false)]
    #[case("arn:aws:ec2:::bucket/key", false)]
    #[case("arn:aws:s3:us-west-1:123456789012:accesspoint/test/object/some/path", true)]
    #[case("arn:aws:s3:us-west-1:123456789012:accesspoint/test", false)]
    #[case("data:,hello", true)]
    #[case("DATA:,hello", false)]
    #[case("data:,hello world", false)]
    #[case("http://a/\n", false)]
    fn sources(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(
            check_source(text, SCHEMES).is_ok(),
            valid,
            "{:?}",
            check_source(text, SCHEMES)
        );
    }
}
