//! The files that the containers of a pod find in /etc, and their /dev/shm, where containerd leaves them to the shim: with the Sandbox
//! API. They are what its own sandboxes have (`internal/cri/server/podsandbox` in its tree).

use std::{
    fs::Permissions,
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use k8s_cri::v1::PodSandboxConfig;
use oci_spec::runtime::{Mount, Spec};

use crate::{
    error::{ShimError, sentence},
    userns::UserNamespace,
};

const SHM: &str = "/dev/shm";

/// What is in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PodFiles {
    /// None: the node's.
    hostname: Option<String>,
    /// None: the node's.
    resolv_conf: Option<String>,
    /// In which they belong to root; None: the node's.
    users: Option<UserNamespace>,
}

/// The files of one pod, as they are on the node, by the names under which its containers find them.
#[derive(Debug, Clone)]
pub(crate) struct WrittenFiles {
    files: Vec<(&'static str, PathBuf)>,
    users: Option<UserNamespace>,
}

impl PodFiles {
    /// # Errors
    /// When what is to be a server's or a domain's name is no single word.
    pub(crate) fn of(config: &PodSandboxConfig, users: Option<UserNamespace>) -> Result<Self, ShimError> {
        let mut resolv_conf = None;
        if let Some(dns) = &config.dns_config {
            let words = |words: &[String]| match words.iter().find(|word| !is_word(word)) {
                None => Ok(words.join(" ")),
                Some(word) => Err(ShimError::InvalidArgument(format!(
                    "the pod's dnsConfig has {word:?}, which is no word of a resolv.conf"
                ))),
            };
            let (searches, options) = (words(&dns.searches)?, words(&dns.options)?);
            words(&dns.servers)?;
            let mut text = String::new();
            let mut line = |key: &str, rest: &str| {
                if !rest.is_empty() {
                    text += &format!("{key} {rest}\n");
                }
            };
            line("search", &searches);
            dns.servers.iter().for_each(|server| line("nameserver", server));
            line("options", &options);
            resolv_conf = Some(text);
        }
        Ok(Self {
            hostname: Some(&config.hostname)
                .filter(|name| !name.is_empty())
                .map(|name| format!("{name}\n")),
            resolv_conf,
            users,
        })
    }

    /// Writes them into a folder, which is made. A file of the node that cannot be had is left out.
    ///
    /// # Errors
    /// When one cannot be written.
    pub(crate) fn write(&self, folder: &Path) -> Result<WrittenFiles, ShimError> {
        let writing = || format!("writing the pod's files into {}", folder.display());
        std::fs::create_dir_all(folder).map_err(ShimError::while_doing(writing()))?;
        let mut written = Vec::new();
        let of_pod = |text: &Option<String>| text.clone().map(String::into_bytes);
        for (name, content) in [
            ("/etc/hostname", of_pod(&self.hostname)),
            ("/etc/hosts", None),
            ("/etc/resolv.conf", of_pod(&self.resolv_conf)),
        ] {
            let content = match content.map_or_else(|| of_node(name), Ok) {
                Ok(content) => content,
                Err(error) => {
                    let error = sentence(&error);
                    tracing::warn!(file = name, error, "the pod goes without the node's file");
                    continue;
                }
            };
            let path = folder.join(name.trim_start_matches("/etc/"));
            write_anew(&path, &content).map_err(ShimError::while_doing(writing()))?;
            written.push((name, path));
        }
        Ok(WrittenFiles {
            files: written,
            users: self.users,
        })
    }
}

impl WrittenFiles {
    /// Adds to a container's specification what it does not have of them, and has its /dev/shm be the pod's.
    pub(crate) fn add_to(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let access = if read_only { "ro" } else { "rw" };
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for (name, path) in &self.files {
            if mounts.iter().all(|mount| mount.destination() != Path::new(name)) {
                let mut mount = Mount::default();
                mount.set_destination(name.into());
                set_bind(&mut mount, path, access);
                if let Some([uids, gids]) = self.users.map(UserNamespace::lists) {
                    mount.set_uid_mappings(Some(uids)).set_gid_mappings(Some(gids));
                }
                mounts.push(mount);
            }
        }
        // What is there by default is the container's own.
        let own = |mount: &&mut Mount| mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs");
        if let Some(mount) = mounts.iter_mut().find(own) {
            set_bind(mount, Path::new(SHM), "rw");
        }
        spec.set_mounts(Some(mounts));
    }
}

fn set_bind(mount: &mut Mount, source: &Path, access: &str) {
    let options = ["rbind", "rprivate", access].map(str::to_owned);
    mount
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source.to_owned()))
        .set_options(Some(options.into()));
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control())
}

