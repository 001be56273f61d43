//! The guest's wall clock: right as soon as its agent answers. A guest that boots has read a clock of whole seconds; a clone has been
//! told the time by a message that may have been long under way.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::agent::{AgentClient, AgentError};

/// An answer that took so long at most tells the guest's time well enough: it is wrong by half of that.
const QUICK: Duration = Duration::from_millis(20);
/// On a busy host no answer may be quick; the quickest of so many counts.
const ATTEMPTS: u32 = 8;
/// What a clock may be wrong by, in nanoseconds.
const SLACK_NS: i64 = 2_000_000;

/// Sets the guest's clock by the host's. What the guest says of its time is not trusted with anything but its own clock.
///
/// # Errors
/// When the agent does not do it.
pub(super) async fn synchronize(agent: &AgentClient) -> Result<(), AgentError> {
    let mut best: Option<(Duration, i64)> = None;
    for _ in 0..ATTEMPTS {
        let (wall, begin) = (now_ns(), Instant::now());
        let guest = agent.adjust_clock(0).await?;
        let took = begin.elapsed();
        let half = i64::try_from(took.as_nanos() / 2).unwrap_or(i64::MAX);
        let behind = wall.saturating_add(half).saturating_sub(guest);
        if best.is_none_or(|(quickest, _)| took < quickest) {
            best = Some((took, behind));
        }
        if took < QUICK {
            break;
        }
    }
    match best {
        Some((took, behind)) if behind.saturating_abs() > SLACK_NS => {
            agent.adjust_clock(behind).await?;
            tracing::debug!(behind_ns = behind, ?took, "the guest's clock is set");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The host's wall clock, in nanoseconds since the epoch.
pub(super) fn now_ns() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}
