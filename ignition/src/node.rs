//! A configuration as a tree whose nodes know where they stand in the user's text. Every language is read into it, translated
//! within it, and written from it; a node that is moved keeps its position, so that whatever is found wrong in the outcome is
//! told where the user wrote it.

use std::fmt;

use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

/// A place in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// From 1.
    pub line: u32,
    /// In characters, from 1.
    pub column: u32,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, column {}", self.line, self.column)
    }
}

/// A value and where it stands.
#[derive(Debug, Clone, Default)]
pub(crate) struct Node {
    /// None where it does not come from the user's text.
    pub(crate) position: Option<Position>,
    pub(crate) value: Value,
}

/// Two nodes are equal when they say the same, wherever they stand.
impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) enum Value {
    #[default]
    Null,
    Bool(bool),
    Int(i64),
    Text(String),
    /// A scalar without quotes. What it is depends on what is expected at its place: [`crate::shape`] decides.
    Plain(String),
    List(Vec<Node>),
    Map(Map),
}

impl Node {
    /// A value of the user's.
    pub(crate) fn at(position: Option<Position>, value: impl Into<Value>) -> Self {
        Self {
            position,
            value: value.into(),
        }
    }

    /// A value that is not the user's.
    pub(crate) fn ours(value: impl Into<Value>) -> Self {
        Self::at(None, value)
    }

    pub(crate) fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(crate) fn as_int(&self) -> Option<i64> {
        match self.value {
            Value::Int(number) => Some(number),
            _ => None,
        }
    }

    pub(crate) fn as_bool(&self) -> Option<bool> {
        match self.value {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }

    pub(crate) fn as_map(&self) -> Option<&Map> {
        match &self.value {
            Value::Map(map) => Some(map),
            _ => None,
        }
    }

    pub(crate) fn as_map_mut(&mut self) -> Option<&mut Map> {
        match &mut self.value {
            Value::Map(map) => Some(map),
            _ => None,
        }
    }

    pub(crate) fn as_list_mut(&mut self) -> Option<&mut Vec<Node>> {
        match &mut self.value {
            Value::List(items) => Some(items),
            _ => None,
        }
    }

    /// The elements of a list; none for anything else.
    pub(crate) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            _ => &[],
        }
    }

    /// The value of a key of a map; None for anything else.
    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.as_map()?.get(key)
    }

    /// The node at a path of keys, as in `node.find(&["storage", "files"])`.
    pub(crate) fn find(&self, path: &[&str]) -> Option<&Node> {
        path.iter().try_fold(self, |node, key| node.get(key))
    }

    /// The text of a key of a map.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_text()
    }

    /// As JSON, without blanks.
    pub(crate) fn to_json(&self) -> String {
        self.write(CompactFormatter)
    }

    /// As JSON, indented by two blanks.
    pub(crate) fn to_json_pretty(&self) -> String {
        self.write(PrettyFormatter::new())
    }

    fn write(&self, mut formatter: impl Formatter) -> String {
        let mut bytes = Vec::new();
        // Writing to a vector cannot fail, and what is written is text.
        let _ = write(self, &mut formatter, &mut bytes);
        String::from_utf8(bytes).unwrap_or_default()
    }
}

fn write(node: &Node, formatter: &mut impl Formatter, out: &mut Vec<u8>) -> std::io::Result<()> {
    match &node.value {
        Value::Null => formatter.write_null(out),
        Value::Bool(value) => formatter.write_bool(out, *value),
        Value::Int(number) => formatter.write_i64(out, *number),
        Value::Text(text) | Value::Plain(text) => {
            serde_json::to_writer(out, text)?;
            Ok(())
        }
        Value::List(items) => {
            formatter.begin_array(out)?;
            for (index, item) in items.iter().enumerate() {
                formatter.begin_array_value(out, index == 0)?;
                write(item, formatter, out)?;
                formatter.end_array_value(out)?;
            }
            formatter.end_array(out)
        }
        Value::Map(map) => {
            formatter.begin_object(out)?;
            for (index, (key, value)) in map.iter().enumerate() {
                formatter.begin_object_key(out, index == 0)?;
                serde_json::to_writer(&mut *out, key)?;
                formatter.end_object_key(out)?;
                formatter.begin_object_value(out)?;
                write(value, formatter, out)?;
                formatter.end_object_value(out)?;
            }
            formatter.end_object(out)
        }
    }
}

