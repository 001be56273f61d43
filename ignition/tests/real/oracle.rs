//! The real libraries in one process (`ignition/oracle`), which answers hundreds of questions a second.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};

use crate::tools;

/// Which of the real things is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tool {
    /// Butane 0.28: any variant.
    Butane,
    /// The Container Linux Config Transpiler 0.9.
    Ct,
    /// Ignition 0.35: validates spec 2 and brings it to `version` (2.4).
    Ignition2,
    /// Ignition 0.35: appends the second configuration to the first.
    Ignition2Append,
    /// Ignition 2.26: validates spec 3 and brings it to `version` (3.6).
    Ignition3,
    /// Ignition 2.26: merges the second configuration, the child, into the first.
    Ignition3Merge,
    /// ign-converter: 2.x to `version`: 3.0 or 3.1.
    #[serde(rename = "convert-2to3")]
    Convert2To3,
    /// ign-converter: 3.0 to 3.2 to `version`: 2.2 or 2.4.
    #[serde(rename = "convert-3to2")]
    Convert3To2,
    /// ign-converter: at most 3.4 down to `version`: 3.3, 3.2 or 3.1.
    #[serde(rename = "convert-3to3")]
    Convert3To3,
    /// coreos-cloudinit 1.14.
    CloudConfig,
}

/// One configuration to be judged.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Question {
    id: String,
    tool: Tool,
    args: Arguments,
    text: String,
    second: String,
}

#[derive(Debug, Clone, Default, Serialize)]
struct Arguments {
    strict: bool,
    files_dir: String,
    platform: String,
    version: String,
    exact: bool,
    filesystems: BTreeMap<String, String>,
}

impl Question {
    pub(crate) fn new(tool: Tool, text: impl Into<String>) -> Self {
        let (text, second) = (text.into(), String::new());
        Self {
            id: String::new(),
            tool,
            args: Arguments::default(),
            text,
            second,
        }
    }

    /// What is appended to the text, or merged into it.
    pub(crate) fn with(mut self, second: impl Into<String>) -> Self {
        self.second = second.into();
        self
    }

    /// Findings are failures.
    pub(crate) fn strict(mut self) -> Self {
        self.args.strict = true;
        self
    }

    /// Where `local` and `trees` are looked up.
    pub(crate) fn files_dir(mut self, folder: &Path) -> Self {
        self.args.files_dir = folder.display().to_string();
        self
    }

    /// A Container Linux Config's platform.
    pub(crate) fn platform(mut self, platform: &str) -> Self {
        self.args.platform = platform.to_owned();
        self
    }

    /// Ignition's version that is wanted, `3.4.0`.
    pub(crate) fn version(mut self, version: &str) -> Self {
        self.args.version = version.to_owned();
        self
    }

    /// Only a configuration of that very version, none to be brought up to it.
    pub(crate) fn exact(mut self) -> Self {
        self.args.exact = true;
        self
    }

    /// Where a filesystem of spec 2 is mounted, for the way up to spec 3.
    pub(crate) fn filesystem(mut self, name: &str, path: &str) -> Self {
        self.args.filesystems.insert(name.to_owned(), path.to_owned());
        self
    }
}

/// What the real thing says.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Answer {
    id: String,
    /// None where the real program ends with an error.
    pub(crate) output: Option<String>,
    pub(crate) report: Vec<Finding>,
    error: String,
}

impl Answer {
    /// The output, or everything that was said against the question.
    pub(crate) fn into_result(self) -> Result<String, String> {
        let findings: String = self.report.iter().map(|finding| format!("\n{finding}")).collect();
        self.output.ok_or(format!("{}{findings}", self.error))
    }
}

/// One finding; `line` and `column` count from 1, 0 where the tool does not say.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Finding {
    /// `error`, `warning`, `info` or `deprecated`.
    pub(crate) severity: String,
    pub(crate) line: u64,
    pub(crate) column: u64,
    /// `$.storage.files.0.mode`; empty for spec 2, Container Linux Config and cloud-config.
    pub(crate) path: String,
    pub(crate) message: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            severity,
            line,
            column,
            path,
            message,
        } = self;
        write!(f, "{severity} at {line}:{column} {path}: {message}")
    }
}

/// The running program.
pub(crate) struct Oracle {
    child: Child,
    questions: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Oracle {
    pub(crate) fn start() -> Self {
        let mut child = Command::new(tools::go_program("oracle"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the oracle starts");
        let questions = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("a pipe was asked for"));
        Self {
            child,
            questions,
            answers,
        }
    }

    /// One answer.
    pub(crate) fn ask(&mut self, question: Question) -> Answer {
        self.ask_all(vec![question]).remove(0)
    }

    /// An answer for each question, in their order.
    pub(crate) fn ask_all(&mut self, mut questions: Vec<Question>) -> Vec<Answer> {
        for (index, question) in questions.iter_mut().enumerate() {
            question.id = index.to_string();
        }
        let pipe = self.questions.as_mut().expect("it is taken by drop alone");
        let answers = &mut self.answers;
        // Written beside the reading: pipes hold less than all questions or all answers.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for question in &questions {
                    let mut line = serde_json::to_vec(question).expect("a question is plain data");
                    line.push(b'\n');
                    pipe.write_all(&line).expect("the oracle reads");
                }
                pipe.flush().expect("the oracle reads");
            });
            questions
                .iter()
                .map(|question| {
                    let mut line = String::new();
                    answers.read_line(&mut line).expect("the oracle answers in UTF-8");
                    let answer: Answer = serde_json::from_str(&line).expect("the oracle answers in JSON");
                    assert_eq!(answer.id, question.id, "answers come in the order of the questions");
                    answer
                })
                .collect()
        })
    }
}

impl Drop for Oracle {
    fn drop(&mut self) {
        // The end of its input is its end.
        drop(self.questions.take());
        let _ = self.child.wait();
    }
}
