//! What became of a template's clones, and when it is left alone for that.

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// Clones of one template that may fail one after the other before it is left alone, and for how long: each costs its machine time.
const FAILURES_MAX: u32 = 3;
const LEFT_ALONE: Duration = Duration::from_secs(3600);

/// What became of a template's clones.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uses {
    /// Clones that came up.
    pub clones: u64,
    /// Those that did not, and whose machines booted instead.
    pub failures: u64,
    /// How many of these since the last that came up.
    pub failures_in_a_row: u32,
    /// Why the last one did not, and when that was, in seconds since the epoch.
    pub last_failure: Option<String>,
    pub last_failure_at: u64,
}

impl Uses {
    /// Why the template is not used now; None where it may be.
    pub(crate) fn left_alone(&self) -> Option<String> {
        let since = Duration::from_secs(now().saturating_sub(self.last_failure_at));
        if self.failures_in_a_row < FAILURES_MAX || since > LEFT_ALONE {
            return None;
        }
        Some(format!(
            "the last {} attempts with its template failed, the last one {} min ago ({}); `coreos-kvm template build` makes a new one",
            self.failures_in_a_row,
            since.as_secs() / 60,
            self.last_failure.as_deref().unwrap_or("it is not known why")
        ))
    }

    /// Counts an attempt to clone: None, it came up; else why it did not.
    pub(super) fn note(&mut self, failure: Option<String>) {
        match failure {
            None => {
                self.clones += 1;
                self.failures_in_a_row = 0;
            }
            Some(why) => {
                self.failures += 1;
                self.failures_in_a_row += 1;
                self.last_failure = Some(why);
                self.last_failure_at = now();
            }
        }
    }
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
