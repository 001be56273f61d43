//! One virtual machine: its description, its QEMU, its devices, its agent. Knows nothing of containerd or pods.
//!
//! The way of the data, without turning back:
//! [`config`] (what the admin allows) and [`guest`] (an operating system on disk) → [`machine`] (the description, checked)
//! → [`provision`] (the user's Ignition merged with ours) → [`carriage`] (how it reaches the guest) → [`qemu::arguments`] (a pure function) → [`process`]
//! → [`vm`] (one running machine) → [`agent`] (the client of the agent inside).
//!
//! A machine boots, or it is a clone of a [`template`], in which another one has booted before it.
//!
//! Around a machine: [`accel`] decides how QEMU runs the guest's instructions, [`vsock`] and [`virtiofs`] are its ways to
//! the host, [`share_server`] stands in for the latter in some clones, [`netdev`] its way into the pod's network, [`loopback`] the way from there to its loopback,
//! [`forward`] the way to it where it has QEMU's own, [`disk`] what it
//! may write to, [`user`] and [`cgroup`] the wall around its processes, [`console`]
//! what the guest prints, and [`state`] what is kept on disk so that a later process can find the machine or end it.

pub mod accel;
pub mod agent;
mod cache;
pub mod carriage;
pub mod cgroup;
pub mod config;
pub mod console;
pub mod disk;
pub mod forward;
pub mod guest;
pub mod loopback;
pub mod mac;
pub mod machine;
pub mod mountinfo;
pub mod netdev;
pub mod process;
pub mod program;
pub mod provision;
pub mod qemu;
mod sentence;
pub mod share_server;
pub mod size;
pub mod state;
pub mod template;
pub mod user;
pub mod virtiofs;
pub mod vm;
pub mod vsock;

pub use sentence::sentence;
