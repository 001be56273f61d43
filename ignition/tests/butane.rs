//! The whole of Butane: every text of the corpus is read as its own comments say.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use coreos_kvm_ignition::{
    Files, Kind, Options, Report, Transpiled, TreeEntry, TreeEntryKind, report::Severity, transpile,
};

/// The files that configurations of the corpus name.
struct CorpusFiles;

impl Files for CorpusFiles {
    fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        fs::read(corpus("files").join(path)).map_err(|error| error.to_string())
    }

    fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        let top = corpus("files").join(path);
        let mut entries = Vec::new();
        walk(&top, &top, &mut entries).map_err(|error| error.to_string())?;
        Ok(entries)
    }
}

fn walk(top: &Path, directory: &Path, entries: &mut Vec<TreeEntry>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path)?;
        let kind = if metadata.is_dir() {
            TreeEntryKind::Directory
        } else if metadata.is_symlink() {
            let target = fs::read_link(&path)?.to_str().unwrap().to_owned();
            TreeEntryKind::Link { target }
        } else {
            let executable = metadata.permissions().mode() & 0o100 != 0;
            TreeEntryKind::File { executable }
        };
        let below = path.strip_prefix(top).unwrap().to_str().unwrap().to_owned();
        entries.push(TreeEntry { path: below, kind });
        if metadata.is_dir() {
            walk(top, &path, entries)?;
        }
    }
    Ok(())
}

fn corpus(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(folder)
}

/// Names and contents of a folder's configurations.
fn configurations(folder: &str) -> Vec<(String, String)> {
    let mut found: Vec<_> = fs::read_dir(corpus(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "bu"))
        .map(|path| {
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            (name, fs::read_to_string(&path).unwrap())
        })
        .collect();
    found.sort();
    found
}

/// What comments of the form `# key: path: part` say: paths and parts.
fn said<'a>(text: &'a str, key: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
    text.lines()
        .filter_map(move |line| line.strip_prefix("# ")?.strip_prefix(key)?.strip_prefix(": "))
        .map(|said| said.split_once(": ").unwrap_or((said, "")))
}

fn read(text: &str) -> Result<Transpiled, Report> {
    let options = Options {
        files: &CorpusFiles,
        ..Options::default()
    };
    transpile(text, &options)
}

/// Whether the report says what the comments of the text say.
fn check(name: &str, text: &str, severity: Severity, report: &Report) {
    let key = severity.to_string();
    for (path, part) in said(text, &key) {
        let mut entries = report.entries().iter().filter(|entry| entry.severity == severity);
        let found = entries.any(|entry| entry.path == path && entry.message.contains(part));
        assert!(found, "{name}: `{path}: {part}` is not in\n{report}");
    }
    for entry in report.entries() {
        assert!(entry.position.is_some(), "{name}: without a place: {entry}");
    }
}

/// Of a configuration that is right nothing is said but what its comments say.
fn check_nothing_else(name: &str, text: &str, report: &Report) {
    for entry in report.entries() {
        let expected = said(text, "warning").any(|(path, part)| entry.path == path && entry.message.contains(part));
        assert!(expected, "{name}: nobody expects\n{entry}");
    }
}

#[test]
fn every_configuration_is_read() {
    let all = configurations("butane");
    assert!(all.len() >= 50, "the corpus is not there: {}", all.len());
    for (name, text) in all {
        let transpiled = read(&text).unwrap_or_else(|report| panic!("{name}:\n{report}"));
        assert_eq!(transpiled.kind, Kind::Butane, "{name}");
        check(&name, &text, Severity::Warning, &transpiled.report);
        check_nothing_else(&name, &text, &transpiled.report);
        let version = transpiled.config.version().to_string();
        let expected = match name.split('-').take(2).collect::<Vec<_>>()[..] {
            ["fcos", "1.0"] => "3.0.0",
            ["fcos", "1.1"] => "3.1.0",
            ["fcos", "1.2" | "1.3"] => "3.2.0",
            ["fcos", "1.4"] | ["flatcar", "1.0"] => "3.3.0",
            ["fcos", "1.5"] | ["flatcar", "1.1"] => "3.4.0",
            ["fcos", "1.6"] => "3.5.0",
            ["fcos", "1.7"] => "3.6.0",
            _ => panic!("{name} says neither variant nor version"),
        };
        assert_eq!(version, expected, "{name}");
        assert_eq!(transpiled, read(&text).unwrap(), "{name} differs from time to time");
    }
}

#[test]
fn everything_that_is_wrong_is_told_where_it_is() {
    for (name, text) in configurations("butane/wrong") {
        let report = match read(&text) {
            Err(report) => report,
            Ok(transpiled) => panic!("{name} is taken for right: {}", transpiled.config.to_json()),
        };
        assert!(
            said(&text, "error").next().is_some(),
            "{name} does not say what is wrong"
        );
        check(&name, &text, Severity::Error, &report);
    }
}

#[test]
fn without_files_whatever_is_local_is_refused() {
    for (name, text) in configurations("butane") {
        let needs_files = ["local: ", "ssh_authorized_keys_local: ["]
            .iter()
            .any(|key| text.contains(key));
        if needs_files {
            let report = transpile(&text, &Options::default()).expect_err(&name).to_string();
            assert!(report.contains("--files-dir"), "{name}:\n{report}");
        }
    }
}

#[test]
fn a_text_that_is_cut_off_or_has_lost_a_line_does_no_harm() {
    for (_, text) in configurations("butane") {
        let lines: Vec<_> = text.lines().collect();
        for cut in 0..lines.len() {
            let _ = read(&lines[..cut].join("\n"));
            let _ = read(&[&lines[..cut], &lines[cut + 1..]].concat().join("\n"));
        }
    }
}
