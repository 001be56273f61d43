//! `coreos-kvm transpile`: any configuration of a Container Linux to Ignition, in the place of `butane` and `ct`.

use std::{
    ffi::OsString,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use clap::Args;
use coreos_kvm_ignition::{Config, Kind, NoFiles, Options, Platform, Report, Version, transpile};

use crate::{input, local_files::LocalFiles};

const EXAMPLES: &str = "\
Examples:
  coreos-kvm transpile node.bu > node.ign
  coreos-kvm transpile --check --strict node.yaml
  coreos-kvm transpile --files-dir ./files --target-version 3.3.0 --pretty < node.bu
  coreos-kvm transpile --platform custom etcd.yaml

It takes the options of butane and ct (ct's with one dash, too), and under one of these names it is in their place.";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Transpile {
    /// The configuration; left out, or -, it is read from standard input.
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Fail on warnings, such as unknown keys.
    #[arg(short, long)]
    strict: bool,
    /// Indent the outcome.
    #[arg(short, long)]
    pretty: bool,
    /// Only say what is wrong; write nothing.
    #[arg(short, long)]
    check: bool,
    /// The directory of the files that `local` and `trees` refer to.
    #[arg(short = 'd', long, value_name = "DIRECTORY")]
    files_dir: Option<PathBuf>,
    /// Where a Container Linux Config is to run; its dynamic data ({PRIVATE_IPV4} and the like) depends on it.
    #[arg(long)]
    platform: Option<Platform>,
    /// The version of Ignition that is wanted; left out, it is the one that the language stands for.
    #[arg(long, value_name = "VERSION")]
    target_version: Option<Version>,
    /// The language: ignition, butane, container-linux-config, cloud-config, script; left out, the content tells.
    #[arg(long)]
    kind: Option<Kind>,
    /// Where the outcome is written; left out, it is standard output.
    #[arg(short, long, alias = "out-file", value_name = "FILE")]
    output: Option<PathBuf>,
    #[arg(long, alias = "input", hide = true, conflicts_with = "file")]
    in_file: Option<PathBuf>,
    /// Butane's: the outcome is never wrapped, so there is nothing to do.
    #[arg(short, long, hide = true)]
    raw: bool,
    /// Butane's: it has nothing more to say.
    #[arg(short = 'D', long, hide = true)]
    debug: bool,
}

/// The command line as `coreos-kvm` reads it: called by the name of one of the tools that it stands in for, it is
/// `coreos-kvm transpile`; options with one dash and a whole word, as ct has them, get a second one.
pub(crate) fn command_line(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut line: Vec<OsString> = arguments.into_iter().collect();
    let name = line.first().map(Path::new).and_then(Path::file_name);
    if name.is_some_and(|name| name == "butane" || name == "ct") {
        line.insert(1, "transpile".into());
    }
    if line.get(1).is_none_or(|verb| verb != "transpile") {
        return line;
    }
    const WORDS: [&str; 9] = [
        "-strict",
        "-pretty",
        "-platform",
        "-files-dir",
        "-in-file",
        "-out-file",
        "-version",
        "-help",
        "-check",
    ];
    for argument in &mut line[2..] {
        let word = argument.to_str().map(|text| text.split('=').next().unwrap_or_default());
        if word.is_some_and(|word| WORDS.contains(&word)) {
            let mut doubled = OsString::from("-");
            doubled.push(&*argument);
            *argument = doubled;
        }
    }
    line
}

impl Transpile {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let text = self.text()?;
        let local =
            match &self.files_dir {
                Some(path) => Some(LocalFiles::open(path).with_context(|| {
                    format!("opening the directory of local files {} (--files-dir)", path.display())
                })?),
                None => None,
            };
        let options = Options {
            kind: self.kind,
            strict: self.strict,
            platform: self.platform,
            files: local.as_ref().map_or(&NoFiles, |files| files),
            ..Options::default()
        };
        let config = match self.config(&text, &options) {
            Ok((config, report)) => {
                say(&report);
                config
            }
            Err(report) => {
                say(&report);
                if self.strict && !report.has_errors() {
                    eprintln!("coreos-kvm: with --strict, warnings are errors");
                }
                return Ok(ExitCode::FAILURE);
            }
        };
        if !self.check {
            self.write(&config)?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn config(&self, text: &str, options: &Options<'_>) -> Result<(Config, Report), Report> {
        let done = transpile(text, options)?;
        match self.target_version {
            Some(version) => Ok((done.config.for_guest(&[version])?, done.report)),
            None => Ok((done.config, done.report)),
        }
    }

    fn text(&self) -> anyhow::Result<String> {
        let path = self
            .file
            .as_ref()
            .or(self.in_file.as_ref())
            .map(PathBuf::as_path)
            .filter(|path| *path != Path::new("-"));
        input::read(path)
    }

    fn write(&self, config: &Config) -> anyhow::Result<()> {
        let mut json = if self.pretty {
            config.to_json_pretty()
        } else {
            config.to_json()
        };
        json.push('\n');
        match &self.output {
            Some(path) => fs::write(path, json).with_context(|| format!("writing {}", path.display())),
            None => io::stdout()
                .write_all(json.as_bytes())
                .context("writing to standard output"),
        }
    }
}

fn say(report: &Report) {
    if !report.is_empty() {
        eprintln!("{report}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("ct -strict -files-dir=x --pretty", "ct transpile --strict --files-dir=x --pretty")]
    #[case("/usr/bin/butane -p -d files a.bu", "/usr/bin/butane transpile -p -d files a.bu")]
    #[case("coreos-kvm transpile -platform custom", "coreos-kvm transpile --platform custom")]
    #[case("coreos-kvm exec a -- ls -check", "coreos-kvm exec a -- ls -check")]
    fn it_stands_in_for_other_tools(#[case] line: &str, #[case] expected: &str) {
        let read = command_line(line.split(' ').map(OsString::from));
        assert_eq!(read, expected.split(' ').map(OsString::from).collect::<Vec<_>>());
    }
}
