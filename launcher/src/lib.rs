//! One virtual machine: its description, its QEMU, its devices, its agent. Knows nothing of containerd or pods.
//!
//! The way of the data, without turning back:
//! [`config`] (what the admin allows) and [`guest`] (an operating system on disk) → [`machine`] (the description, checked)
//! → [`provision`] (the user's Ignition merged with ours) → [`qemu::arguments`] (a pure function) → [`qemu::process`]
//! → [`vm`] (one running machine) → [`agent`] (the client of the agent inside).