/// Keys and values in the order in which they were put in. A look-up goes through all: maps of the languages are small, and
/// what reads a map of the user's own keys goes through it once.
#[derive(Debug, Clone, Default)]
pub(crate) struct Map(Vec<(Key, Node)>);

/// A key and where it stands.
#[derive(Debug, Clone)]
struct Key {
    position: Option<Position>,
    name: String,
}

/// Two maps are equal when they say the same, in whatever order.
impl PartialEq for Map {
    fn eq(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.iter().all(|(key, value)| other.get(key) == Some(value))
    }
}

impl Map {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Node> {
        self.iter().find(|(name, _)| *name == key).map(|(_, node)| node)
    }

    pub(crate) fn get_mut(&mut self, key: &str) -> Option<&mut Node> {
        self.0
            .iter_mut()
            .find(|(name, _)| name.name == key)
            .map(|(_, node)| node)
    }

    /// Replaces the value of the key, or puts it at the end.
    pub(crate) fn insert(&mut self, key: &str, node: Node) {
        match self.get_mut(key) {
            Some(existing) => *existing = node,
            None => self.push(key, None, node),
        }
    }

    /// The value of the key, which is made an empty map if it is missing or something else.
    pub(crate) fn map_mut(&mut self, key: &str) -> &mut Map {
        self.or_insert(key, |value| matches!(value, Value::Map(_)), || Map::new().into());
        match self.get_mut(key).map(|node| &mut node.value) {
            Some(Value::Map(map)) => map,
            _ => unreachable!("it was just put there"),
        }
    }

    /// The value of the key, which is made an empty list if it is missing or something else.
    pub(crate) fn list_mut(&mut self, key: &str) -> &mut Vec<Node> {
        self.or_insert(key, |value| matches!(value, Value::List(_)), || Vec::new().into());
        match self.get_mut(key).map(|node| &mut node.value) {
            Some(Value::List(items)) => items,
            _ => unreachable!("it was just put there"),
        }
    }

    fn or_insert(&mut self, key: &str, fits: impl Fn(&Value) -> bool, empty: impl Fn() -> Value) {
        if !self.get(key).is_some_and(|node| fits(&node.value)) {
            self.insert(key, Node::ours(empty()));
        }
    }

    pub(crate) fn remove(&mut self, key: &str) -> Option<Node> {
        let index = self.0.iter().position(|(name, _)| name.name == key)?;
        Some(self.0.remove(index).1)
    }

    /// Adds a key that is known to be new, with its own position.
    pub(crate) fn push(&mut self, key: &str, position: Option<Position>, node: Node) {
        let name = key.to_owned();
        self.0.push((Key { position, name }, node));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.0.iter().map(|(key, node)| (key.name.as_str(), node))
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut Node)> {
        self.0.iter_mut().map(|(key, node)| (key.name.as_str(), node))
    }

    /// Keys, where they stand, and their values, moved out.
    pub(crate) fn into_entries(self) -> impl Iterator<Item = (String, Option<Position>, Node)> {
        self.0.into_iter().map(|(key, node)| (key.name, key.position, node))
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i64> for Value {
    fn from(number: i64) -> Self {
        Self::Int(number)
    }
}

impl From<Vec<Node>> for Value {
    fn from(items: Vec<Node>) -> Self {
        Self::List(items)
    }
}

impl From<Map> for Value {
    fn from(map: Map) -> Self {
        Self::Map(map)
    }
}

impl<const N: usize> From<[(&str, Node); N]> for Map {
    fn from(entries: [(&str, Node); N]) -> Self {
        let mut map = Self::new();
        for (key, node) in entries {
            map.insert(key, node);
        }
        map
    }
}
