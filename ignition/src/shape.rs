//! What a language's documents look like: tables of keys, what is expected at each, and since when. A tree is held against a
//! table once; what is wrong is told, all of it, and what comes out has the table's keys alone, in the table's order, its
//! scalars resolved. Whatever works on the tree afterwards can rely on it.

use crate::{
    node::{Map, Node, Position, Value},
    report::{Place, Report},
};

/// What is expected at a place.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Shape {
    Text,
    /// An integer. YAML's may be octal (0644, 0o644), hexadecimal (0x1a4) or binary.
    Int,
    Bool,
    List(&'static Shape),
    /// A map with these keys.
    Struct(&'static [Field]),
}

/// A key that a map may have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    /// First and last version of the language that has it; the number's meaning is the language's.
    since: u8,
    until: u8,
}

pub(crate) const fn field(name: &'static str, shape: Shape) -> Field {
    Field {
        name,
        shape,
        since: 0,
        until: u8::MAX,
    }
}

pub(crate) const fn text(name: &'static str) -> Field {
    field(name, Shape::Text)
}

pub(crate) const fn int(name: &'static str) -> Field {
    field(name, Shape::Int)
}

pub(crate) const fn boolean(name: &'static str) -> Field {
    field(name, Shape::Bool)
}

/// A list of texts.
pub(crate) const fn texts(name: &'static str) -> Field {
    field(name, Shape::List(&Shape::Text))
}

/// A map with keys of its own.
pub(crate) const fn section(name: &'static str, fields: &'static [Field]) -> Field {
    field(name, Shape::Struct(fields))
}

/// A list of such maps: `list("files", &Shape::Struct(FILE))`.
pub(crate) const fn list(name: &'static str, element: &'static Shape) -> Field {
    field(name, Shape::List(element))
}

impl Field {
    /// Not before this version.
    pub(crate) const fn since(self, version: u8) -> Self {
        Self { since: version, ..self }
    }

    /// Not after this version.
    pub(crate) const fn until(self, version: u8) -> Self {
        Self { until: version, ..self }
    }

    /// Whether this version has it.
    pub(crate) fn is_in(&self, version: u8) -> bool {
        (self.since..=self.until).contains(&version)
    }
}

/// A language's document, and how its versions are called.
pub(crate) struct Language {
    pub(crate) fields: &'static [Field],
    /// The name of a version, as in `3.2.0`.
    pub(crate) version_name: fn(u8) -> String,
}

impl Language {
    /// Holds the document against the language as it was in `version`: of every key that it does not know there is a warning,
    /// of everything that is not what is expected an error. Null says nothing and is left out.
    pub(crate) fn shape(&self, node: Node, version: u8, report: &mut Report) -> Node {
        self.shape_at(node, version, &Place::ROOT, report)
    }

    /// As [`Self::shape`], for a part of a document that is a language with versions of its own.
    pub(crate) fn shape_at(&self, node: Node, version: u8, place: &Place<'_>, report: &mut Report) -> Node {
        let mut shaper = Shaper {
            language: self,
            version,
            report,
        };
        shaper
            .fields(node, self.fields, place)
            .unwrap_or_else(|| Node::ours(Map::new()))
    }
}

struct Shaper<'a> {
    language: &'a Language,
    version: u8,
    report: &'a mut Report,
}

