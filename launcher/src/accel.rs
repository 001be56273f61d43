//! How QEMU runs the guest's instructions: on the processor (KVM) or translated (TCG), and how that is decided.

/// What the admin or the caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
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
