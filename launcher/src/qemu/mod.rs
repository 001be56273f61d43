//! QEMU: the program ([`program`]), its command line ([`arguments`], [`devices`]) and its control connection ([`qmp`]).

pub mod arguments;
pub mod devices;
pub mod plug;
pub mod program;
pub mod qmp;

// For the rooms that were built before a process had its own.
pub use crate::process;