impl Shaper<'_> {
    fn node(&mut self, node: Node, shape: Shape, place: &Place<'_>) -> Option<Node> {
        match shape {
            _ if node.value == Value::Null => None,
            Shape::Text => self.text(node, place),
            Shape::Int => self.int(node, place),
            Shape::Bool => self.boolean(node, place),
            Shape::List(element) => self.list(node, *element, place),
            Shape::Struct(fields) => self.fields(node, fields, place),
        }
    }

    fn wrong(&mut self, node: &Node, place: &Place<'_>, expected: &str) -> Option<Node> {
        let message = format!("{expected} is expected here, not {}", what(&node.value));
        self.report.error(node, place, message);
        None
    }

    fn text(&mut self, node: Node, place: &Place<'_>) -> Option<Node> {
        let position = node.position;
        match node.value {
            Value::Text(text) | Value::Plain(text) => Some(Node::at(position, text)),
            _ => self.wrong(&node, place, "text"),
        }
    }

    fn int(&mut self, node: Node, place: &Place<'_>) -> Option<Node> {
        match &node.value {
            Value::Int(_) => Some(node),
            Value::Plain(text) => match parse_int(text) {
                Some(number) => Some(Node::at(node.position, number)),
                None => self.wrong(&node, place, "an integer"),
            },
            _ => self.wrong(&node, place, "an integer"),
        }
    }

    fn boolean(&mut self, node: Node, place: &Place<'_>) -> Option<Node> {
        match &node.value {
            Value::Bool(_) => Some(node),
            Value::Plain(text) => match parse_bool(text) {
                Some(value) => Some(Node::at(node.position, value)),
                None => self.wrong(&node, place, "true or false"),
            },
            _ => self.wrong(&node, place, "true or false"),
        }
    }

    fn list(&mut self, node: Node, element: Shape, place: &Place<'_>) -> Option<Node> {
        let position = node.position;
        let Value::List(items) = node.value else {
            return self.wrong(&node, place, "a list");
        };
        // An element that is wrong leaves its place empty, so that those after it keep their numbers.
        let shaped = items.into_iter().enumerate().map(|(index, item)| {
            let position = item.position;
            let empty = matches!(element, Shape::Struct(_)).then(Map::new);
            let place = place.index(index);
            if item.value == Value::Null {
                self.report.error(&item, &place, "is empty");
            }
            self.node(item, element, &place)
                .unwrap_or_else(|| Node::at(position, empty.map_or(Value::Null, Value::from)))
        });
        Some(Node::at(position, shaped.collect::<Vec<_>>()))
    }

    fn fields(&mut self, node: Node, fields: &'static [Field], place: &Place<'_>) -> Option<Node> {
        let position = node.position;
        let Value::Map(map) = node.value else {
            return self.wrong(&node, place, "a map");
        };
        let mut found: Vec<Option<(Option<Position>, Node)>> = fields.iter().map(|_| None).collect();
        for (key, position, value) in map.into_entries() {
            let position = position.or(value.position);
            let place = place.key(&key);
            match fields
                .iter()
                .position(|field| field.name == key && field.is_in(self.version))
            {
                Some(index) => {
                    let value = self.node(value, fields[index].shape, &place);
                    found[index] = value.map(|value| (position, value));
                }
                None => {
                    let message = self.unknown(&key, fields);
                    self.report.warning(&Node::at(position, Value::Null), &place, message);
                }
            }
        }
        let mut shaped = Map::new();
        for (field, value) in fields.iter().zip(found) {
            if let Some((position, value)) = value {
                shaped.push(field.name, position, value);
            }
        }
        Some(Node::at(position, shaped))
    }

    /// Why the key means nothing here.
    fn unknown(&self, key: &str, fields: &[Field]) -> String {
        let name = |version| (self.language.version_name)(version);
        let here = name(self.version);
        match fields.iter().find(|field| field.name == key) {
            Some(field) if field.since > self.version => {
                format!("is not in {here}: it came with {}", name(field.since))
            }
            Some(field) => format!("is not in {here}: {} was the last to have it", name(field.until)),
            None => match similar(key, fields.iter().filter(|field| field.is_in(self.version))) {
                Some(known) => format!("is no key of {here} and is passed over; is `{known}` meant?"),
                None => format!("is no key of {here} and is passed over"),
            },
        }
    }
}

/// A known key that differs by case and separators alone, or by one letter.
fn similar<'a>(key: &str, fields: impl Iterator<Item = &'a Field>) -> Option<&'static str> {
    let plain = |text: &str| text.replace(['_', '-'], "").to_ascii_lowercase();
    let wanted = plain(key);
    let mut names = fields.map(|field| field.name);
    names.find(|name| {
        let name = plain(name);
        name == wanted || (wanted.len() > 3 && wanted.len() < 64 && differs_by_one(&name, &wanted))
    })
}

/// Whether one letter added, left out or changed makes one the other.
fn differs_by_one(one: &str, other: &str) -> bool {
    let (one, other) = (one.as_bytes(), other.as_bytes());
    let (short, long) = if one.len() <= other.len() {
        (one, other)
    } else {
        (other, one)
    };
    let same = short.iter().zip(long).take_while(|(a, b)| a == b).count();
    match long.len() - short.len() {
        0 => short[(same + 1).min(short.len())..] == long[(same + 1).min(long.len())..],
        1 => short[same..] == long[same + 1..],
        _ => false,
    }
}

