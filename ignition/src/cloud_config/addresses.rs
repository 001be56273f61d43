//! What is known of a machine before it boots, and how a cloud-config refers to it.

use crate::{
    node::{Map, Node, Position, Value},
    report::{Place, Report, Severity},
};

/// What is known of the machine's name and addresses before it boots.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Addresses {
    /// Its name, without a domain or with one.
    pub hostname: Option<String>,
    /// The address inside of its cluster or cloud: `$private_ipv4`.
    pub private_ipv4: Option<String>,
    /// The address for everybody else: `$public_ipv4`.
    pub public_ipv4: Option<String>,
    /// As `private_ipv4`: `$private_ipv6`.
    pub private_ipv6: Option<String>,
    /// As `public_ipv4`: `$public_ipv6`.
    pub public_ipv6: Option<String>,
}

impl Addresses {
    fn all(&self) -> [(&'static str, &'static str, &Option<String>); 4] {
        [
            ("$private_ipv4", "COREOS_PRIVATE_IPV4", &self.private_ipv4),
            ("$private_ipv6", "COREOS_PRIVATE_IPV6", &self.private_ipv6),
            ("$public_ipv4", "COREOS_PUBLIC_IPV4", &self.public_ipv4),
            ("$public_ipv6", "COREOS_PUBLIC_IPV6", &self.public_ipv6),
        ]
    }

    /// Lines for `/etc/environment`, where units look for the addresses.
    pub(super) fn environment(&self) -> String {
        let known = self.all().into_iter();
        known
            .filter_map(|(_, variable, address)| Some(format!("{variable}={}\n", address.as_deref()?)))
            .collect()
    }

    /// The tree with addresses in the place of what refers to them, and `_` in the place of `-` in its keys.
    pub(super) fn put_into(&self, node: Node, place: &Place<'_>, report: &mut Report) -> Node {
        let position = node.position;
        let value = match node.value {
            Value::Text(text) => self.put_into_value(&text, position, place, report).into(),
            Value::Plain(text) => Value::Plain(self.put_into_value(&text, position, place, report)),
            Value::List(items) => items
                .into_iter()
                .enumerate()
                .map(|(index, item)| self.put_into(item, &place.index(index), report))
                .collect::<Vec<_>>()
                .into(),
            Value::Map(map) => {
                let mut seen = std::collections::HashSet::new();
                let mut out = Map::new();
                for (key, key_position, value) in map.into_entries() {
                    let name = key.replace('-', "_");
                    let place = place.key(&name);
                    if !seen.insert(name.clone()) {
                        let message = "the key is there twice: `-` and `_` are the same in it";
                        report.say(Severity::Error, key_position, place.to_string(), message);
                        continue;
                    }
                    let value = self.put_into(value, &place, report);
                    out.push(&name, key_position, value);
                }
                out.into()
            }
            other => other,
        };
        Node::at(position, value)
    }

    fn put_into_value(&self, text: &str, position: Option<Position>, place: &Place<'_>, report: &mut Report) -> String {
        self.put_into_text(text, |name, _| {
            report.say(Severity::Error, position, place.to_string(), unknown(name));
        })
    }

    /// As [`Self::put_into`], for a text; what is not known is told with the number of its line, from 1.
    pub(super) fn put_into_text(&self, text: &str, mut not_known: impl FnMut(&str, u32)) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        let mut line = 1;
        while let Some(start) = rest.find('$') {
            let (before, tail) = rest.split_at(start);
            line += u32::try_from(before.matches('\n').count()).unwrap_or(u32::MAX);
            let found = self.all().into_iter().find(|(name, _, _)| tail.starts_with(name));
            let Some((name, _, address)) = found else {
                out.push_str(before);
                out.push('$');
                rest = tail.get(1..).unwrap_or_default();
                continue;
            };
            rest = tail.get(name.len()..).unwrap_or_default();
            if let Some(before) = before.strip_suffix('\\') {
                out.push_str(before);
                out.push_str(name);
                continue;
            }
            out.push_str(before);
            match address {
                Some(address) => out.push_str(address),
                None => not_known(name, line),
            }
        }
        out.push_str(rest);
        out
    }
}

/// What there is to say of a reference to an address that is not known.
pub(super) fn unknown(name: &str) -> String {
    format!(
        "{name} is not known of this machine; if that is a variable of a script's own and no address, write \\{name}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("http://$private_ipv4:2379,$private_ipv4", "http://10.0.0.2:2379,10.0.0.2", 0)]
    #[case("\\$private_ipv4", "$private_ipv4", 0)]
    #[case("$private $ $$private_ipv4$", "$private $ $10.0.0.2$", 0)]
    #[case("a\n\n$public_ipv6", "a\n\n", 3)]
    fn references(#[case] text: &str, #[case] expected: &str, #[case] expected_line: u32) {
        let addresses = Addresses {
            private_ipv4: Some("10.0.0.2".to_owned()),
            ..Addresses::default()
        };
        let mut line = 0;
        let out = addresses.put_into_text(text, |_, found| line = found);
        assert_eq!((out.as_str(), line), (expected, expected_line));
    }
}
