//! One configuration after another.

use super::LANGUAGE;
use crate::{
    node::{Map, Node},
    shape::{Field, Shape},
};

/// The two as one, as Ignition appends what `ignition.config.append` names: lists are one after the other, of anything else
/// the later one's is taken, where it has it. Of `ignition.config` and the proxies the later one's is taken even where it
/// has none.
pub(crate) fn append(first: &Node, second: &Node) -> Node {
    sections(Some(first), Some(second), LANGUAGE.fields)
}

fn sections(first: Option<&Node>, second: Option<&Node>, fields: &[Field]) -> Node {
    let mut out = Map::new();
    for field in fields {
        let (before, after) = (
            first.and_then(|map| map.get(field.name)),
            second.and_then(|map| map.get(field.name)),
        );
        let value = match (field.name, field.shape, before, after) {
            ("config" | "httpProxy" | "httpsProxy", _, _, after) => after.cloned(),
            (_, Shape::Struct(fields), Some(_), _) => Some(sections(before, after, fields)),
            (_, Shape::List(_), Some(before), Some(after)) => {
                let items: Vec<Node> = before.items().iter().chain(after.items()).cloned().collect();
                Some(Node::at(after.position.or(before.position), items))
            }
            (_, _, before, after) => after.or(before).cloned(),
        };
        if let Some(value) = value {
            out.push(field.name, None, value);
        }
    }
    let position = |node: Option<&Node>| node.and_then(|node| node.position);
    Node::at(position(second).or(position(first)), out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{report::Report, text};
    use rstest::rstest;

    #[rstest]
    #[case::lists_are_one_after_the_other(
        r#"{"systemd":{"units":[{"name":"a"}]}}"#,
        r#"{"systemd":{"units":[{"name":"a"}]},"passwd":{"users":[{"name":"u"}]}}"#,
        r#"{"passwd":{"users":[{"name":"u"}]},"systemd":{"units":[{"name":"a"},{"name":"a"}]}}"#
    )]
    #[case::the_later_value_wins(
        r#"{"ignition":{"timeouts":{"httpResponseHeaders":1,"httpTotal":2}}}"#,
        r#"{"ignition":{"timeouts":{"httpTotal":3}}}"#,
        r#"{"ignition":{"timeouts":{"httpResponseHeaders":1,"httpTotal":3}}}"#
    )]
    #[case::of_what_is_fetched_and_how_the_later_says_all(
        r#"{"ignition":{"config":{"append":[{"source":"a"}]},"proxy":{"httpProxy":"p","noProxy":["a"]}}}"#,
        r#"{"ignition":{"proxy":{"httpsProxy":"q","noProxy":["b"]}}}"#,
        r#"{"ignition":{"proxy":{"httpsProxy":"q","noProxy":["a","b"]}}}"#
    )]
    fn the_second_follows_the_first(#[case] first: &str, #[case] second: &str, #[case] expected: &str) {
        let tree = |json| text::parse_json(json, &mut Report::default()).unwrap();
        assert_eq!(append(&tree(first), &tree(second)).to_json(), expected);
    }
}
