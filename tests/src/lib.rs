//! A node to try pods on, made of real parts and removed again: a containerd of a chosen version with its own network, mounts
//! and processes, images without a registry, a CRI client, and a look at what is left behind.
//!
//! - [`artifacts`]: where the built and downloaded parts are
//! - [`node`]: the node; [`node::init`] is the process that holds it together
//! - [`image`]: the test images; [`layout`]: how images are made and written
//! - [`registry`]: a registry inside a node, for what has to be pulled
//! - [`cri`] and [`pod`]: the Container Runtime Interface, as a kubelet speaks it; [`stream`]: interactive execs
//! - [`task`]: a container without the CRI
//! - [`http`]: a request to a pod
//! - [`events`]: what containerd publishes
//! - [`bare`]: QEMU by hand, to measure against
//! - [`leftovers`]: snapshots of a node, and the difference in words

pub mod artifacts;
pub mod bare;
pub mod cri;
pub mod events;
pub mod http;
pub mod image;
pub mod layout;
pub mod leftovers;
pub mod node;
pub mod pod;
pub mod registry;
pub mod stream;
pub mod task;