/// What a file of that name says on the node.
fn of_node(name: &str) -> io::Result<Vec<u8>> {
    if name == "/etc/hostname" {
        // The node may have no such file.
        let hostname = nix::unistd::gethostname()?;
        return Ok(format!("{}\n", hostname.to_string_lossy()).into_bytes());
    }
    std::fs::read(name)
}

/// The guest may write to a file that was there.
fn write_anew(path: &Path, content: &[u8]) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::write(path, content)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o644))
}

#[cfg(test)]
mod tests {
    use k8s_cri::v1::DnsConfig;
    use serde_json::{Value, json};

    use super::*;

    fn files(dns: Option<DnsConfig>) -> PodFiles {
        let config = PodSandboxConfig {
            hostname: "web-0".to_owned(),
            dns_config: dns,
            ..Default::default()
        };
        PodFiles::of(&config, None).unwrap()
    }

    #[test]
    fn they_say_what_the_pod_does_and_else_what_the_node_does() {
        let root = tempfile::tempdir().unwrap();
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let dns = DnsConfig {
            servers: words(&["10.0.0.1", "fd00::1"]),
            searches: words(&["default.svc.cluster.local", "cluster.local"]),
            options: words(&["ndots:5"]),
        };
        files(Some(dns)).write(&root.path().join("work")).unwrap();
        let read = |name: &str| std::fs::read_to_string(root.path().join("work").join(name)).unwrap();
        assert_eq!(
            read("resolv.conf"),
            "search default.svc.cluster.local cluster.local\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:5\n"
        );
        assert_eq!(read("hostname"), "web-0\n");
        assert_eq!(read("hosts"), std::fs::read_to_string("/etc/hosts").unwrap());
        // A pod that has none has an empty one.
        assert_eq!(files(Some(DnsConfig::default())).resolv_conf.unwrap(), "");
    }

    #[test]
    fn a_container_has_what_it_does_not_bring() {
        let root = tempfile::tempdir().unwrap();
        let written = files(Some(DnsConfig::default())).write(root.path()).unwrap();
        let added = |mounts: Value, readonly: bool| {
            let spec =
                json!({"ociVersion": "1.0.2", "root": {"path": "rootfs", "readonly": readonly}, "mounts": mounts});
            let mut spec = serde_json::from_value(spec).unwrap();
            written.add_to(&mut spec);
            serde_json::to_value(spec).unwrap()["mounts"].take()
        };
        let of_pod = |name: &str, access: &str| {
            json!({
                "destination": format!("/etc/{name}"), "type": "bind", "source": root.path().join(name),
                "options": ["rbind", "rprivate", access],
            })
        };
        let hosts = json!({"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/hosts"});
        let shm = json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]});
        let shared = json!({
            "destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind", "rprivate", "rw"],
        });
        assert_eq!(
            added(json!([hosts, shm]), false),
            json!([hosts, shared, of_pod("hostname", "rw"), of_pod("resolv.conf", "rw")])
        );
        assert_eq!(added(json!([hosts]), true)[1], of_pod("hostname", "ro"));
        let volume = json!({"destination": "/dev/shm", "type": "bind", "source": "/var/lib/kubelet/volume"});
        assert_eq!(added(json!([volume]), false)[0], volume);
    }

    #[test]
    fn they_belong_to_the_root_of_the_pods_users() {
        let root = tempfile::tempdir().unwrap();
        let mut files = files(Some(DnsConfig::default()));
        files.users = Some(crate::userns::tests::USERS);
        let written = files.write(root.path()).unwrap();
        let mut spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": []})).unwrap();
        written.add_to(&mut spec);
        let mounts = serde_json::to_value(spec).unwrap()["mounts"].take();
        for mount in mounts.as_array().unwrap() {
            assert_eq!(mount["uidMappings"][0]["hostID"], 65536);
            assert_eq!(mount["gidMappings"][0]["hostID"], 131_072);
        }
    }
}
