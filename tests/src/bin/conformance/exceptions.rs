//! The specs that a machine cannot pass although containers on the node's kernel do, and those that not even these pass on some containerd, each
//! with the reason.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// Before a containerd's version, and that before the name of a spec that runc fails on it.
pub(crate) const OF_CONTAINERD: &str = "containerd ";

/// Reasons by the specs' names.
pub(crate) type Exceptions = BTreeMap<String, String>;

pub(crate) fn read() -> Result<Exceptions> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("critest/exceptions.txt");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

/// A spec's name on a line, its reason on the indented lines that follow.
fn parse(text: &str) -> Result<Exceptions> {
    let mut exceptions = Exceptions::new();
    let mut spec = None;
    for line in text
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
    {
        if line.starts_with(' ') {
            let spec: &String = spec.as_ref().context("a reason comes after its spec")?;
            let reason = exceptions.entry(spec.clone()).or_default();
            if !reason.is_empty() {
                reason.push(' ');
            }
            reason.push_str(line.trim());
        } else {
            let name = spec.insert(line.trim_end().to_owned());
            exceptions.insert(name.clone(), String::new());
        }
    }
    if let Some((spec, _)) = exceptions.iter().find(|(_, reason)| reason.is_empty()) {
        anyhow::bail!("'{spec}' has no reason");
    }
    Ok(exceptions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_may_take_several_lines() {
        let exceptions = parse("# why\none spec\n  because it\n  has to\nanother\n  too\n").unwrap();
        assert_eq!(exceptions["one spec"], "because it has to");
        assert_eq!(exceptions["another"], "too");
    }

    #[test]
    fn an_exception_without_a_reason_is_refused() {
        assert!(parse("one spec\nanother\n  too\n").is_err());
    }
}
