//! The host's OCI specification of a container becomes the guest's: paths are the guest's, what belongs to the host (its
//! namespaces, devices, hooks, labels, processors by number) is left out, everything that confines the process stays.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use coreos_kvm_proto::SHARED_MOUNT;
use oci_spec::runtime::{LinuxCpu, LinuxNamespace, LinuxNamespaceType, LinuxResources, Mount, Spec};

use crate::{error::ShimError, shm, userns::UserNamespace};

/// Where the guest has the /dev/shm of the pod.
const GUEST_SHM: &str = "/run/coreos-kvm/shm";

/// A file or directory of the host that the container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    pub(crate) source: PathBuf,
    /// Which of the container's mounts it is.
    pub(crate) mount: usize,
    pub(crate) access: Access,
    /// Whether what is mounted below it is part of it.
    pub(crate) below: Below,
    /// There is something now that is.
    pub(crate) has_mounts_below: bool,
    pub(crate) owners: Owners,
}

/// Whose the files of a volume are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owners {
    /// Those whose they are on the host.
    Same,
    /// Those whose they would be in this user namespace, and so with what is mounted below the volume, or not.
    Mapped { users: UserNamespace, below: bool },
}

/// What of the mounts below a volume the guest sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    /// What is there when the container is made.
    Now,
    /// Also what comes and goes later.
    Always,
}

/// What the guest may do with a volume, whatever becomes of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Write,
    /// Read, and write to what is mounted below it.
    Read,
    /// Read, also what is mounted below it.
    ReadAll,
}

/// A container as the guest is to make it, and what of the host it needs for that.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    pub(crate) spec: Spec,
    /// Their mounts have no source before [`Self::set_source`].
    pub(crate) volumes: Vec<Volume>,
    /// What the pod's /dev/shm has to hold for it, in bytes.
    pub(crate) shm_size: u64,
}

impl GuestSpec {
    /// Where the guest finds one of the volumes: `path` is below the shared directory.
    pub(crate) fn set_source(&mut self, mount: usize, path: &Path) {
        let mut mounts = self.spec.mounts().clone().unwrap_or_default();
        if let Some(mount) = mounts.get_mut(mount) {
            mount.set_source(Some(Path::new(SHARED_MOUNT).join(path)));
        }
        self.spec.set_mounts(Some(mounts));
    }
}

/// Options of mount(8) about propagation: to the guest a volume is one mount, whatever is mounted below it on the host.
const PROPAGATION: [&str; 8] = [
    "shared",
    "rshared",
    "slave",
    "rslave",
    "private",
    "rprivate",
    "unbindable",
    "runbindable",
];

/// Options about owners, which a volume has when it comes to the guest: OCI runtime specification, "Linux mount options".
const OWNERS: [&str; 2] = ["idmap", RECURSIVE_OWNERS];
const RECURSIVE_OWNERS: &str = "ridmap";

/// Those with which the container is to see what is mounted on the host later.
const FROM_THE_HOST: [&str; 4] = ["shared", "rshared", "slave", "rslave"];

