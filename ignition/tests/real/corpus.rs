//! The configurations of `ignition/corpus`: a folder a language, in it a file a configuration; those that have to be refused
//! are in its folder `wrong`. What `local` and `trees` refer to is in `corpus/files`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::oracle::{Oracle, Question, Tool};
use crate::{debian, expectation, same, tree};

/// The language that a case is written in, by the corpus's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Language {
    Ignition,
    ContainerLinuxConfig,
    Butane,
    CloudConfig,
}

impl Language {
    pub(crate) const ALL: [Self; 4] = [
        Self::Ignition,
        Self::ContainerLinuxConfig,
        Self::Butane,
        Self::CloudConfig,
    ];

    fn folder(self) -> &'static str {
        match self {
            Self::Ignition => "ignition",
            Self::ContainerLinuxConfig => "clc",
            Self::Butane => "butane",
            Self::CloudConfig => "cloud-config",
        }
    }
}

/// One configuration of the corpus.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) language: Language,
    /// Its path in the corpus.
    pub(crate) name: String,
    pub(crate) text: String,
    /// Whether it has to be refused.
    pub(crate) wrong: bool,
}

impl Case {
    /// Whether only this library refuses it: coreos-cloudinit passes over what it does not know, so that its word does not
    /// tell what is wrong.
    pub(crate) fn is_wrong_here_alone(&self) -> bool {
        self.language == Language::CloudConfig || REFUSED_BY_THE_LIBRARY_ALONE.contains(&self.name.as_str())
    }

    /// The platform that a Container Linux Config names in a comment (`# platform: ec2`).
    pub(crate) fn platform(&self) -> Option<&str> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix("# platform: "))
            .map(str::trim)
    }
}

/// What the library made of a case: the Ignition configuration, or what it said against it.
pub(crate) type Outcome = Result<String, String>;

/// Where `local` and `trees` are looked up.
pub(crate) fn files_dir() -> PathBuf {
    corpus().join("files")
}

/// What the real things take and the library refuses on purpose: variants and versions that are no Container Linux.
const REFUSED_BY_THE_LIBRARY_ALONE: [&str; 3] = [
    "butane/wrong/variant-fiot.bu",
    "butane/wrong/variant-r4e.bu",
    "butane/wrong/version-experimental.bu",
];

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

/// All configurations of a language, by name.
pub(crate) fn cases(language: Language) -> Vec<Case> {
    let folder = corpus().join(language.folder());
    let mut cases = Vec::new();
    for (folder, wrong) in [(folder.clone(), false), (folder.join("wrong"), true)] {
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.expect("an entry of the corpus").path();
            if !path.is_file() {
                continue;
            }
            let name = path
                .strip_prefix(corpus())
                .expect("it is in the corpus")
                .display()
                .to_string();
            let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            cases.push(Case {
                language,
                name,
                text,
                wrong,
            });
        }
    }
    cases.sort_by(|one, other| one.name.cmp(&other.name));
    cases
}

/// What the real things say to each case: what they make of it, or that they refuse it.
pub(crate) fn real_outcomes(oracle: &mut Oracle, cases: &[Case]) -> Vec<Outcome> {
    let questions = cases.iter().map(question).collect();
    oracle
        .ask_all(questions)
        .into_iter()
        .map(|answer| answer.into_result())
        .collect()
}

fn question(case: &Case) -> Question {
    let text = case.text.as_str();
    match case.language {
        Language::Butane => Question::new(Tool::Butane, text).files_dir(&files_dir()),
        Language::ContainerLinuxConfig => Question::new(Tool::Ct, text)
            .platform(case.platform().unwrap_or_default())
            .files_dir(&files_dir()),
        Language::CloudConfig => Question::new(Tool::CloudConfig, text),
        Language::Ignition => validation(text),
    }
}

/// What the oracle is asked about a raw Ignition configuration: to judge it as what it says it is.
fn validation(config: &str) -> Question {
    let version = version_of(config);
    let tool = if version.starts_with("2.") {
        Tool::Ignition2
    } else {
        Tool::Ignition3
    };
    let question = Question::new(tool, config);
    // An unknown version is the oracle's to refuse.
    if tool == Tool::Ignition2 || !version.starts_with("3.") {
        question
    } else {
        question.version(&version).exact()
    }
}

