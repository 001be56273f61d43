//! The one door: a text of any language becomes an Ignition configuration.

use crate::{
    butane, clc,
    clc::Platform,
    cloud_config,
    cloud_config::Addresses,
    config::Config,
    files::{Files, NoFiles},
    kind::Kind,
    node::Node,
    report::Report,
    text,
    version::Version,
};

/// What the caller knows beside the text.
pub struct Options<'a> {
    /// The language; None to tell it from the content.
    pub kind: Option<Kind>,
    /// Whether warnings are errors.
    pub strict: bool,
    /// Where a Container Linux Config is to run, which its dynamic data depends on.
    pub platform: Option<Platform>,
    /// What `local` and `trees` refer to.
    pub files: &'a dyn Files,
    /// What a cloud-config's `$private_ipv4` and its kin stand for.
    pub addresses: Addresses,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self {
            kind: None,
            strict: false,
            platform: None,
            files: &NoFiles,
            addresses: Addresses::default(),
        }
    }
}

/// A text that was understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Transpiled {
    /// What it says, in the version of Ignition that its language stands for.
    pub config: Config,
    /// The language that it was in.
    pub kind: Kind,
    /// Warnings and infos; under `strict` infos alone.
    pub report: Report,
}

/// What a language's translation answers: a tree of Ignition of a version, not yet checked.
pub(crate) type Translation = (Version, Node);

/// Reads a configuration of any language.
///
/// # Errors
/// Everything that is wrong with it, with line and column in the text; under `strict` also what may not be meant.
pub fn transpile(text: &str, options: &Options<'_>) -> Result<Transpiled, Report> {
    let (kind, config, report) = read(text, options)?;
    if report.has_errors() || (options.strict && report.has_warnings()) {
        return Err(report);
    }
    Ok(Transpiled { config, kind, report })
}

impl Kind {
    /// The language of a text, told from its content, of which nothing more is checked.
    ///
    /// # Errors
    /// When it is in none, or too long, or no YAML or JSON.
    pub fn of(text: &str) -> Result<Self, Report> {
        tree(text, None, &mut Report::default()).map(|(kind, _)| kind)
    }
}

/// Without a byte order mark: Kubernetes and editors put it there.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

/// The tree of a text, and its language: the one that is `said`, else what its content tells.
fn tree(text: &str, said: Option<Kind>, report: &mut Report) -> Result<(Kind, Node), Report> {
    let text = without_mark(text);
    let said = said.or_else(|| Kind::of_first_line(text));
    if let Some(kind) = said {
        cloud_config::check_first_line(kind, text)?;
    }
    let tree = match said {
        Some(Kind::Script) => {
            text::check_length(text)?;
            Node::ours(text)
        }
        Some(Kind::Ignition) => text::parse_json(text, report)?,
        Some(_) => text::parse_yaml(text, report)?,
        None => text::parse(text, report)?,
    };
    let kind = match said {
        Some(kind) => kind,
        None => Kind::of_tree(&tree)?,
    };
    Ok((kind, tree))
}

fn read(text: &str, options: &Options<'_>) -> Result<(Kind, Config, Report), Report> {
    let mut report = Report::default();
    let (kind, tree) = tree(text, options.kind, &mut report)?;
    let (version, root) = match kind {
        Kind::Ignition => {
            let (config, report) = Config::from_raw(tree, report)?;
            return Ok((kind, config, report));
        }
        Kind::Butane => butane::translate(tree, options, &mut report),
        Kind::ContainerLinuxConfig => clc::translate(tree, options, &mut report),
        Kind::CloudConfig => cloud_config::translate(tree, options, &mut report),
        Kind::Script => cloud_config::translate_script(&tree, options, &mut report),
    }
    .ok_or_else(|| {
        let mut report = report.clone();
        report.sort();
        report
    })?;
    let mut found = Report::default();
    let config = Config::from_translation(version, root, &mut found);
    if !found.is_empty() {
        let text = without_mark(text);
        // Read once more rather than kept: most configurations are right.
        let source = text::parse(text, &mut Report::default()).unwrap_or_default();
        report.append(found.in_the_words_of(&source, config.root()));
    }
    report.sort();
    Ok((kind, config, report))
}