/// What kind of thing a value is. The value itself is not said: a configuration holds secrets, and more people read a report.
fn what(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Int(_) => "a number",
        Value::Plain(text) if parse_bool(text).is_some() => "true or false",
        Value::Plain(text) if parse_int(text).is_some() || text.parse::<f64>().is_ok() => "a number",
        Value::Text(_) | Value::Plain(_) => "a text",
        Value::List(_) => "a list",
        Value::Map(_) => "a map",
    }
}

/// An integer as YAML 1.1 and 1.2 write it. (<https://yaml.org/type/int.html>, without base 60.)
pub(crate) fn parse_int(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let digits = digits.replace('_', "");
    let bases = [("0x", 16), ("0X", 16), ("0o", 8), ("0b", 2), ("0", 8)];
    let (digits, base) = bases
        .iter()
        .find_map(|(prefix, base)| Some((digits.strip_prefix(prefix).filter(|rest| !rest.is_empty())?, *base)))
        .unwrap_or((&digits, 10));
    if !digits.starts_with(|c: char| c.is_digit(base)) {
        return None;
    }
    let number = i128::from_str_radix(digits, base).ok()?;
    i64::try_from(if negative { -number } else { number }).ok()
}

/// <https://yaml.org/type/bool.html>
pub(crate) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" | "y" | "Y" => Some(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" | "n" | "N" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text;

    const FILE: Shape = Shape::Struct(&[super::text("path"), int("mode"), boolean("overwrite").since(2)]);
    const LANGUAGE: Language = Language {
        fields: &[list("files", &FILE), texts("names")],
        version_name: |version| format!("1.{version}"),
    };

    fn shaped(text: &str) -> (String, String) {
        let mut report = Report::default();
        let node = text::parse_yaml(text, &mut report).unwrap();
        let node = LANGUAGE.shape(node, 1, &mut report);
        (node.to_json(), report.to_string())
    }

    #[test]
    fn scalars_are_resolved_and_keys_are_in_order() {
        let (json, report) = shaped("names: [1, \"2\", true]\nfiles: [{mode: 0644, path: 7}]\n");
        assert_eq!(json, r#"{"files":[{"path":"7","mode":420}],"names":["1","2","true"]}"#);
        assert_eq!(report, "");
    }

    #[test]
    fn everything_that_is_wrong_is_told() {
        let (_, report) =
            shaped("files:\n  - {mode: \"0644\"}\n  - {paths: /a, overwrite: true}\nnames: {}\nnothing: 1\n");
        assert_eq!(
            report,
            "error: line 2, column 12: files.0.mode: an integer is expected here, not a text\n\
             warning: line 3, column 6: files.1.paths: is no key of 1.1 and is passed over; is `path` meant?\n\
             warning: line 3, column 17: files.1.overwrite: is not in 1.1: it came with 1.2\n\
             error: line 4, column 8: names: a list is expected here, not a map\n\
             warning: line 5, column 1: nothing: is no key of 1.1 and is passed over"
        );
    }

    #[rstest::rstest]
    #[case("files: s3cret", "files: a list is expected here, not a text")]
    #[case("files: [s3cret]", "files.0: a map is expected here, not a text")]
    #[case(
        "files: [{mode: \"s3cret\"}]",
        "files.0.mode: an integer is expected here, not a text"
    )]
    #[case(
        "files: [{mode: yes}]",
        "files.0.mode: an integer is expected here, not true or false"
    )]
    #[case("files: 3.5", "files: a list is expected here, not a number")]
    fn a_report_does_not_quote_values(#[case] text: &str, #[case] expected: &str) {
        let (_, report) = shaped(text);
        assert!(report.ends_with(expected), "{report}");
    }

    #[rstest::rstest]
    #[case("0644", Some(420))]
    #[case("0o644", Some(420))]
    #[case("0x1F", Some(31))]
    #[case("1_000", Some(1000))]
    #[case("-12", Some(-12))]
    #[case("0", Some(0))]
    #[case("9223372036854775808", None)]
    #[case("1e3", None)]
    #[case("--1", None)]
    #[case("", None)]
    fn integers(#[case] text: &str, #[case] expected: Option<i64>) {
        assert_eq!(parse_int(text), expected);
    }
}
