//! The library that is tried, on a case of the corpus.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use coreos_kvm_ignition::{Files, Kind, Options, TreeEntry, TreeEntryKind, transpile};

use crate::corpus::{Case, Language, Outcome, files_dir};

/// The Ignition configuration that the library makes of a case, or its report.
pub(crate) fn outcome(case: &Case) -> Outcome {
    let kind = match case.language {
        Language::Ignition => Kind::Ignition,
        Language::ContainerLinuxConfig => Kind::ContainerLinuxConfig,
        Language::Butane => Kind::Butane,
        Language::CloudConfig if case.text.starts_with("#!") => Kind::Script,
        Language::CloudConfig => Kind::CloudConfig,
    };
    let platform = case
        .platform()
        .map(|name| name.parse().expect("a comment names a known platform"));
    let options = Options {
        kind: Some(kind),
        platform,
        files: &CorpusFiles,
        ..Options::default()
    };
    transpile(&case.text, &options)
        .map(|done| done.config.to_json())
        .map_err(|report| report.to_string())
}

/// The files that configurations of the corpus name.
struct CorpusFiles;

impl Files for CorpusFiles {
    fn read(&self, path: &str) -> Result<Vec<u8>, String> {
        fs::read(files_dir().join(path)).map_err(|error| error.to_string())
    }

    fn walk(&self, path: &str) -> Result<Vec<TreeEntry>, String> {
        let top = files_dir().join(path);
        let mut entries = Vec::new();
        walk(&top, &top, &mut entries).map_err(|error| error.to_string())?;
        entries.sort_by(|one, other| one.path.cmp(&other.path));
        Ok(entries)
    }
}

fn walk(top: &Path, folder: &Path, entries: &mut Vec<TreeEntry>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let data = entry.metadata()?;
        let kind = if data.is_dir() {
            walk(top, &entry.path(), entries)?;
            TreeEntryKind::Directory
        } else if data.is_symlink() {
            TreeEntryKind::Link {
                target: fs::read_link(entry.path())?.display().to_string(),
            }
        } else {
            TreeEntryKind::File {
                executable: data.permissions().mode() & 0o100 != 0,
            }
        };
        let path = entry
            .path()
            .strip_prefix(top)
            .expect("it is below")
            .display()
            .to_string();
        entries.push(TreeEntry { path, kind });
    }
    Ok(())
}
