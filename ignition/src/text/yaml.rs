//! YAML 1.2 with positions, and with what configurations in the field take for granted of YAML 1.1: merge keys (`<<`), and
//! that an octal number may begin with 0.

use std::collections::{HashMap, HashSet};

use base64::{Engine, prelude::BASE64_STANDARD};
use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput, Tag};

use super::{DEPTH_MAX, NODE_BYTES, NODES_MAX, too_deep, too_many_nodes};
use crate::{
    node::{Map, Node, Position, Value},
    report::{Report, Severity},
};

/// The first document of the text; an empty text is null.
pub(super) fn parse(text: &str, report: &mut Report) -> Result<Node, Report> {
    let mut reader = Reader {
        events: Parser::new_from_str(text),
        anchors: HashMap::new(),
        nodes: 0,
        open_end: (!text.ends_with('\n')).then(|| text.chars().count()),
        report,
    };
    loop {
        match reader.next()? {
            (Event::StreamEnd, _) => return Ok(Node::default()),
            (Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing, _) => {}
            (event, span) => {
                let node = reader.node(event, span, 0)?;
                reader.end()?;
                return Ok(node);
            }
        }
    }
}

struct Reader<'a> {
    events: Parser<'a, StrInput<'a>>,
    /// What aliases stand for, and of how many nodes it is.
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
    /// How many characters the text has, if no line break is the last of them.
    open_end: Option<usize>,
    report: &'a mut Report,
}

fn position(span: &Span) -> Option<Position> {
    Some(Position {
        line: u32::try_from(span.start.line()).unwrap_or(u32::MAX),
        column: u32::try_from(span.start.col() + 1).unwrap_or(u32::MAX),
    })
}

fn refused(position: Option<Position>, message: impl Into<String>) -> Report {
    Report::of(position, "", message)
}

fn syntax(error: &ScanError) -> Report {
    let place = position(&Span::empty(*error.marker()));
    if error.info() == "recursion limit exceeded" {
        // It looks ahead for the end of a key, and so meets the depth before its events do.
        return refused(place, too_deep());
    }
    refused(place, format!("this is not YAML: {}", error.info()))
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Result<(Event<'a>, Span), Report> {
        match self.events.next() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(syntax(&error)),
            None => Ok((Event::StreamEnd, Span::default())),
        }
    }

    /// Nothing may follow the document but other documents.
    fn end(&mut self) -> Result<(), Report> {
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(()),
                (Event::DocumentStart(_), span) => {
                    let message = "another document begins here, which is passed over: only the first one is read";
                    self.report.say(Severity::Warning, position(&span), "", message);
                    return Ok(());
                }
                _ => {}
            }
        }
    }

    fn count(&mut self, nodes: usize, place: Option<Position>) -> Result<(), Report> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > NODES_MAX {
            Err(refused(place, too_many_nodes()))
        } else {
            Ok(())
        }
    }

    fn node(&mut self, event: Event<'a>, span: Span, depth: usize) -> Result<Node, Report> {
        let place = position(&span);
        if depth > DEPTH_MAX {
            return Err(refused(place, too_deep()));
        }
        let before = self.nodes;
        self.count(1, place)?;
        let (anchor, value) = match event {
            Event::Scalar(text, style, anchor, tag) => {
                let is_block = matches!(style, ScalarStyle::Literal | ScalarStyle::Folded);
                let text = match text.strip_suffix('\n') {
                    // The parser adds the line break that is missing at the end; a block would have it.
                    Some(text) if is_block && self.open_end.is_some_and(|end| span.end.index() >= end) => text,
                    _ => &*text,
                };
                self.count(text.len() / NODE_BYTES, place)?;
                (anchor, scalar(text, style, tag.as_deref(), place)?)
            }
            Event::SequenceStart(anchor, _) => (anchor, self.list(depth)?.into()),
            Event::MappingStart(anchor, _) => (anchor, self.map(depth)?.into()),
            Event::Alias(anchor) => {
                let Some((node, nodes)) = self.anchors.get(&anchor) else {
                    // Only inside of what it names: anything else is an error of the parser's.
                    return Err(refused(place, "the alias stands inside of what it stands for"));
                };
                let (node, nodes) = (node.clone(), *nodes);
                self.count(nodes, place)?;
                if depth + height(&node) > DEPTH_MAX {
                    return Err(refused(place, too_deep()));
                }
                return Ok(Node::at(place, node.value));
            }
            _ => return Err(refused(place, "this is not YAML: a value is missing")),
        };
        let node = Node::at(place, value);
        if anchor != 0 {
            // Kept a second time, so counted a second time.
            let nodes = self.nodes - before;
            self.count(nodes, place)?;
            self.anchors.insert(anchor, (node.clone(), nodes));
        }
        Ok(node)
    }

    fn list(&mut self, depth: usize) -> Result<Vec<Node>, Report> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, span) => items.push(self.node(event, span, depth + 1)?),
            }
        }
    }

    fn map(&mut self, depth: usize) -> Result<Map, Report> {
        let mut map = Map::new();
        let mut seen = HashSet::new();
        let mut merged = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::MappingEnd {
                break;
            }
            let key = self.node(event, span, depth + 1)?;
            let (event, span) = self.next()?;
            let value = self.node(event, span, depth + 1)?;
            let name = match key.value {
                Value::Plain(name) if name == "<<" => {
                    merged.push(value);
                    continue;
                }
                Value::Plain(name) | Value::Text(name) => name,
                Value::Null => "null".to_owned(),
                _ => return Err(refused(key.position, "a key is not text")),
            };
            if !seen.insert(name.clone()) {
                self.report
                    .say(Severity::Error, key.position, name, "the key is there twice");
                continue;
            }
            map.push(&name, key.position, value);
        }
        // What the map says itself goes before what it takes over.
        for source in merged {
            for source in merge_sources(source)? {
                for (name, place, value) in source.into_entries() {
                    if seen.insert(name.clone()) {
                        map.push(&name, place, value);
                    }
                }
            }
        }
        Ok(map)
    }
}

