//! Ignition 3.0 to 3.6.

mod check;
mod convert;
mod merge;
mod shape;

pub(crate) use check::check;
pub(crate) use convert::convert;
pub(crate) use merge::merge;
pub(crate) use shape::LANGUAGE;
