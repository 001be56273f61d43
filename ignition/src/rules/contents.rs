//! The hash that contents are verified with, and whether contents that the configuration itself carries have it.

use sha2::{Digest, Sha256, Sha512};

use crate::{data_url, gzip::Unpacker, node::Node};

/// A hash as Ignition writes it: `sha512-` and 128 hexadecimal digits, or `sha256-` and 64.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Hash<'a> {
    function: Function,
    sum: &'a str,
}

#[derive(Debug, Clone, Copy)]
enum Function {
    Sha256,
    Sha512,
}

impl<'a> Hash<'a> {
    /// # Errors
    /// A sentence that says why it is none. Only newer versions know SHA-256.
    pub(crate) fn parse(text: &'a str, knows_sha256: bool) -> Result<Self, String> {
        let known = if knows_sha256 {
            "sha512- and 128 hexadecimal digits, or sha256- and 64"
        } else {
            "sha512- and 128 hexadecimal digits"
        };
        let wrong = || format!("is no hash: {known} are expected");
        let (function, sum) = text.split_once('-').ok_or_else(wrong)?;
        let (function, length) = match function {
            "sha512" => (Function::Sha512, 128),
            "sha256" if knows_sha256 => (Function::Sha256, 64),
            "sha256" => return Err(format!("sha256 is not in this version: {known} are expected")),
            _ => return Err(wrong()),
        };
        if sum.len() == length && sum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            Ok(Self { function, sum })
        } else {
            Err(wrong())
        }
    }

    fn is_of(&self, bytes: &[u8]) -> bool {
        let sum = match self.function {
            Function::Sha256 => hex(&Sha256::digest(bytes)),
            Function::Sha512 => hex(&Sha512::digest(bytes)),
        };
        sum.eq_ignore_ascii_case(self.sum)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Looks into contents, for one configuration.
#[derive(Default)]
pub(crate) struct Inspector {
    unpacker: Unpacker,
}

impl Inspector {
    /// Whether contents that stand in the configuration have the hash that they are said to have; it is that of what was
    /// compressed. Contents from elsewhere are none of its business.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub(crate) fn verify(&mut self, contents: &Node, hash: Hash<'_>) -> Result<(), String> {
        let source = contents.text("source").unwrap_or_default();
        let Some(mut bytes) = Some(source)
            .filter(|source| source.is_empty() || source.starts_with("data:"))
            .and_then(|source| {
                if source.is_empty() {
                    Some(Vec::new())
                } else {
                    data_url::decode(source).ok()
                }
            })
        else {
            return Ok(());
        };
        if contents.text("compression") == Some("gzip") && !source.is_empty() {
            match self.unpacker.unpack(&bytes) {
                Ok(plain) => bytes = plain,
                // Longer than is looked into, or broken; Ignition tells which.
                Err(_) => return Ok(()),
            }
        }
        if hash.is_of(&bytes) {
            Ok(())
        } else {
            Err("is not the hash of the contents that stand here".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Map;
    use rstest::rstest;

    const HELLO: &str = "sha256-2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    #[rstest]
    #[case(HELLO, true)]
    #[case("sha256-2cf2", false)]
    #[case("sha1-2cf2", false)]
    #[case("2cf2", false)]
    fn hashes(#[case] text: &str, #[case] valid: bool) {
        assert_eq!(Hash::parse(text, true).is_ok(), valid);
        assert!(Hash::parse(text, false).is_err());
    }

    #[rstest]
    #[case("data:,hello", "", true)]
    #[case("data:;base64,aGVsbG8=", "", true)]
    #[case("data:,hell", "", false)]
    #[case("http://example.com/", "", true)]
    #[case("data:;base64,H4sIAAAAAAAAA8tIzcnJBwCGphA2BQAAAA==", "gzip", true)]
    fn the_hash_is_that_of_the_plain_contents(#[case] source: &str, #[case] compression: &str, #[case] right: bool) {
        let contents = Node::ours(Map::from([
            ("source", Node::ours(source)),
            ("compression", Node::ours(compression)),
        ]));
        let hash = Hash::parse(HELLO, true).unwrap();
        assert_eq!(Inspector::default().verify(&contents, hash).is_ok(), right);
    }
}
