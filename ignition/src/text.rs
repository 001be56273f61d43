//! From text to a tree, YAML or JSON, within bounds that no text can break.

mod json;
mod yaml;

use crate::{node::Node, report::Report};

/// Longest text that is read, in bytes.
pub const TEXT_MAX: usize = 16 << 20;
/// Most nodes that a text may have, aliases written out: a node takes some 100 bytes of memory.
const NODES_MAX: usize = 500_000;
/// Bytes of text that count as much as a node: an alias stands for a long text as well as for many nodes.
const NODE_BYTES: usize = 128;
/// Deepest nesting. Configurations have some ten levels.
const DEPTH_MAX: usize = 64;

/// The tree of a text of unknown kind. What begins with `{` is read as JSON, all else as YAML.
///
/// # Errors
/// When it is too long, has too many nodes, is nested too deep, or is neither.
pub(crate) fn parse(text: &str, report: &mut Report) -> Result<Node, Report> {
    if text.trim_start().starts_with('{') {
        parse_json(text, report)
    } else {
        parse_yaml(text, report)
    }
}

/// As [`parse`], for a text that is to be JSON.
pub(crate) fn parse_json(text: &str, report: &mut Report) -> Result<Node, Report> {
    check_length(text)?;
    json::parse(text, report)
}

/// As [`parse`], for a text that is to be YAML, of which JSON is a part.
pub(crate) fn parse_yaml(text: &str, report: &mut Report) -> Result<Node, Report> {
    check_length(text)?;
    yaml::parse(text, report)
}

/// # Errors
/// When the text is too long.
pub(crate) fn check_length(text: &str) -> Result<(), Report> {
    if text.len() <= TEXT_MAX {
        return Ok(());
    }
    let message = format!(
        "the configuration has {} bytes; at most {TEXT_MAX} are read",
        text.len()
    );
    Err(Report::of(None, "", message))
}

fn too_many_nodes() -> String {
    format!("the configuration has more than {NODES_MAX} values, aliases written out")
}

fn too_deep() -> String {
    format!("the configuration is nested deeper than {DEPTH_MAX} levels")
}
