//! The text of a configuration, from a file or standard input, of bounded length.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use anyhow::{Context, bail};
use coreos_kvm_ignition::TEXT_MAX;

/// Reads the configuration at `path`, else from standard input. A pipe does, too.
///
/// # Errors
/// When it cannot be read, has more than [`TEXT_MAX`] bytes, or is not UTF-8.
pub(crate) fn read(path: Option<&Path>) -> anyhow::Result<String> {
    let name = path.map_or_else(|| "standard input".to_owned(), |path| path.display().to_string());
    let reading = || format!("reading {name}");
    let mut bytes = Vec::new();
    // One more than is taken: a longer text is refused, not cut.
    let limit = u64::try_from(TEXT_MAX)? + 1;
    match path {
        Some(path) => File::open(path)
            .with_context(reading)?
            .take(limit)
            .read_to_end(&mut bytes),
        None => io::stdin().lock().take(limit).read_to_end(&mut bytes),
    }
    .with_context(reading)?;
    if bytes.len() > TEXT_MAX {
        bail!("{name} has more than {TEXT_MAX} bytes, which is the longest configuration that is read");
    }
    String::from_utf8(bytes).map_err(|error| {
        anyhow::anyhow!(
            "{name} is not text: byte {} is not UTF-8",
            error.utf8_error().valid_up_to()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_that_is_too_long_is_refused_and_not_cut() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = |length| std::fs::write(file.path(), "#".repeat(length)).unwrap();
        text(TEXT_MAX);
        assert_eq!(read(Some(file.path())).unwrap().len(), TEXT_MAX);
        text(TEXT_MAX + 1);
        let error = read(Some(file.path())).unwrap_err().to_string();
        assert!(error.contains("more than 16777216 bytes"), "{error}");
        // It has no end, and says that its length is 0.
        let error = read(Some(Path::new("/dev/zero"))).unwrap_err().to_string();
        assert!(error.contains("more than 16777216 bytes"), "{error}");
    }

    #[test]
    fn what_is_no_text_is_told_with_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc\xff").unwrap();
        let error = read(Some(file.path())).unwrap_err().to_string();
        assert!(error.ends_with("is not text: byte 3 is not UTF-8"), "{error}");
    }
}
