//! The files a node is configured by: containerd's, CNI's, and this runtime's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::Place;
use crate::artifacts::{self, Containerd};
use crate::image;

/// What a node is told about this runtime.
#[derive(Debug, Clone, Default)]
pub struct Runtime {
    /// Whether the runtime handler `coreos-kvm` is there; `runc` always is.
    pub installed: bool,
    /// Further lines of its config.toml.
    pub settings: String,
}

impl Runtime {
    /// As an admin installs it, on a machine that may or may not have KVM.
    pub fn installed() -> Self {
        Self { installed: true, settings: String::new() }
    }
}

pub(super) fn write(place: &Place, version: Containerd, runtime: &Runtime) -> Result<()> {
    link_programs(place, version, runtime)?;
    if runtime.installed {
        write_file(&place.runtime_config(), &runtime_config(runtime)?)?;
    }
    write_file(&place.cni_config().join("10-bridge.conflist"), &cni_config(place))?;
    write_file(&place.containerd_config(), &containerd_config(place, runtime)?)
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// containerd finds shims by its PATH.
fn link_programs(place: &Place, version: Containerd, runtime: &Runtime) -> Result<()> {
    let folder = artifacts::containerd(version)?;
    let mut programs = ["containerd", "ctr", "containerd-shim-runc-v2"].map(|name| folder.join(name)).to_vec();
    programs.push(artifacts::runc()?);
    if runtime.installed {
        programs.push(artifacts::program("containerd-shim-coreos-kvm-v2")?);
        programs.push(artifacts::program("coreos-kvm")?);
    }
    for program in programs {
        let name = program.file_name().with_context(|| format!("{} has no name", program.display()))?;
        symlink(&program, place.programs().join(name)).with_context(|| format!("linking {}", program.display()))?;
    }
    Ok(())
}

fn runtime_config(runtime: &Runtime) -> Result<String> {
    Ok(format!(
        "guests_dir = {guests:?}\nagent_disk = {agent:?}\nvirtiofsd = {virtiofsd:?}\nvhost_device_vsock = {vsock:?}\n{settings}",
        guests = artifacts::guests()?,
        agent = artifacts::agent_disk()?,
        virtiofsd = artifacts::tool("virtiofsd")?,
        vsock = artifacts::tool("vhost-device-vsock")?,
        settings = runtime.settings,
    ))
}

/// A bridge in the node's network, hostPorts by portmap.
fn cni_config(place: &Place) -> String {
    format!(
        r#"{{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {{
      "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
      "ipam": {{
        "type": "host-local", "dataDir": {data:?},
        "ranges": [[{{ "subnet": "10.88.0.0/16" }}], [{{ "subnet": "fd00:88::/64" }}]],
        "routes": [{{ "dst": "0.0.0.0/0" }}, {{ "dst": "::/0" }}]
      }}
    }},
    {{ "type": "portmap", "capabilities": {{ "portMappings": true }} }}
  ]
}}
"#,
        data = place.cni_data(),
    )
}

/// Version 2 of the format, which every containerd from 1.3 to 2.x reads.
fn containerd_config(place: &Place, runtime: &Runtime) -> Result<String> {
    let cri = r#"plugins."io.containerd.grpc.v1.cri""#;
    let mut text = format!(
        r#"version = 2
root = {root:?}
state = "/run/containerd"

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.internal.v1.opt"]
  path = {opt:?}

[{cri}]
  sandbox_image = {pause:?}
  # What a machine in a container or a small VM does not have.
  restrict_oom_score_adj = true
  disable_apparmor = true
  tolerate_missing_hugetlb_controller = true
  enable_unprivileged_ports = false
  enable_unprivileged_icmp = false
  netns_mounts_under_state_dir = true

[{cri}.cni]
  bin_dir = {cni_plugins:?}
  conf_dir = {cni_config:?}

[{cri}.containerd]
  snapshotter = "overlayfs"
  default_runtime_name = "runc"

[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [{cri}.containerd.runtimes.runc.options]
    BinaryName = {runc:?}
"#,
        root = place.root(),
        opt = place.base().join("opt"),
        pause = image::PAUSE,
        cni_plugins = artifacts::cni_plugins()?,
        cni_config = place.cni_config(),
        runc = artifacts::runc()?,
    );
    if runtime.installed {
        text += &format!(
            r#"
[{cri}.containerd.runtimes.coreos-kvm]
  runtime_type = "io.containerd.coreos-kvm.v2"
  pod_annotations = ["coreos-kvm.io/*"]
  container_annotations = ["coreos-kvm.io/*"]
  privileged_without_host_devices = true
  [{cri}.containerd.runtimes.coreos-kvm.options]
    ConfigPath = {config:?}
"#,
            config = place.runtime_config(),
        );
    }
    Ok(text)
}