fn version_of(config: &str) -> String {
    let config: Value = serde_json::from_str(config).unwrap_or_default();
    config
        .pointer("/ignition/version")
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

/// What came of holding the library against the real things.
#[derive(Debug, Default)]
pub(crate) struct Verdict {
    /// Everything on which they disagree, each with its case's name.
    pub(crate) disagreements: Vec<String>,
    /// How many configurations were judged.
    pub(crate) cases: usize,
    /// How many of them Ignition wrote a tree of.
    pub(crate) trees: usize,
}

/// Holds the library against the real things on these cases.
pub(crate) fn judge(oracle: &mut Oracle, cases: &[Case], library: &dyn Fn(&Case) -> Outcome, verdict: &mut Verdict) {
    for (case, real) in cases.iter().zip(real_outcomes(oracle, cases)) {
        verdict.cases += 1;
        let ours = library(case);
        let found = match (&ours, &real) {
            (Err(_), Ok(_)) if case.wrong && !case.is_wrong_here_alone() => {
                vec!["it is in `wrong`, and the real thing takes it".to_owned()]
            }
            (Err(_), _) if case.wrong => vec![],
            (Ok(_), _) if case.wrong => vec!["it is in `wrong`, and the library takes it".to_owned()],
            (_, Err(real)) => vec![format!("the real thing refuses it: {real}")],
            (Err(ours), Ok(_)) => vec![format!("the library refuses what the real thing takes: {ours}")],
            (Ok(ours), Ok(real)) => {
                let transpiled = matches!(case.language, Language::Butane | Language::ContainerLinuxConfig);
                let mut found = if transpiled {
                    same::differences(real, ours)
                } else {
                    vec![]
                };
                match judge_output(oracle, ours) {
                    Ok(Some(differences)) => {
                        verdict.trees += 1;
                        found.extend(differences);
                    }
                    Ok(None) => {}
                    Err(error) => found.push(error),
                }
                found
            }
        };
        verdict
            .disagreements
            .extend(found.into_iter().map(|what| format!("{}: {what}", case.name)));
    }
}

/// What of the tree that Ignition writes is not what the configuration says; None where no real Ignition that is here writes
/// it: above 3.3, and of 2.x what spec 3 cannot say.
///
/// # Errors
/// What Ignition has against the configuration.
pub(crate) fn judge_output(oracle: &mut Oracle, config: &str) -> Result<Option<Vec<String>>, String> {
    oracle
        .ask(validation(config))
        .into_result()
        .map_err(|error| format!("Ignition refuses the output: {error}"))?;
    let version = version_of(config);
    if debian::KNOWN.contains(&version.as_str()) {
        debian::validate(config).map_err(|error| format!("ignition-validate refuses the output: {error}"))?;
        return judge_tree(config).map(Some);
    }
    if !version.starts_with("2.") {
        return Ok(None);
    }
    // Where spec 3 can say the same, what the real converter makes of it is written in its place.
    match oracle.ask(Question::new(Tool::Convert2To3, config)).into_result() {
        Ok(converted) => judge_tree(&converted).map(Some),
        Err(_) => Ok(None),
    }
}

fn judge_tree(config: &str) -> Result<Vec<String>, String> {
    let tree = tree::write_tree(config).map_err(|log| format!("ignition fails: {log}"))?;
    Ok(if refers_to_others(config) {
        expectation::differences(&without_references(&tree.merged).to_string(), &tree)
    } else {
        expectation::differences(config, &tree)
    })
}

fn refers_to_others(config: &str) -> bool {
    let config: Value = serde_json::from_str(config).unwrap_or_default();
    let config = config.pointer("/ignition/config");
    config.is_some_and(|config| config.get("merge").is_some() || config.get("replace").is_some())
}

/// What Ignition merged still names what it merged.
fn without_references(merged: &Value) -> Value {
    let mut merged = merged.clone();
    if let Some(ignition) = merged.get_mut("ignition").and_then(Value::as_object_mut) {
        ignition.remove("config");
    }
    merged
}