/// # Errors
/// When the container asks for what cannot be had inside a guest; with the way out.
pub(crate) fn of(
    id: &str,
    root_folder: &str,
    mut spec: Spec,
    has_mounts_below: impl Fn(&Path) -> bool,
) -> Result<GuestSpec, ShimError> {
    let (mut volumes, mut shm_size) = (Vec::new(), 0);

    if let Some(mut root) = spec.root().clone() {
        root.set_path(Path::new(SHARED_MOUNT).join(id).join(root_folder));
        spec.set_root(Some(root));
    }
    if let Some(mounts) = spec.mounts().clone() {
        let mounts = mounts
            .into_iter()
            .enumerate()
            .map(|mount| adapt_mount(mount, &mut volumes, &mut shm_size, &has_mounts_below));
        spec.set_mounts(Some(mounts.collect::<Result<_, _>>()?));
    }
    if let Some(mut linux) = spec.linux().clone() {
        let mut kept = Vec::new();
        for namespace in linux.namespaces().clone().unwrap_or_default() {
            match (namespace.typ(), namespace.path()) {
                // The guest's are the pod's.
                (LinuxNamespaceType::Network | LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, _) => {}
                // The guest has others, see `shares_processes` and `userns`.
                (LinuxNamespaceType::Pid | LinuxNamespaceType::User, _) => kept.push(namespace_of_its_own(&namespace)),
                (_, Some(path)) => {
                    return Err(ShimError::InvalidArgument(format!(
                        "the namespace {} is the host's and cannot be entered from a machine",
                        path.display()
                    )));
                }
                (_, None) => kept.push(namespace),
            }
        }
        linux.set_namespaces(Some(kept));
        // The guest knows the pod's.
        linux.set_uid_mappings(None).set_gid_mappings(None);
        // Numbers of the host's devices are those of others in the guest. The usual ones are made without being named.
        linux.set_devices(None);
        linux.set_intel_rdt(None).set_mount_label(None);
        linux.set_resources(linux.resources().as_ref().map(adapt_resources).transpose()?);
        spec.set_linux(Some(linux));
    }
    if let Some(mut process) = spec.process().clone() {
        process.set_apparmor_profile(None).set_selinux_label(None);
        spec.set_process(Some(process));
    }
    spec.set_hooks(None).set_annotations(None);
    // The guest has it already, and it is the pod's to set.
    spec.set_hostname(None).set_domainname(None);
    Ok(GuestSpec {
        spec,
        volumes,
        shm_size,
    })
}

/// Whether the container is to be in the process namespace of others. The path is no help in finding out whose: to the host all
/// processes of the pod are QEMU.
pub(crate) fn shares_processes(spec: &Spec) -> bool {
    process_namespace(spec).is_some_and(|namespace| namespace.path().is_some())
}

/// Whether the container sees the guest's processes.
pub(crate) fn sees_all_processes(spec: &Spec) -> bool {
    process_namespace(spec).is_none()
}

fn process_namespace(spec: &Spec) -> Option<&LinuxNamespace> {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let mut namespaces = namespaces.into_iter().flatten();
    namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
}

