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
    vsock::GuestClock,
};

/// An answer that took so long at most tells the guest's time well enough: it is wrong by half of that.
const QUICK: Duration = Duration::from_millis(20);
/// On a busy host no answer may be quick; the quickest of so many counts.
const ATTEMPTS: u32 = 8;
/// What a clock may be wrong by when its guest comes up, in nanoseconds.
const SLACK_NS: i64 = 2_000_000;
/// And later: a guest with a time service of its own is left to that, as long as it agrees with the host.
const KEPT_NS: i64 = 20_000_000;
/// Between two looks at the clock of a running machine. A counter that is wrong by 100 millionths leads it astray by 30 ms meanwhile.
const KEPT: Duration = Duration::from_secs(300);
/// And when it could not be looked at.
const AGAIN: Duration = Duration::from_secs(30);
/// What a running clock makes up for by running faster or slower, in nanoseconds: no program sees it jump.
const SLOWLY_NS: i64 = 100_000_000;

/// Sets the guest's clock by the host's. What the guest says of its time is not trusted with anything but its own clock. Its greeting may
/// have said it soon enough: then nobody waits until it is set, which is before the guest does anything else that it is asked for.
///
/// # Errors
/// When the agent does not do it.
pub(super) async fn synchronize(greeted: Option<GuestClock>, agent: &AgentClient) -> Result<(), AgentError> {
    if let Some(clock) = greeted
        && clock.took < QUICK
    {
        let Look { behind, .. } = Look::new(since_epoch_ns(clock.asked), clock.took, clock.ns);
        match clock.add(behind).await {
            Ok(()) => {
                tracing::debug!(behind_ns = behind, "the guest's clock is set by its greeting");
                return Ok(());
            }
            Err(error) => tracing::debug!(%error, "the guest's greeting is not answered"),
        }
    }
    let Look { behind, .. } = look(agent).await?;
    if behind.saturating_abs() > SLACK_NS {
        set(agent, behind, false).await?;
    }
    Ok(())
}

/// Keeps it right until the machine ends, and has a look as often as it is woken.
pub(super) async fn keep(
    machine: MachineId,
    agent: Arc<AgentClient>,
    woken: Arc<Notify>,
    mut exit: watch::Receiver<Option<VmExit>>,
) {
    let mut next = KEPT;
    loop {
        tokio::select! {
            () = sleep(next) => {}
            () = woken.notified() => {}
            _ = exit.wait_for(Option::is_some) => return,
        }
        next = KEPT;
        // Of one that is paused, for example.
        if let Err(error) = correct(&agent).await {
            tracing::debug!(%machine, %error, "the guest's clock is not looked at");
            next = AGAIN;
        }
    }
}

async fn correct(agent: &AgentClient) -> Result<(), AgentError> {
    let look = look(agent).await?;
    match look.correction() {
        Some(slowly) => set(agent, look.behind, slowly).await,
        None => Ok(()),
    }
}

/// How far the guest's clock is behind the host's, and how wrong that may be, in nanoseconds.
#[derive(Debug, Clone, Copy)]
struct Look {
    behind: i64,
    uncertain: i64,
}

impl Look {
    /// Of a guest that was asked at `asked`, in nanoseconds since the epoch, and whose answer was there after `took`.
    fn new(asked: i64, took: Duration, answer: i64) -> Self {
        let uncertain = i64::try_from(took.as_nanos() / 2).unwrap_or(i64::MAX);
        let behind = asked.saturating_add(uncertain).saturating_sub(answer);
        Self { behind, uncertain }
    }

    /// Whether a running clock is to be corrected slowly or at once; None for one that is right, as far as can be seen.
    fn correction(self) -> Option<bool> {
        let wrong = self.behind.saturating_abs();
        (wrong > KEPT_NS.max(self.uncertain)).then(|| wrong <= SLOWLY_NS.saturating_add(self.uncertain))
    }
}

async fn look(agent: &AgentClient) -> Result<Look, AgentError> {
    let mut best: Option<Look> = None;
    for _ in 0..ATTEMPTS {
        let (wall, begin) = (now_ns(), Instant::now());
        let guest = agent.adjust_clock(0, false).await?;
        let took = begin.elapsed();
        let look = Look::new(wall, took, guest);
        if best.is_none_or(|best| look.uncertain < best.uncertain) {
            best = Some(look);
        }
        if took < QUICK {
            break;
        }
    }
    Ok(best.unwrap_or(Look {
        behind: 0,
        uncertain: i64::MAX,
    }))
}

async fn set(agent: &AgentClient, behind_ns: i64, slowly: bool) -> Result<(), AgentError> {
    agent.adjust_clock(behind_ns, slowly).await?;
    tracing::debug!(behind_ns, slowly, "the guest's clock is set");
    Ok(())
}

/// The host's wall clock, in nanoseconds since the epoch.
pub(super) fn now_ns() -> i64 {
    since_epoch_ns(SystemTime::now())
}

fn since_epoch_ns(time: SystemTime) -> i64 {
    let time = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case::right(1, 1, None)]
    #[case::not_known_to_be_wrong(150, 200, None)]
    #[case::a_little(25, 1, Some(true))]
    #[case::a_little_ahead(-25, 1, Some(true))]
    #[case::much(500, 1, Some(false))]
    #[case::not_known_to_be_much(150, 60, Some(true))]
    fn a_running_clock_is_corrected_as_far_as_it_is_known_to_be_wrong(
        #[case] behind_ms: i64,
        #[case] uncertain_ms: i64,
        #[case] expected: Option<bool>,
    ) {
        let look = Look {
            behind: behind_ms * 1_000_000,
            uncertain: uncertain_ms * 1_000_000,
        };
        assert_eq!(look.correction(), expected);
    }
}
