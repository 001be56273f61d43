//! QEMU: its command line ([`arguments`]), its process ([`process`]) and its control socket ([`qmp`]).

pub mod arguments;
pub mod process;
pub mod qmp;
