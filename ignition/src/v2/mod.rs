//! Ignition 2.0 to 2.4.

mod append;
mod check;
mod shape;
mod to_v3;

pub(crate) use append::append;
pub(crate) use check::check;
pub(crate) use shape::LANGUAGE;
pub(crate) use to_v3::to_v3;
