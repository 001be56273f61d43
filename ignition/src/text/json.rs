//! JSON (RFC 8259) with positions. serde_json judges the text; what it let through is read once more for the positions, which
//! it does not tell.

use std::collections::HashSet;

use super::{DEPTH_MAX, NODES_MAX, too_deep, too_many_nodes};
use crate::{
    node::{Map, Node, Position, Value},
    report::{Report, Severity},
};

pub(super) fn parse(text: &str, report: &mut Report) -> Result<Node, Report> {
    serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|error| syntax(text, &error))?;
    let mut reader = Reader {
        text,
        offset: 0,
        position: Position { line: 1, column: 1 },
        nodes: 0,
        report,
    };
    reader.node(0)
}

fn syntax(text: &str, error: &serde_json::Error) -> Report {
    let said = error.to_string();
    // The position is said apart.
    let message = said
        .rsplit_once(" at line ")
        .map_or(said.as_str(), |(message, _)| message);
    // It counts columns in bytes, and from 0 where a line has ended too early.
    let line = error.line().max(1);
    let bytes = text.lines().nth(line - 1).unwrap_or_default().as_bytes();
    let before = &bytes[..error.column().saturating_sub(1).min(bytes.len())];
    let position = Position {
        line: number(line),
        column: number(String::from_utf8_lossy(before).chars().count() + 1),
    };
    Report::of(Some(position), "", format!("this is not JSON: {message}"))
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Goes through a text that is known to be JSON.
struct Reader<'a> {
    text: &'a str,
    offset: usize,
    position: Position,
    nodes: usize,
    report: &'a mut Report,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> u8 {
        self.text.as_bytes().get(self.offset).copied().unwrap_or_default()
    }

    /// Goes over `length` bytes, which end at a character's end.
    fn skip(&mut self, length: usize) -> &'a str {
        let end = (self.offset + length).min(self.text.len());
        let passed = &self.text[self.offset..end];
        for byte in passed.bytes() {
            if byte == b'\n' {
                self.position.line += 1;
                self.position.column = 1;
            } else if byte & 0xc0 != 0x80 {
                self.position.column += 1;
            }
        }
        self.offset = end;
        passed
    }

    fn blanks(&mut self) {
        let rest = &self.text.as_bytes()[self.offset..];
        let length = rest.iter().take_while(|byte| b" \t\r\n".contains(byte)).count();
        self.skip(length);
    }

    fn node(&mut self, depth: usize) -> Result<Node, Report> {
        self.blanks();
        let position = Some(self.position);
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(Report::of(position, "", too_many_nodes()));
        }
        if depth > DEPTH_MAX {
            return Err(Report::of(position, "", too_deep()));
        }
        let value = match self.peek() {
            b'{' => self.object(depth)?.into(),
            b'[' => self.list(depth)?.into(),
            b'"' => Value::Text(self.string()),
            _ => {
                let rest = &self.text.as_bytes()[self.offset..];
                let length = rest.iter().take_while(|byte| !b",]} \t\r\n".contains(byte)).count();
                match self.skip(length) {
                    "null" => Value::Null,
                    "true" => Value::Bool(true),
                    "false" => Value::Bool(false),
                    number => number
                        .parse()
                        .map_or_else(|_| Value::Plain(number.to_owned()), Value::Int),
                }
            }
        };
        Ok(Node::at(position, value))
    }

    /// Whether an element follows, in a list or object that `end` ends.
    fn follows(&mut self, end: u8) -> bool {
        self.blanks();
        if self.peek() == b',' {
            self.skip(1);
            self.blanks();
        }
        if self.peek() == end {
            self.skip(1);
            return false;
        }
        true
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>, Report> {
        self.skip(1);
        let mut items = Vec::new();
        while self.follows(b']') {
            items.push(self.node(depth + 1)?);
        }
        Ok(items)
    }

    fn object(&mut self, depth: usize) -> Result<Map, Report> {
        self.skip(1);
        let mut map = Map::new();
        let mut seen = HashSet::new();
        while self.follows(b'}') {
            let position = Some(self.position);
            let key = self.string();
            self.blanks();
            self.skip(1);
            let node = self.node(depth + 1)?;
            if seen.insert(key.clone()) {
                map.push(&key, position, node);
            } else {
                let message = "the key is there twice; the last one counts";
                self.report.say(Severity::Warning, position, key.as_str(), message);
                map.insert(&key, node);
            }
        }
        Ok(map)
    }

    fn string(&mut self) -> String {
        let rest = &self.text.as_bytes()[self.offset..];
        let mut length = 1;
        while rest.get(length).is_some_and(|byte| *byte != b'"') {
            length += if rest[length] == b'\\' { 2 } else { 1 };
        }
        // It was a string to the same reader before.
        serde_json::from_str(self.skip(length + 1)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Node, Report> {
        parse(text, &mut Report::default())
    }

    #[test]
    fn values_and_their_places() {
        let node = parsed("{\n  \"ä\": [1, true,\t null, \"x\\\"\\ud83d\\ude00\"],\"b\": {}, \"c\" : 1e3}").unwrap();
        let list = node.get("ä").unwrap();
        assert_eq!(list.items()[0].value, Value::Int(1));
        assert_eq!(list.items()[3].as_text(), Some("x\"😀"));
        assert_eq!(list.items()[1].position, Some(Position { line: 2, column: 12 }));
        assert_eq!(node.get("c").unwrap().value, Value::Plain("1e3".to_owned()));
        assert_eq!(node.get("b").unwrap().value, Map::new().into());
    }

    #[rstest::rstest]
    #[case("{\n  \"ignition\": {,", "line 2, column 16: this is not JSON")]
    #[case("", "this is not JSON")]
    #[case("{\"a\": 1} x", "line 1, column 10: this is not JSON")]
    fn a_mistake_has_its_place(#[case] text: &str, #[case] expected: &str) {
        let said = parsed(text).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
    }

    #[test]
    fn a_text_that_is_too_deep_or_has_too_many_values_is_refused() {
        assert!(parsed(&"[".repeat(100_000)).is_err());
        let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
        assert!(parsed(&deep).unwrap_err().to_string().contains("deeper than 64"));
        let wide = format!("[1{}]", ",1".repeat(NODES_MAX));
        assert!(
            parsed(&wide)
                .unwrap_err()
                .to_string()
                .contains("more than 500000 values")
        );
    }

    #[test]
    fn of_a_key_that_is_there_twice_the_last_counts() {
        let mut report = Report::default();
        let node = parse("{\"a\": 1, \"a\": 2}", &mut report).unwrap();
        assert_eq!(node.get("a").unwrap().as_int(), Some(2));
        assert!(
            report
                .to_string()
                .contains("line 1, column 10: a: the key is there twice"),
            "{report}"
        );
    }
}
