//! The protocol between the host and the agent inside the guest: messages and service generated from
//! `protos/agent.proto`, and the constants that both sides must agree on. Nothing else.

#[allow(clippy::all, clippy::pedantic, clippy::unwrap_used, missing_docs, unreachable_pub)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

pub mod carry;
pub mod frame;
pub mod mux;
pub mod output_window;

pub use generated::{agent, agent_ttrpc};

/// Number of this protocol. It grows whenever host and agent of different numbers could misunderstand each other.
pub const PROTOCOL: u32 = 9;

/// vsock port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;
/// vsock port on which the agent takes stream connections.
pub const STREAM_PORT: u32 = 1025;
/// vsock port on which the agent takes connections that are to go to a port of the guest's loopback: [`carry`].
pub const FORWARD_PORT: u32 = 1027;
/// vsock port of the host (CID 2) that the agent dials when it serves, unless the kernel argument [`READY_PORT_ARGUMENT`]
/// names another.
pub const READY_PORT: u32 = 1026;
/// Kernel argument with the vsock port that waits for the agent's greeting: `coreos_kvm.ready_port=1026`.
pub const READY_PORT_ARGUMENT: &str = "coreos_kvm.ready_port";

/// Kernel argument of a machine that is to be saved as a template: `coreos_kvm.template=1`. Its clones have it too, for they
/// have its memory.
pub const TEMPLATE_ARGUMENT: &str = "coreos_kvm.template";
/// Name of a virtio-serial port of templates and their clones: the agent says there that it is quiet and may be saved (`TemplateQuiet`,
/// `TemplateReady`), and is told there who it is when it wakes up (`Awakening`). After that, in a clone without vsock, all connections are on it: [`mux`].
pub const AGENT_SERIAL_PORT: &str = "coreos-kvm.agent";
/// Name of another one: in a clone without virtiofs it carries the FUSE requests of the share's mount to the host, and the replies
/// back, one after the other as linux/fuse.h has them.
pub const SHARE_SERIAL_PORT: &str = "coreos-kvm.share";
/// Name of the one on which guest and host wake each other while output comes in memory that they share: [`output_window`].
pub const OUTPUT_SERIAL_PORT: &str = "coreos-kvm.output";
/// Longest message about waking on [`AGENT_SERIAL_PORT`], in bytes, the length before it left out.
pub const WAKE_MAX: usize = 16 * 1024;
/// Random bytes that a clone's kernel is given.
pub const SEED_LENGTH: usize = 64;

/// Word that opens the agent's greeting: `coreos-kvm-agent <PROTOCOL> <version> [network] [sandbox]\n`, and the guest's wall clock, read when the
/// connection is there, in nanoseconds since the epoch (i64, big endian). The host may answer by what is to be added to that, in the same
/// way, and closes.
pub const GREETING: &str = "coreos-kvm-agent";
/// Word of the greeting of a clone that has done `Awakening.network`: it needs not be asked to.
pub const NETWORK_DONE: &str = "network";
/// The same of `Awakening.sandbox`.
pub const SANDBOX_DONE: &str = "sandbox";
/// Longest line of a greeting, newline included, in bytes.
pub const GREETING_MAX: usize = 128;

/// Longest message of the ttrpc protocol, in bytes.
pub const MESSAGE_MAX: usize = 4 * 1024 * 1024;

/// Serial number of the virtio-blk disk that carries the agent (at most 20 bytes, virtio 1.2, section 5.2.6).
pub const AGENT_DISK_SERIAL: &str = "coreos-kvm-agent";
/// Tag of the virtiofs share between pod and guest.
pub const SHARED_TAG: &str = "coreos-kvm";
/// Where the agent mounts the share in the guest.
pub const SHARED_MOUNT: &str = "/run/coreos-kvm/shared";
/// `container_id` of processes in the guest's own namespaces.
pub const GUEST_CONTAINER_ID: &str = "guest";
