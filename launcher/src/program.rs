//! Finding the programs that a machine needs on the node.

use std::path::{Path, PathBuf};

use nix::unistd::{AccessFlags, access};

/// Where distributions keep programs that are not for people, beside PATH.
const FURTHER: [&str; 3] = ["/usr/libexec", "/usr/local/libexec", "/usr/local/bin"];

/// A program that is not on this node.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    #[error("{what} is missing: {} is not there or not executable; install it, or name another path as `{key}` in the configuration", path.display())]
    Path {
        what: &'static str,
        key: &'static str,
        path: PathBuf,
    },
    #[error(
        "{what} is missing: no program {name:?} on PATH or in /usr/libexec; install it, or name its path as `{key}` in the configuration"
    )]
    Name {
        what: &'static str,
        key: &'static str,
        name: PathBuf,
    },
}

/// The path of the program that the configuration's key `key` names by path or by name. `what` says what it is, for the error.
///
/// # Errors
/// When there is no executable file.
pub fn find(what: &'static str, key: &'static str, program: &Path) -> Result<PathBuf, ProgramError> {
    let executable = |path: &Path| path.is_file() && access(path, AccessFlags::X_OK).is_ok();
    if program.is_absolute() {
        return if executable(program) {
            Ok(program.to_owned())
        } else {
            Err(ProgramError::Path {
                what,
                key,
                path: program.to_owned(),
            })
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .filter(|folder| folder.is_absolute())
        .chain(FURTHER.into_iter().map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| executable(path))
        .ok_or_else(|| ProgramError::Name {
            what,
            key,
            name: program.to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_looked_for_on_the_path() {
        assert!(find("the shell", "sh", Path::new("sh")).unwrap().is_absolute());
    }

    #[test]
    fn what_is_missing_is_named_with_its_key() {
        let error = find("QEMU", "qemu", Path::new("/nonexistent/qemu"))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("QEMU is missing: /nonexistent/qemu") && error.contains("`qemu`"),
            "{error}"
        );
        let error = find("QEMU", "qemu", Path::new("no-such-program"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("no program \"no-such-program\" on PATH"), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_executed_is_no_program() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(find("QEMU", "qemu", file.path()).is_err());
    }
}
