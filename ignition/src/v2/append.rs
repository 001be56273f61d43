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
