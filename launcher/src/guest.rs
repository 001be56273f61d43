//! An operating system on disk that machines boot.

/// A guest whose files stand complete.
#[derive(Debug, Clone)]
pub struct Guest {}