/// Has the container see the guest's processes, which are to it the node's.
pub(crate) fn see_all_processes(spec: &mut Spec) {
    if let Some(mut linux) = spec.linux().clone() {
        let namespaces = linux.namespaces().clone().unwrap_or_default();
        let others = namespaces
            .into_iter()
            .filter(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
        linux.set_namespaces(Some(others.collect()));
        spec.set_linux(Some(linux));
    }
}

fn namespace_of_its_own(namespace: &LinuxNamespace) -> LinuxNamespace {
    let mut own = namespace.clone();
    own.set_path(None);
    own
}

fn adapt_mount(
    (number, mut mount): (usize, Mount),
    volumes: &mut Vec<Volume>,
    shm_size: &mut u64,
    has_mounts_below: impl Fn(&Path) -> bool,
) -> Result<Mount, ShimError> {
    let options = mount.options().clone().unwrap_or_default();
    let is_bind =
        mount.typ().as_deref() == Some("bind") || options.iter().any(|option| option == "bind" || option == "rbind");
    let users = UserNamespace::of_mount(&mount, is_bind)?;
    let Some(source) = mount.source().clone().filter(|_| is_bind) else {
        return Ok(mount);
    };
    mount.set_uid_mappings(None).set_gid_mappings(None);
    let owners = users.map_or(Owners::Same, |users| Owners::Mapped {
        users,
        below: options.iter().any(|option| option == RECURSIVE_OWNERS),
    });
    let later = options.iter().any(|option| FROM_THE_HOST.contains(&option.as_str()));
    let mut options = options
        .into_iter()
        .filter(|option| !PROPAGATION.contains(&option.as_str()) && !OWNERS.contains(&option.as_str()))
        .collect::<Vec<_>>();
    let shm = match mount.destination() == Path::new("/dev/shm") {
        true => shm::size(&source)?,
        false => None,
    };
    if let Some(size) = shm {
        mount.set_source(Some(GUEST_SHM.into()));
        *shm_size = size.max(*shm_size);
    } else {
        let has = |word: &str| options.iter().any(|option| option == word);
        let access = match (has("rro"), has("ro")) {
            (true, _) => Access::ReadAll,
            (false, true) => Access::Read,
            (false, false) => Access::Write,
        };
        let below = match (has("rbind"), later) {
            (false, _) => Below::Nothing,
            // What comes later cannot be kept from being written to.
            (true, true) if access != Access::ReadAll => Below::Always,
            (true, _) => Below::Now,
        };
        let has_mounts_below = below != Below::Nothing && has_mounts_below(&source);
        if access == Access::Read && has_mounts_below {
            // In the guest all of it is one mount; the host knows which are to be written to.
            options.retain(|option| option != "ro");
        }
        mount.set_source(None);
        volumes.push(Volume {
            source,
            mount: number,
            access,
            below,
            has_mounts_below,
            owners,
        });
    }
    mount.set_options(Some(options));
    Ok(mount)
}

/// Files of cgroup v2 that mean the same inside and that every guest's kernel has (Documentation/admin-guide/cgroup-v2.rst, Linux 4.19). The
/// kubelet asks for some of them by name.
const UNIFIED: [&str; 4] = ["memory.oom.group", "memory.min", "memory.low", "memory.high"];

/// Limits that mean the same inside: time, memory, processes. Processors and devices by number are the host's, and what
/// the host's blkio, rdma and network controllers limit is limited there, for the whole machine.
///
/// # Errors
/// When huge pages are wanted, of which a machine has none.
fn adapt_resources(resources: &LinuxResources) -> Result<LinuxResources, ShimError> {
    let mut huge = resources.hugepage_limits().iter().flatten();
    if let Some(wanted) = huge.find(|limit| limit.limit() > 0) {
        return Err(ShimError::InvalidArgument(format!(
            "huge pages of {} are asked for, and a machine has none: leave out the limit of hugepages, or run the pod without this runtime class",
            wanted.page_size()
        )));
    }
    let unified = resources.unified().iter().flatten();
    let unified: HashMap<_, _> = unified
        .filter(|(file, _)| UNIFIED.contains(&file.as_str()))
        .map(|(file, value)| (file.clone(), value.clone()))
        .collect();
    let mut inside = LinuxResources::default();
    inside
        .set_memory(*resources.memory())
        .set_pids(*resources.pids())
        .set_devices(resources.devices().clone())
        .set_cpu(resources.cpu().as_ref().map(without_numbers))
        .set_unified(Some(unified).filter(|unified| !unified.is_empty()));
    Ok(inside)
}

fn without_numbers(cpu: &LinuxCpu) -> LinuxCpu {
    let mut cpu = cpu.clone();
    cpu.set_cpus(None).set_mems(None);
    // Of realtime scheduling there is nothing in cgroup v2.
    cpu.set_realtime_period(None).set_realtime_runtime(None);
    cpu
}

/// The changed limits of a container, as they are inside: JSON of the OCI specification's `linux.resources`.
///
/// # Errors
/// When huge pages are wanted, of which a machine has none.
pub(crate) fn resources(resources: &LinuxResources) -> Result<Vec<u8>, ShimError> {
    serde_json::to_vec(&adapt_resources(resources)?).map_err(ShimError::while_doing("writing the limits"))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn guest_spec(host: Value) -> Result<GuestSpec, ShimError> {
        of("c1", "rootfs", serde_json::from_value(host).unwrap(), |path| {
            path == Path::new("/srv/with-mounts")
        })
    }

    fn inside(host: Value) -> Result<(Value, Vec<Volume>), ShimError> {
        let guest = guest_spec(host)?;
        Ok((serde_json::to_value(guest.spec).unwrap(), guest.volumes))
    }

    fn host() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "hostname": "web-0",
            "root": {"path": "rootfs", "readonly": true},
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/", "noNewPrivileges": true,
                "apparmorProfile": "cri-containerd.apparmor.d", "selinuxLabel": "system_u:system_r:container_t:s0",
                "capabilities": {"bounding": ["CAP_CHOWN"]},
            },
            "hooks": {"prestart": [{"path": "/usr/bin/hook"}]},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
                {"destination": "/dev/shm", "type": "bind", "source": "/run/k3s/sandboxes/web-0/shm", "options": ["rbind", "ro"]},
                {"destination": "/etc/hosts", "type": "bind", "source": "/var/lib/kubelet/hosts", "options": ["rbind", "rprivate", "rw"]},
                {"destination": "/etc/secret", "type": "bind", "source": "/var/lib/kubelet/secret", "options": ["rbind", "ro"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "mount"}, {"type": "cgroup"},
                    {"type": "network", "path": "/var/run/netns/cni-1"}, {"type": "ipc", "path": "/proc/1/ns/ipc"},
                    {"type": "uts", "path": "/proc/1/ns/uts"},
                ],
                "devices": [{"path": "/dev/vda", "type": "b", "major": 254, "minor": 0}],
                "resources": {"cpu": {"quota": 1000, "period": 2000, "cpus": "7"}, "memory": {"limit": 1048576}, "hugepageLimits": []},
                "seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
                "maskedPaths": ["/proc/kcore"], "readonlyPaths": ["/proc/sys"],
            },
        })
    }

    #[test]
    fn files_are_found_in_the_shared_directory_and_read_only_stays_so() {
        let mut guest = guest_spec(host()).unwrap();
        let volume = |mount, source: &str, access| Volume {
            source: source.into(),
            mount,
            access,
            below: Below::Now,
            has_mounts_below: false,
            owners: Owners::Same,
        };
        assert_eq!(
            guest.volumes,
            [
                volume(2, "/var/lib/kubelet/hosts", Access::Write),
                volume(3, "/var/lib/kubelet/secret", Access::Read)
            ]
        );
        guest.set_source(2, Path::new("c1/volumes/0"));
        let spec = serde_json::to_value(guest.spec).unwrap();
        let sources: Vec<_> = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|mount| &mount["source"])
            .collect();
        assert_eq!(
            json!(sources),
            json!([
                "proc",
                "/run/coreos-kvm/shm",
                "/run/coreos-kvm/shared/c1/volumes/0",
                null
            ])
        );
        assert_eq!(spec["mounts"][2]["options"], json!(["rbind", "rw"]));
        assert_eq!(
            spec["root"],
            json!({"path": "/run/coreos-kvm/shared/c1/rootfs", "readonly": true})
        );
    }

    #[test]
    fn what_is_mounted_below_a_read_only_volume_is_read_only_only_if_that_is_asked_for() {
        let with = |option: &str| {
            let mut host = host();
            host["mounts"] = json!([
                {"destination": "/mnt", "type": "bind", "source": "/srv/with-mounts", "options": ["rbind", option]},
            ]);
            let (spec, volumes) = inside(host).unwrap();
            (spec["mounts"][0]["options"].clone(), volumes[0].access)
        };
        assert_eq!(with("ro"), (json!(["rbind"]), Access::Read));
        assert_eq!(with("rro"), (json!(["rbind", "rro"]), Access::ReadAll));
        assert_eq!(with("rw"), (json!(["rbind", "rw"]), Access::Write));
    }

    #[test]
    fn what_is_mounted_below_a_volume_later_shows_only_if_that_is_asked_for() {
        let with = |options: &[&str]| {
            let mut host = host();
            host["mounts"] = json!([
                {"destination": "/mnt", "type": "bind", "source": "/srv", "options": options},
            ]);
            inside(host).unwrap().1[0].below
        };
        assert_eq!(with(&["bind", "rw"]), Below::Nothing);
        assert_eq!(with(&["rbind", "rprivate", "rw"]), Below::Now);
        assert_eq!(with(&["rbind", "rslave", "rw"]), Below::Always);
        assert_eq!(with(&["rbind", "rshared", "ro"]), Below::Always);
        assert_eq!(with(&["rbind", "rslave", "rro"]), Below::Now);
    }

    #[test]
    fn limits_by_the_names_of_their_files_are_those_that_mean_the_same_inside() {
        let mut host = host();
        host["linux"]["resources"]["unified"] =
            json!({"memory.oom.group": "1", "memory.high": "1000000", "cpuset.cpus": "7", "io.max": "8:0 rbps=1"});
        let (spec, _) = inside(host).unwrap();
        assert_eq!(
            spec["linux"]["resources"]["unified"],
            json!({"memory.oom.group": "1", "memory.high": "1000000"})
        );
    }

    #[test]
    fn huge_pages_are_refused_and_none_of_them_are_not() {
        let with = |limit: u64| {
            let mut host = host();
            host["linux"]["resources"]["hugepageLimits"] =
                json!([{"pageSize": "1GB", "limit": 0}, {"pageSize": "2MB", "limit": limit}]);
            inside(host)
        };
        with(0).unwrap();
        let error = with(2 << 20).unwrap_err().to_string();
        assert!(
            error.starts_with("huge pages of 2MB are asked for, and a machine has none"),
            "{error}"
        );
    }

    #[test]
    fn what_is_the_hosts_stays_there() {
        let (spec, _) = inside(host()).unwrap();
        let types: Vec<_> = spec["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|namespace| &namespace["type"])
            .collect();
        assert_eq!(types, ["pid", "mount", "cgroup"]);
        assert_eq!(spec["linux"].get("devices"), None);
        assert_eq!(
            spec["linux"]["resources"]["cpu"],
            json!({"quota": 1000, "period": 2000})
        );
        assert_eq!(spec.get("hooks"), None);
        assert_eq!(spec["process"].get("apparmorProfile"), None);
        assert_eq!(spec.get("hostname"), None);
    }

    #[test]
    fn what_confines_the_process_goes_along() {
        let (spec, _) = inside(host()).unwrap();
        assert_eq!(spec["process"]["noNewPrivileges"], true);
        assert_eq!(spec["process"]["capabilities"]["bounding"], json!(["CAP_CHOWN"]));
        assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
        assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
        assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys"]));
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 1_048_576);
    }

    #[test]
    fn a_process_namespace_that_is_shared_on_the_host_is_not_named_inside() {
        let mut host = host();
        assert!(!shares_processes(&serde_json::from_value(host.clone()).unwrap()));
        host["linux"]["namespaces"] = json!([{"type": "pid", "path": "/proc/4321/ns/pid"}]);
        assert!(shares_processes(&serde_json::from_value(host.clone()).unwrap()));
        assert_eq!(inside(host).unwrap().0["linux"]["namespaces"], json!([{"type": "pid"}]));
    }

    #[test]
    fn namespaces_of_the_host_are_refused() {
        let mut host = host();
        host["linux"]["namespaces"] = json!([{"type": "mount", "path": "/proc/1/ns/mnt"}]);
        let error = inside(host).unwrap_err().to_string();
        assert!(error.contains("/proc/1/ns/mnt"), "{error}");
    }

    #[test]
    fn a_user_namespace_is_the_guests_to_make() {
        let mut host = host();
        let line = json!([{"containerID": 0, "hostID": 65536, "size": 65536}]);
        host["linux"]["namespaces"] = json!([{"type": "user", "path": "/proc/4321/ns/user"}]);
        host["linux"]["uidMappings"] = line.clone();
        host["linux"]["gidMappings"] = line;
        let (spec, _) = inside(host).unwrap();
        assert_eq!(spec["linux"]["namespaces"], json!([{"type": "user"}]));
        assert_eq!(
            (spec["linux"].get("uidMappings"), spec["linux"].get("gidMappings")),
            (None, None)
        );
    }

    #[test]
    fn the_owners_of_a_volume_are_mapped_on_the_host() {
        let with = |options: &[&str]| {
            let mut host = host();
            host["mounts"] = json!([{
                "destination": "/mnt", "type": "bind", "source": "/srv", "options": options,
                "uidMappings": [{"containerID": 0, "hostID": 65536, "size": 65536}],
                "gidMappings": [{"containerID": 0, "hostID": 131_072, "size": 65536}],
            }]);
            let (mut spec, volumes) = inside(host).unwrap();
            (spec["mounts"][0].take(), volumes[0].owners)
        };
        let mapped = |below| Owners::Mapped {
            users: crate::userns::tests::USERS,
            below,
        };
        for (options, below) in [
            (["rbind", "rw"], false),
            (["rbind", "idmap"], false),
            (["rbind", "ridmap"], true),
        ] {
            let (mount, owners) = with(&options);
            assert_eq!(owners, mapped(below));
            assert_eq!((mount.get("uidMappings"), mount.get("gidMappings")), (None, None));
            assert!(!mount["options"].to_string().contains("idmap"), "{mount}");
        }
        let mut host = host();
        host["mounts"] = json!([{
            "destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
            "uidMappings": [{"containerID": 0, "hostID": 65536, "size": 65536}],
        }]);
        assert!(inside(host).unwrap_err().to_string().contains("/tmp"));
    }
}
