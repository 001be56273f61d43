//! The files a node is configured by: containerd's, CNI's, and this runtime's.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Place;
use crate::artifacts::{self, Containerd};
use crate::cri::COREOS_KVM;
use crate::image;

/// The shim's program.
const SHIM: &str = "containerd-shim-coreos-kvm-v2";

/// Who makes the sandboxes of an entry's pods: `sandboxer` in containerd's configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sandboxer {
    /// containerd itself, as containers, by the Task API.
    #[default]
    PodSandbox,
    /// The shim, by the Sandbox API.
    Shim,
}

impl Sandboxer {
    pub const ALL: [Self; 2] = [Self::PodSandbox, Self::Shim];

    /// containerd's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::PodSandbox => "podsandbox",
            Self::Shim => "shim",
        }
    }

    /// Whether this containerd has it.
    pub fn is_in(self, version: Containerd) -> bool {
        self == Self::PodSandbox || version >= Containerd::V2_1
    }
}

impl std::str::FromStr for Sandboxer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|sandboxer| text == sandboxer.name())
            .ok_or_else(|| format!("there is no sandboxer {text}, only podsandbox and shim"))
    }
}

/// One entry of this runtime in containerd's configuration, with a config.toml of its own.
#[derive(Debug, Clone)]
pub struct Handler {
    name: String,
    /// Keys of config.toml and their values as TOML.
    settings: BTreeMap<String, String>,
    sandboxer: Sandboxer,
    /// Its configuration is named by the environment, and containerd's entry has no options.
    without_options: bool,
}

impl Handler {
    /// The handler `coreos-kvm` as an admin installs it, on a machine that may or may not have KVM.
    pub fn standard() -> Self {
        Self {
            name: COREOS_KVM.to_owned(),
            settings: BTreeMap::new(),
            sandboxer: Sandboxer::default(),
            without_options: false,
        }
    }

    /// A further one, which differs by what [`Self::set`] says.
    pub fn variant(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            ..Self::standard()
        }
    }

    /// Sets a key of config.toml, to a value as it stands in TOML.
    pub fn set(mut self, key: &str, value: impl Into<String>) -> Self {
        self.settings.insert(key.to_owned(), value.into());
        self
    }

    /// Has its sandboxes made by another than containerd itself.
    pub fn sandboxer(mut self, sandboxer: Sandboxer) -> Self {
        self.sandboxer = sandboxer;
        self
    }

    /// Has containerd's entry be one without options.
    pub fn without_options(mut self) -> Self {
        self.without_options = true;
        self
    }

    /// containerd 2.x takes them for runc's, where the shim makes sandboxes and for user namespaces, and then starts no container.
    fn has_options(&self) -> bool {
        self.sandboxer == Sandboxer::PodSandbox && !self.without_options
    }

    /// The file that the handler is configured by.
    pub fn config_path(&self, place: &Place) -> PathBuf {
        place.base().join(format!("{}.toml", self.name))
    }

    /// Its entry in containerd's configuration.
    fn entry(&self, place: &Place) -> String {
        let runtime = format!(
            r#"plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{}"#,
            self.name
        );
        let runtime_type = if self.has_options() { COREOS_KVM } else { &self.name };
        let mut further = match self.sandboxer {
            Sandboxer::PodSandbox => String::new(),
            Sandboxer::Shim => "sandboxer = \"shim\"\n".to_owned(),
        };
        if self.has_options() {
            further += &format!("  [{runtime}.options]\n  ConfigPath = {:?}", self.config_path(place));
        }
        format!(
            r#"
[{runtime}]
  runtime_type = "io.containerd.{runtime_type}.v2"
  pod_annotations = ["coreos-kvm.io/*"]
  container_annotations = ["coreos-kvm.io/*"]
  privileged_without_host_devices = true
  {further}
"#
        )
    }

    fn config(&self, place: &Place) -> Result<String> {
        let text = |path: PathBuf| format!("{:?}", path.display().to_string());
        let mut settings = BTreeMap::from([
            ("guests_dir".to_owned(), text(place.guests())),
            ("kubelet_dir".to_owned(), text(place.kubelet())),
            ("agent_disk".to_owned(), text(artifacts::agent_disk()?)),
            ("template_dir".to_owned(), text(artifacts::templates())),
            ("virtiofsd".to_owned(), text(artifacts::tool("virtiofsd")?)),
            (
                "vhost_device_vsock".to_owned(),
                text(artifacts::tool("vhost-device-vsock")?),
            ),
            ("share_server".to_owned(), text(artifacts::program("coreos-kvm-share")?)),
        ]);
        settings.extend(self.settings.clone());
        Ok(settings
            .iter()
            .map(|(key, value)| format!("{key} = {value}\n"))
            .collect())
    }
}

pub(super) fn write(place: &Place, version: Containerd, handlers: &[Handler]) -> Result<()> {
    link_programs(place, version, handlers)?;
    if !handlers.is_empty() {
        symlink(artifacts::guests()?.join("reference"), place.guests().join("reference"))
            .context("linking the guest")?;
    }
    for handler in handlers {
        write_file(&handler.config_path(place), &handler.config(place)?)?;
    }
    write_file(&place.cni_config().join("10-bridge.conflist"), &cni_config(place))?;
    write_file(&place.containerd_config(), &containerd_config(place, handlers)?)
}

fn write_file(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// containerd finds shims by its PATH.
fn link_programs(place: &Place, version: Containerd, handlers: &[Handler]) -> Result<()> {
    let folder = artifacts::containerd(version)?;
    let mut programs = ["containerd", "ctr", "containerd-shim-runc-v2"]
        .map(|name| folder.join(name))
        .to_vec();
    programs.push(artifacts::runc()?);
    for handler in handlers {
        let shim = artifacts::program(SHIM)?;
        if handler.has_options() {
            programs.push(shim);
            continue;
        }
        let path = place.programs().join(format!("containerd-shim-{}-v2", handler.name));
        let config = handler.config_path(place);
        write_file(
            &path,
            &format!("#!/bin/sh\nCOREOS_KVM_CONFIG={config:?} exec {shim:?} \"$@\"\n"),
        )?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    if !handlers.is_empty() {
        programs.push(artifacts::program("coreos-kvm")?);
    }
    programs.sort();
    programs.dedup();
    for program in programs {
        let name = program
            .file_name()
            .with_context(|| format!("{} has no name", program.display()))?;
        symlink(&program, place.programs().join(name)).with_context(|| format!("linking {}", program.display()))?;
    }
    Ok(())
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
fn containerd_config(place: &Place, handlers: &[Handler]) -> Result<String> {
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

[{cri}.registry]
  config_path = {registries:?}

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
        registries = place.registries(),
        runc = artifacts::runc()?,
    );
    text.extend(handlers.iter().map(|handler| handler.entry(place)));
    Ok(text)
}
