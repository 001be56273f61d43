//! How QEMU runs the guest's instructions: on the processor (KVM) or translated (TCG), and how that is decided.
//!
//! That `/dev/kvm` opens proves nothing, nor does a guest that runs: there are nested KVMs that emulate every instruction.
//! They run a tiny guest, a thousand times slower than a processor, and never get a stock kernel through its boot. What
//! tells them apart is time, so a counted loop is timed ([`trial`]) before KVM is chosen.

use std::{
    fmt,
    fs::Metadata,
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
    time::Duration,
};

use serde::{Deserialize, Serialize};

mod processor;
pub mod trial;

pub use processor::Processor;
use trial::Verdict;

use crate::cache::Cache;

/// What the admin or the caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AccelerationChoice {
    /// KVM where it is proven to run guests at the processor's speed, else TCG.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// QEMU's own translation, which works everywhere.
    Tcg,
}

/// What is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Acceleration {
    Kvm,
    Tcg,
}

impl fmt::Display for Acceleration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// What the host is to its guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub acceleration: Acceleration,
    pub processor: Processor,
}

/// KVM was demanded where it cannot run a guest.
#[derive(Debug, thiserror::Error)]
#[error(
    "acceleration \"kvm\" is demanded, but KVM cannot run a guest here: {reason}; use \"auto\" or \"tcg\" in the configuration"
)]
pub struct AccelError {
    reason: String,
}

/// Longest wait for the trial. It takes 2 ms on a processor and some 0.1 s where KVM emulates; one that takes longer never ends.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(3);

const DEVICE: &str = "/dev/kvm";

/// Decides, and says why. The trial's outcome is kept in `cache_dir` until the host boots again, so that not each machine
/// pays for it.
///
/// # Errors
/// When `kvm` is demanded where it cannot run a guest.
pub async fn choose(choice: AccelerationChoice, cache_dir: &Path) -> Result<(Acceleration, String), AccelError> {
    if choice == AccelerationChoice::Tcg {
        return Ok((Acceleration::Tcg, "the configuration asks for it".to_owned()));
    }
    match (kvm_usable(cache_dir).await, choice) {
        (Ok(reason), _) => Ok((Acceleration::Kvm, reason)),
        (Err(reason), AccelerationChoice::Kvm) => Err(AccelError { reason }),
        (Err(reason), _) => Ok((Acceleration::Tcg, reason)),
    }
}

/// Whether KVM runs guests here; either way, the reason.
async fn kvm_usable(cache_dir: &Path) -> Result<String, String> {
    let device = match std::fs::metadata(DEVICE) {
        Ok(metadata) if metadata.file_type().is_char_device() => metadata,
        Ok(_) => return Err(format!("{DEVICE} is no device")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(format!("there is no {DEVICE}")),
        Err(error) => return Err(format!("{DEVICE} cannot be looked at: {error}")),
    };
    let cache = cache(cache_dir, &device);
    let verdict = match cache.as_ref().and_then(Cache::read) {
        Some(verdict) => verdict,
        None => {
            let verdict = timed_trial().await;
            // A busy host can make a good KVM look slow once; only what was measured is kept, and a hang is not.
            if let Some(cache) = &cache
                && !matches!(verdict, Verdict::Failed(_))
            {
                cache.write(&verdict);
            }
            verdict
        }
    };
    let reason = verdict.to_string();
    if !verdict.is_usable() {
        return Err(reason);
    }
    group_of(&device).map(|_| reason)
}

/// The trial, in a thread of its own: should the kernel never give it back, only that thread is lost, and not the machine.
async fn timed_trial() -> Verdict {
    let (answer, answered) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("kvm-trial".to_owned()).spawn(move || {
        // Nobody listens any more if the time is over.
        let _ = answer.send(trial::run());
    });
    if let Err(error) = thread {
        return Verdict::Failed(format!("the trial's thread cannot be started: {error}"));
    }
    match tokio::time::timeout(TRIAL_TIMEOUT, answered).await {
        Ok(Ok(verdict)) => verdict,
        Ok(Err(_)) => Verdict::Failed("the trial ended without a result".to_owned()),
        Err(_) => Verdict::Failed(format!("a tiny guest did not end within {} s", TRIAL_TIMEOUT.as_secs())),
    }
}

/// The group that the unprivileged QEMU has to be in to open /dev/kvm; None where everybody may.
///
/// # Errors
/// Why it cannot be opened, as a sentence.
pub fn kvm_group() -> Result<Option<u32>, String> {
    let device = std::fs::metadata(DEVICE).map_err(|error| format!("{DEVICE} cannot be looked at: {error}"))?;
    group_of(&device)
}

fn group_of(device: &Metadata) -> Result<Option<u32>, String> {
    match (device.mode() & 0o006, device.mode() & 0o060, device.gid()) {
        (0o006, _, _) => Ok(None),
        (_, 0o060, group) if group != 0 => Ok(Some(group)),
        (_, _, group) => Err(format!(
            "QEMU runs unprivileged and may not open {DEVICE} (mode {:o}, group {group}): \
             give it to a group of its own, as in `chgrp kvm {DEVICE} && chmod 660 {DEVICE}`",
            device.mode() & 0o777
        )),
    }
}

/// The trial's outcome on disk, valid for one boot of the host and one device.
fn cache(directory: &Path, device: &Metadata) -> Option<Cache> {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    // The device node is made anew when the kernel's module is loaded anew.
    let key = format!("{} {} {} {}", boot.trim(), device.rdev(), device.ino(), device.ctime());
    Some(Cache::new(directory, ".kvm-trial.json", key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn tcg_needs_no_trial() {
        let directory = tempfile::tempdir().unwrap();
        let (chosen, reason) = choose(AccelerationChoice::Tcg, directory.path()).await.unwrap();
        assert_eq!(
            (chosen, reason.as_str()),
            (Acceleration::Tcg, "the configuration asks for it")
        );
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn auto_and_kvm_agree_on_whether_kvm_runs_guests() {
        let directory = tempfile::tempdir().unwrap();
        let (chosen, reason) = choose(AccelerationChoice::Auto, directory.path()).await.unwrap();
        match (chosen, choose(AccelerationChoice::Kvm, directory.path()).await) {
            (Acceleration::Kvm, Ok((Acceleration::Kvm, again))) => assert_eq!(reason, again),
            (Acceleration::Tcg, Err(error)) => {
                assert!(error.to_string().contains(&reason), "{error}");
                assert!(error.to_string().contains("use \"auto\" or \"tcg\""), "{error}");
            }
            (chosen, other) => panic!("auto chose {chosen}, kvm answered {other:?}"),
        }
    }
}