/// How many levels there are below the node.
fn height(node: &Node) -> usize {
    let below = |node: &Node| height(node) + 1;
    match &node.value {
        Value::List(items) => items.iter().map(below).max().unwrap_or_default(),
        Value::Map(map) => map.iter().map(|(_, node)| below(node)).max().unwrap_or_default(),
        _ => 0,
    }
}

fn merge_sources(node: Node) -> Result<Vec<Map>, Report> {
    let place = node.position;
    let wrong = || refused(place, "`<<` takes over a map, or several in a list");
    match node.value {
        Value::Map(map) => Ok(vec![map]),
        Value::List(items) => items
            .into_iter()
            .map(|item| match item.value {
                Value::Map(map) => Ok(map),
                _ => Err(wrong()),
            })
            .collect(),
        _ => Err(wrong()),
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, place: Option<Position>) -> Result<Value, Report> {
    let tag = tag
        .filter(|tag| tag.is_yaml_core_schema())
        .map(|tag| tag.suffix.as_str());
    Ok(match tag {
        Some("str") => Value::Text(text.to_owned()),
        Some("binary") => {
            let digits: String = text.split_ascii_whitespace().collect();
            let bytes = BASE64_STANDARD.decode(digits).ok();
            let decoded = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
            Value::Text(decoded.ok_or_else(|| refused(place, "what is tagged !!binary is no text in base64"))?)
        }
        Some("null") => Value::Null,
        Some("int" | "bool" | "float") => Value::Plain(text.to_owned()),
        _ if style != ScalarStyle::Plain => Value::Text(text.to_owned()),
        _ => match text {
            "" | "~" | "null" | "Null" | "NULL" => Value::Null,
            _ => Value::Plain(text.to_owned()),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Node, Report> {
        parse(text, &mut Report::default())
    }

    fn place(line: u32, column: u32) -> Option<Position> {
        Some(Position { line, column })
    }

    #[test]
    fn values_and_their_places() {
        let node = parsed("a:\n  - b: 0644\n    c: \"1\"\n  - |\n    text\nd: ~\n").unwrap();
        assert_eq!(node.position, place(1, 1));
        let list = node.get("a").unwrap();
        assert_eq!(list.position, place(2, 3));
        assert_eq!(list.items()[0].position, place(2, 5));
        assert_eq!(list.items()[0].get("b").unwrap().value, Value::Plain("0644".to_owned()));
        assert_eq!(list.items()[0].get("b").unwrap().position, place(2, 8));
        assert_eq!(list.items()[0].get("c").unwrap().as_text(), Some("1"));
        assert_eq!(list.items()[1].as_text(), Some("text\n"));
        assert_eq!(list.items()[1].position, place(5, 5));
        assert_eq!(node.get("d").unwrap().value, Value::Null);
    }

    #[rstest::rstest]
    #[case("a: |\n  one\n  two", "one\ntwo")]
    #[case("a: |\n  one\n", "one\n")]
    #[case("b: {a: }\na: >+\n  one\n  two", "one two")]
    fn a_block_at_the_end_has_the_line_break_that_the_text_has(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(parsed(text).unwrap().text("a"), Some(expected));
    }

    #[test]
    fn anchors_and_merge_keys_are_written_out() {
        let node = parsed("base: &b {x: one, y: two}\nthis: {<<: *b, y: three}\nagain: *b\n").unwrap();
        assert_eq!(node.find(&["this", "x"]).unwrap().value, Value::Plain("one".to_owned()));
        assert_eq!(
            node.find(&["this", "y"]).unwrap().value,
            Value::Plain("three".to_owned())
        );
        assert_eq!(node.get("again"), node.get("base"));
    }

    #[rstest::rstest]
    #[case("a: [1, 2", "this is not YAML")]
    #[case("a: b: c", "line 1")]
    #[case("a: *none", "line 1")]
    #[case("a: &a [*a]", "inside of what it stands for")]
    #[case("[1, 2]: 3", "a key is not text")]
    #[case(
        "  a: 1\nb: 2\n",
        "line 2, column 1: this is not YAML: did not find expected <document start>"
    )]
    fn a_mistake_has_its_place(#[case] text: &str, #[case] expected: &str) {
        let said = parsed(text).unwrap_err().to_string();
        assert!(said.contains(expected), "{said}");
    }

    #[test]
    fn a_key_that_is_there_twice_is_an_error() {
        let mut report = Report::default();
        parse("a: 1\nb: 2\na: 3\n", &mut report).unwrap();
        assert_eq!(report.to_string(), "error: line 3, column 1: a: the key is there twice");
    }

    #[test]
    fn another_document_is_told() {
        let mut report = Report::default();
        let node = parse("a: 1\n---\nb: 2\n", &mut report).unwrap();
        assert!(node.get("b").is_none());
        assert!(
            report
                .to_string()
                .starts_with("warning: line 2, column 1: another document")
        );
    }

    #[test]
    fn aliases_do_not_blow_up() {
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..20 {
            let inner = format!("*a{}, ", level - 1).repeat(9);
            bomb.push_str(&format!("a{level}: &a{level} [{inner}]\n"));
        }
        let said = parsed(&bomb).unwrap_err().to_string();
        assert!(said.contains("more than 500000 values"), "{said}");
    }

    #[test]
    fn aliases_of_a_long_text_do_not_blow_up() {
        let bomb = format!("a: &a {}\nb: [{}]\n", "x".repeat(1 << 20), "*a, ".repeat(1000));
        let said = parsed(&bomb).unwrap_err().to_string();
        assert!(said.contains("more than 500000 values"), "{said}");
        assert!(parsed(&format!("a: {}", "x".repeat(2 << 20))).is_ok());
    }

    #[test]
    fn a_text_that_is_too_deep_is_refused() {
        // The parser has a bound of its own there.
        assert!(parsed(&"[".repeat(100_000)).is_err());
        assert!(
            parsed(&"- ".repeat(10_000))
                .unwrap_err()
                .to_string()
                .contains("deeper than 64")
        );
    }
}
