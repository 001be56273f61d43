//! Configurations of Container Linux in, one validated Ignition configuration out. Pure: no files, no network, no clock; the
//! same text gives the same bytes. The text is not trusted: its size and depth are bounded.
//!
//! - [`v3`]: raw Ignition 3.x: reading, checking, and bringing it to a version that the guest accepts
//! - [`merge`](merge()): one configuration over another, by Ignition's own rules
//! - [`report`]: what is wrong, where, in a sentence

mod check;
mod merge;
pub mod report;
pub mod v3;

pub use merge::merge;
pub use report::Report;
pub use v3::Config;
