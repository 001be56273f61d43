//! Facts about this host that take long to find out: each is kept in a file, with that on which it depends.

use std::path::{Path, PathBuf};

use serde::{Serialize, de::DeserializeOwned};

/// One fact, in a file of the directory of the machines' states.
#[derive(Debug)]
pub(crate) struct Cache {
    path: PathBuf,
    /// What the fact depends on, as text: with another key it has to be found out anew.
    key: String,
}

impl Cache {
    pub(crate) fn new(directory: &Path, name: &str, key: String) -> Self {
        Self {
            path: directory.join(name),
            key,
        }
    }

    /// The fact, if it is known.
    pub(crate) fn read<T: DeserializeOwned>(&self) -> Option<T> {
        let bytes = crate::state::read_bounded(&self.path).ok()?;
        let (key, fact): (String, T) = serde_json::from_slice(&bytes).ok()?;
        (key == self.key).then_some(fact)
    }

    /// Keeps the fact. A failure costs whoever comes next the time to find it out, nothing more.
    pub(crate) fn write<T: Serialize>(&self, fact: &T) {
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let written = crate::state::make_state_dir(directory)
            .and_then(|()| crate::state::write_atomically(&self.path, &(&self.key, fact)));
        if let Err(error) = written {
            tracing::debug!(file = %self.path.display(), %error, "what was found out is not kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fact_holds_for_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let cache = |key: &str| Cache::new(directory.path(), "fact.json", key.to_owned());
        assert_eq!(cache("a").read::<u32>(), None);
        cache("a").write(&60);
        assert_eq!(cache("a").read(), Some(60));
        assert_eq!(cache("b").read::<u32>(), None);
        cache("b").write(&61);
        assert_eq!((cache("a").read::<u32>(), cache("b").read()), (None, Some(61)));
    }
}
