//! Services that Container Linux brings: a drop-in gives them their options.

use super::{dynamic_data, platform::Platform};
use crate::{
    node::{Map, Node, Position, Value},
    report::{Place, Report},
};

/// A unit that is enabled and has one drop-in, whose contents stand for the section at `position`.
pub(super) fn enabled(name: &str, dropin: &str, contents: String, position: Option<Position>) -> Node {
    unit(name, ("enable", Node::ours(true)), dropin, Node::at(position, contents))
}

fn unit(name: &str, enabled: (&str, Node), dropin: &str, contents: Node) -> Node {
    let dropin = Map::from([("name", Node::ours(dropin)), ("contents", contents)]);
    let dropins = Node::ours(vec![Node::ours(dropin)]);
    Node::ours(Map::from([("name", Node::ours(name)), enabled, ("dropins", dropins)]))
}

/// Units without which `coreos-metadata` would not know where it is: it tells most platforms by itself.
pub(super) fn of_platform(platform: Option<Platform>) -> Vec<Node> {
    let Some(platform @ (Platform::OpenStackMetadata | Platform::CloudStackConfigDrive)) = platform else {
        return Vec::new();
    };
    let contents = Node::ours(format!(
        "[Service]\nEnvironment=COREOS_METADATA_OPT_PROVIDER=--provider={platform}"
    ));
    let dropin = "20-clct-provider-override.conf";
    vec![
        unit(
            "coreos-metadata.service",
            ("enable", Node::ours(false)),
            dropin,
            contents.clone(),
        ),
        unit(
            "coreos-metadata-sshkeys@.service",
            ("enabled", Node::ours(true)),
            dropin,
            contents,
        ),
    ]
}

/// A drop-in for a wrapper that starts a program with flags.
#[derive(Debug)]
pub(super) struct Wrapper {
    command: &'static str,
    environment: Option<String>,
    flags: Vec<String>,
    dynamic: bool,
}

impl Wrapper {
    /// One that runs the command with this variable, as `NAME=value`.
    pub(super) fn new(command: &'static str, environment: Option<String>) -> Self {
        Self {
            command,
            environment,
            flags: Vec::new(),
            dynamic: false,
        }
    }

    /// The flags that the options of a map say, in the map's order. Dynamic data in them is resolved.
    pub(super) fn add_flags(
        &mut self,
        options: &Map,
        platform: Option<Platform>,
        flag_of: impl Fn(&str) -> String,
        place: &Place<'_>,
        report: &mut Report,
    ) {
        for (key, node) in options.iter() {
            let value = match &node.value {
                Value::Text(text) => quoted(text),
                Value::Int(number) => number.to_string(),
                Value::Bool(value) => value.to_string(),
                _ => continue,
            };
            let mut flag = format!("--{}={value}", flag_of(key));
            if dynamic_data::is_in(&flag) {
                self.dynamic = true;
                match dynamic_data::resolve(&flag, platform) {
                    Ok(resolved) => flag = resolved,
                    Err(message) => report.error(node, &place.key(key), message),
                }
            }
            self.flags.push(flag);
        }
    }

    /// What the drop-in says.
    pub(super) fn contents(&self) -> String {
        let mut lines = Vec::new();
        if self.dynamic {
            lines.extend([
                "[Unit]".to_owned(),
                "Requires=coreos-metadata.service".to_owned(),
                "After=coreos-metadata.service".to_owned(),
                String::new(),
            ]);
        }
        lines.push("[Service]".to_owned());
        if self.dynamic {
            lines.push("EnvironmentFile=/run/metadata/coreos".to_owned());
        }
        lines.extend(
            self.environment
                .iter()
                .map(|variable| format!("Environment=\"{variable}\"")),
        );
        lines.push("ExecStart=".to_owned());
        let flags: String = self.flags.iter().map(|flag| format!(" \\\n  {flag}")).collect();
        lines.push(format!("ExecStart={}{flags}", self.command));
        lines.join("\n")
    }
}

/// In double quotes, as Go's `%q` writes it.
pub(crate) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '\'' => quoted.push(c),
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\u{7}' => quoted.push_str("\\a"),
            '\u{8}' => quoted.push_str("\\b"),
            '\u{c}' => quoted.push_str("\\f"),
            '\n' => quoted.push_str("\\n"),
            '\r' => quoted.push_str("\\r"),
            '\t' => quoted.push_str("\\t"),
            '\u{b}' => quoted.push_str("\\v"),
            _ if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            _ if is_printable(c) => quoted.push(c),
            '\u{10000}'.. => quoted.push_str(&format!("\\U{:08x}", u32::from(c))),
            _ => quoted.push_str(&format!("\\u{:04x}", u32::from(c))),
        }
    }
    quoted.push('"');
    quoted
}

/// Letters, marks, digits, signs and the blank of ASCII. What Go calls printable is what Rust does not escape, but at the
/// beginning of a text, where Rust escapes marks too.
fn is_printable(c: char) -> bool {
    let text = format!("x{c}");
    text.escape_debug().eq(text.chars())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("plain", r#""plain""#)]
    #[case("a \"b\"\\\n\t\u{1}", r#""a \"b\"\\\n\t\x01""#)]
    #[case("grün \u{a0}\u{200b}", r#""grün \u00a0\u200b""#)]
    #[case("\u{1F600}\u{E0001}", r#""😀\U000e0001""#)]
    #[case("'", r#""'""#)]
    fn quotes(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(quoted(text), expected);
    }
}
