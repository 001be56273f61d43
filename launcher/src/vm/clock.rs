//! The guest's wall clock: right as soon as its agent answers, and as long as the machine lives. A guest that boots has read a clock of
//! whole seconds; a clone has been told the time by a message that may have been long under way; later a guest goes by a counter, of which it
//! has once measured the frequency, and which stands still while the machine is paused.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep},
};

use super::VmExit;
use crate::{
    agent::{AgentClient, AgentError},
    machine::MachineId,
};

/// An answer that took so long at most tells the guest's time well enough: it is wrong by half of that.
const QUICK: Duration = Duration::from_millis(20);
/// On a busy host no answer may be quick; the quickest of so many counts.
const ATTEMPTS: u32 = 8;
/// What a clock may be wrong by, in nanoseconds.
const SLACK_NS: i64 = 2_000_000;
/// Between two looks at the clock of a running machine. A counter that is wrong by 100 millionths leads it astray by 30 ms meanwhile.
const KEPT: Duration = Duration::from_secs(300);
/// What a running clock makes up for by running faster or slower, in nanoseconds: no program sees it jump.
const SLOWLY_NS: i64 = 100_000_000;

/// Sets the guest's clock by the host's. What the guest says of its time is not trusted with anything but its own clock.
///
/// # Errors
/// When the agent does not do it.
pub(super) async fn synchronize(agent: &AgentClient) -> Result<(), AgentError> {
    correct(agent, 0).await
}

/// Keeps it right until the machine ends, and has a look as often as it is woken.
pub(super) async fn keep(
    machine: MachineId,
    agent: Arc<AgentClient>,
    woken: Arc<Notify>,
    mut exit: watch::Receiver<Option<VmExit>>,
) {
    loop {
        tokio::select! {
            () = sleep(KEPT) => {}
            () = woken.notified() => {}
            _ = exit.wait_for(Option::is_some) => return,
        }
        // Of one that is paused, for example.
        if let Err(error) = correct(&agent, SLOWLY_NS).await {
            tracing::debug!(%machine, %error, "the guest's clock is not looked at");
        }
    }
}

/// What is less than `slowly_ns` is corrected slowly.
async fn correct(agent: &AgentClient, slowly_ns: i64) -> Result<(), AgentError> {
    let mut best: Option<(Duration, i64)> = None;
    for _ in 0..ATTEMPTS {
        let (wall, begin) = (now_ns(), Instant::now());
        let guest = agent.adjust_clock(0, false).await?;
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
            agent.adjust_clock(behind, behind.saturating_abs() < slowly_ns).await?;
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
