//! A container's files on the host: its root file system and its volumes, mounted where the guest sees them, and nowhere else.

use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use containerd_shim::mount::mount_rootfs;
use containerd_shim_protos::api::Mount;
use coreos_kvm_launcher::{mountinfo, share_server};
use nix::mount::{MntFlags, umount2};
use oci_spec::runtime::Spec;
use rustix::{
    fs::CWD,
    mount::{OpenTreeFlags, open_tree},
};

use crate::{
    error::ShimError,
    guestspec::{self, Access, Below, GuestSpec, Owners, Volume},
    idmap::{self, Files, Mappings},
    pod_volumes::{PodVolumes, Use},
};

/// Of a container's root that is a file system of its own, made for it: nobody on the host changes that.
const OWN: &str = share_server::OWN;
/// Of one that is a directory of the host's, or a mount of it.
const DIRECTORY: &str = "directory";
/// Of those volumes that are a container's alone.
const VOLUMES: &str = "volumes";

/// The two sides of the directory that pod and guest share: the guest can write to neither, only to what is mounted there.
#[derive(Debug, Clone)]
pub(crate) struct Share {
    /// Where mount points are made.
    pub(crate) points: PathBuf,
    /// The same, read-only, as the guest sees it: where things are mounted.
    pub(crate) shared: PathBuf,
}

/// The mounts of one container, and its part in those of the pod. Dropping it unmounts what nobody else uses.
#[derive(Debug)]
pub(crate) struct ContainerFiles {
    share: Share,
    /// The container's folder in it.
    folder: PathBuf,
    /// What is the container's alone, below the share.
    mounted: Vec<PathBuf>,
    volumes: PodVolumes,
    /// Those of the pod's volumes that it has.
    used: Vec<Use>,
    /// What no container of the pod uses any more.
    unused: Vec<PathBuf>,
}

impl ContainerFiles {
    /// Mounts the files of a container as the host specifies it; answers what it is to the guest as well. Whoever serves the files of
    /// a volume may not answer: this is nothing for a thread that others wait for.
    ///
    /// # Errors
    /// When the container cannot be had inside a guest, or something cannot be mounted.
    pub(crate) fn of(
        share: Share,
        volumes: &PodVolumes,
        id: &str,
        spec: Spec,
        rootfs: &[Mount],
        root: &Path,
    ) -> Result<(GuestSpec, Self), ShimError> {
        let mounts = mountinfo::mounts().map_err(ShimError::while_doing("listing the mounts"))?;
        let mut guest = guestspec::of(id, root_folder(rootfs), spec, |path| is_above(path, &mounts))?;
        let mut files = Self {
            share,
            folder: id.into(),
            mounted: Vec::new(),
            volumes: volumes.clone(),
            used: Vec::new(),
            unused: Vec::new(),
        };
        let mut mappings = Mappings::default();
        make_directory(&files.share.points.join(&files.folder), 0o755)?;
        files.mount_root(rootfs, root, &mut mappings)?;
        for (number, volume) in guest.volumes.clone().iter().enumerate() {
            let place = match volumes.used(volume, &mounts)? {
                Some(used) => files.mount_for_pod(used, volume, &mut mappings)?,
                None => files.mount_for_container(number, volume, &mut mappings)?,
            };
            guest.set_source(volume.mount, &place);
        }
        Ok((guest, files))
    }

    /// Mounts the root file system: `rootfs` as containerd describes it, or else the directory `root`.
    fn mount_root(&mut self, rootfs: &[Mount], root: &Path, mappings: &mut Mappings) -> Result<(), ShimError> {
        let place = self.folder.join(root_folder(rootfs));
        let point = self.share.points.join(&place);
        make_directory(&point, 0o755)?;
        let target = self.share.shared.join(&place);
        if rootfs.is_empty() {
            bind(root, &target, Access::Write, Below::Now, None)
                .map_err(ShimError::while_doing(format!("sharing {}", root.display())))?;
            self.mounted.push(place);
            return Ok(());
        }
        for mount in rootfs {
            if let Some(tree) = idmap::root(mount, &point, mappings)? {
                let mounting = "mounting the container's root file system";
                idmap::attach(&tree, &target).map_err(ShimError::while_doing(mounting))?;
                self.mounted.push(place.clone());
                continue;
            }
            let kind = Some(mount.type_.as_str()).filter(|kind| !kind.is_empty());
            mount_rootfs(kind, Some(&mount.source), &mount.options, &target)
                .map_err(|error| ShimError::Internal(format!("mounting the container's root file system: {error}")))?;
            self.mounted.push(place.clone());
        }
        Ok(())
    }

    /// Answers where below the share.
    fn mount_for_container(
        &mut self,
        number: usize,
        volume: &Volume,
        mappings: &mut Mappings,
    ) -> Result<PathBuf, ShimError> {
        let place = self.folder.join(VOLUMES).join(number.to_string());
        mount_volume(volume, &self.share, &place, mappings)?;
        self.mounted.push(place.clone());
        Ok(place)
    }

    fn mount_for_pod(&mut self, used: Use, volume: &Volume, mappings: &mut Mappings) -> Result<PathBuf, ShimError> {
        let place = used.place().to_owned();
        let mounted = used.mount(|access| {
            let volume = Volume {
                access,
                ..volume.clone()
            };
            let target = self.share.shared.join(&place);
            let mounted = mount_volume(&volume, &self.share, &place, mappings).and_then(|()| {
                let sharing = ShimError::while_doing(format!("sharing {}", volume.source.display()));
                match used.is_at(&target) {
                    Ok(true) => Ok(()),
                    Ok(false) => detach(&target).and(Err(sharing(io::Error::other("it has just been replaced")))),
                    Err(error) => detach(&target).and(Err(sharing(error))),
                }
            });
            mounted.inspect_err(|_| {
                // Whoever is next makes it again.
                let _ = std::fs::remove_dir(self.share.points.join(&place));
            })
        });
        // To be given up in any case.
        self.used.push(used);
        mounted.map(|()| place)
    }

    /// Gives up the volumes that are the pod's. Those that no container uses any more are unmounted with the container's own; the guest is
    /// to let go of them first.
    pub(crate) fn give_up_volumes(&mut self) -> &PodVolumes {
        self.unused.extend(self.used.drain(..).filter_map(Use::end));
        &self.volumes
    }

    /// Unmounts everything and removes the mount points.
    ///
    /// # Errors
    /// The first thing that stays, all having been tried.
    pub(crate) fn unmount(mut self) -> Result<(), ShimError> {
        self.release()
    }

    fn release(&mut self) -> Result<(), ShimError> {
        self.give_up_volumes();
        let mut result = Ok(());
        for place in self.mounted.drain(..).rev() {
            result = result.and(detach(&self.share.shared.join(place)));
        }
        for place in self.unused.drain(..) {
            let removed = detach(&self.share.shared.join(&place)).and_then(|()| {
                let point = self.share.points.join(&place);
                std::fs::remove_dir(&point).map_err(ShimError::while_doing(format!("removing {}", point.display())))
            });
            result = result.and(removed);
        }
        if result.is_ok() {
            let points = self.share.points.join(&self.folder);
            result =
                remove_mount_points(&points).map_err(ShimError::while_doing(format!("removing {}", points.display())));
        }
        result
    }
}

/// Mounts a volume at a place below the share.
fn mount_volume(volume: &Volume, share: &Share, place: &Path, mappings: &mut Mappings) -> Result<(), ShimError> {
    let point = share.points.join(place);
    if let Some(parent) = point.parent() {
        make_directory(parent, 0o755)?;
    }
    let sharing = || format!("sharing {}", volume.source.display());
    let is_directory = std::fs::metadata(&volume.source)
        .map_err(ShimError::while_doing(sharing()))?
        .is_dir();
    if is_directory {
        make_directory(&point, 0o755)?;
    } else {
        File::create(&point).map_err(ShimError::while_doing(format!("making {}", point.display())))?;
    }
    let owners = match volume.owners {
        Owners::Same => None,
        Owners::Mapped { users, below } => {
            let namespace = mappings.namespace(users, Files::Served);
            Some((namespace.map_err(ShimError::while_doing(sharing()))?, below))
        }
    };
    let target = share.shared.join(place);
    bind(&volume.source, &target, volume.access, volume.below, owners).map_err(ShimError::while_doing(sharing()))
}

/// Lazily: virtiofsd holds files that the guest has open, and forgets them when the guest does.
fn detach(target: &Path) -> Result<(), ShimError> {
    umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
        .map_err(ShimError::while_doing(format!("unmounting {}", target.display())))
}

impl Drop for ContainerFiles {
    fn drop(&mut self) {
        if self.share.points.join(&self.folder).exists()
            && let Err(error) = self.release()
        {
            tracing::warn!(%error, "a container's files stay mounted until its machine ends");
        }
    }
}

/// Binds `source`, with as much of what is mounted below it as is to be seen, to `target`; it never shows there writable if it is not
/// to be, nor with its own owners if those of a user namespace are to be seen: at the source alone, or also below it. Nothing that becomes
/// of the copy comes back to the source: an unmount of it would else be one of the host's own mounts (mount_namespaces(7), "Shared subtrees").
fn bind(
    source: &Path,
    target: &Path,
    access: Access,
    below: Below,
    owners: Option<(BorrowedFd<'_>, bool)>,
) -> io::Result<()> {
    let recursive = match below {
        Below::Nothing => OpenTreeFlags::empty(),
        Below::Now | Below::Always => OpenTreeFlags::AT_RECURSIVE,
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags | recursive)?;
    let propagation = match below {
        Below::Always => libc::MS_SLAVE,
        Below::Nothing | Below::Now => libc::MS_PRIVATE,
    };
    set_attributes(&tree, libc::AT_RECURSIVE, Attributes::propagation(propagation))?;
    if let Some((users, below)) = owners {
        let recursive = if below { libc::AT_RECURSIVE } else { 0 };
        set_attributes(&tree, recursive, Attributes::owners(users)).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => io::Error::other(format!(
                "the file system of {} cannot show other owners, which a pod with a user namespace needs",
                source.display()
            )),
            _ => error,
        })?;
    }
    match access {
        Access::Write => {}
        Access::Read => set_attributes(&tree, 0, Attributes::READ_ONLY)?,
        Access::ReadAll => set_attributes(&tree, libc::AT_RECURSIVE, Attributes::READ_ONLY)?,
    }
    idmap::attach(&tree, target)
}

/// What a mount is to have: `struct mount_attr` of mount_setattr(2).
#[derive(Clone, Copy)]
pub(crate) struct Attributes<'a> {
    set: u64,
    propagation: libc::c_ulong,
    owners: Option<BorrowedFd<'a>>,
}

impl<'a> Attributes<'a> {
    const READ_ONLY: Self = Self {
        set: libc::MOUNT_ATTR_RDONLY,
        propagation: 0,
        owners: None,
    };

    pub(crate) fn propagation(propagation: libc::c_ulong) -> Self {
        Self {
            set: 0,
            propagation,
            owners: None,
        }
    }

    /// Files belong to who they would belong to in this user namespace.
    pub(crate) fn owners(users: BorrowedFd<'a>) -> Self {
        Self {
            set: libc::MOUNT_ATTR_IDMAP,
            propagation: 0,
            owners: Some(users),
        }
    }
}

/// Sets attributes of a detached tree, with AT_RECURSIVE of all its mounts: mount_setattr(2), which neither rustix nor nix has.
pub(crate) fn set_attributes(tree: &OwnedFd, recursive: libc::c_int, attributes: Attributes<'_>) -> io::Result<()> {
    let users = attributes
        .owners
        .map_or(Ok(0), |users| u64::try_from(users.as_raw_fd()));
    let attributes = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: 0,
        propagation: attributes.propagation,
        userns_fd: users.map_err(io::Error::other)?,
    };
    let flags = libc::AT_EMPTY_PATH | recursive;
    // SAFETY: the descriptors are open, the path is an empty C string, and the structure is as long as the size says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether one of the mount points is below the path, wherever that leads.
fn is_above(path: &Path, mounts: &[mountinfo::Mount]) -> bool {
    let Ok(path) = path.canonicalize() else { return false };
    mountinfo::below(&path, mounts).next().is_some()
}

fn make_directory(path: &Path, mode: u32) -> Result<(), ShimError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(ShimError::while_doing(format!(
            "making the directory {}",
            path.display()
        )))
}

/// Where a container's root is in its folder.
fn root_folder(rootfs: &[Mount]) -> &'static str {
    let is_directory = |mount: &Mount| {
        let mut options = mount.options.iter();
        mount.type_ == "bind" || options.any(|option| ["bind", "rbind"].contains(&option.as_str()))
    };
    match rootfs.is_empty() || rootfs.iter().any(is_directory) {
        true => DIRECTORY,
        false => OWN,
    }
}

/// Removes what [`ContainerFiles::of`] has made, level by level: no directory that still has something in it goes, so that
/// no file of a mount is ever taken for a mount point.
fn remove_mount_points(directory: &Path) -> io::Result<()> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if !entry.file_type()?.is_dir() {
            std::fs::remove_file(path)?;
            continue;
        }
        if entry.file_name() == VOLUMES {
            for volume in std::fs::read_dir(&path)? {
                let volume = volume?;
                if volume.file_type()?.is_dir() {
                    std::fs::remove_dir(volume.path())?;
                } else {
                    std::fs::remove_file(volume.path())?;
                }
            }
        }
        std::fs::remove_dir(path)?;
    }
    std::fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, chown};

    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::tests::in_own_mounts;
    use crate::userns::tests::USERS;

    #[test]
    fn a_root_is_the_guests_own_where_it_is_no_directory_of_the_hosts() {
        let mount = |kind: &str, options: &[&str]| Mount {
            type_: kind.to_owned(),
            options: options.iter().map(|&option| option.to_owned()).collect(),
            ..Default::default()
        };
        let overlay = mount("overlay", &["lowerdir=/a", "upperdir=/b", "workdir=/c"]);
        assert_eq!(root_folder(std::slice::from_ref(&overlay)), OWN);
        for others in [
            vec![],
            vec![mount("bind", &["ro"])],
            vec![overlay, mount("", &["rbind"])],
        ] {
            assert_eq!(root_folder(&others), DIRECTORY, "{others:?}");
        }
    }

    #[test]
    fn mounts_are_found_below_a_path_but_not_at_it() {
        let there = tempfile::tempdir().unwrap();
        let below = there.path().canonicalize().unwrap().join("below");
        std::fs::create_dir(&below).unwrap();
        let mounts = [PathBuf::from("/"), below.clone()].map(|point| mountinfo::Mount {
            id: 1,
            point,
            options: String::new(),
        });
        assert!(is_above(there.path(), &mounts));
        assert!(!is_above(&below, &mounts));
    }

    #[test]
    fn a_copy_of_a_volume_shows_what_it_is_to_and_takes_nothing_from_the_host() {
        in_own_mounts(copies);
    }

    #[test]
    fn the_owners_of_a_volume_are_others_and_its_own_on_the_host() {
        in_own_mounts(owners);
    }

    fn owners(root: &Path) {
        let none = None::<&str>;
        let folder = |name: &str| {
            let path = root.join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let (source, all, top) = (folder("source"), folder("all"), folder("top"));
        let below = folder("source/below");
        mount(Some("none"), &below, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        std::fs::write(source.join("file"), "").unwrap();
        chown(source.join("file"), Some(33), Some(44)).unwrap();
        let mut mappings = Mappings::default();
        let users = mappings.namespace(USERS, Files::Served).unwrap();
        bind(&source, &all, Access::Write, Below::Now, Some((users, true))).unwrap();
        bind(&source, &top, Access::Write, Below::Now, Some((users, false))).unwrap();

        let owner = |path: PathBuf| std::fs::metadata(path).map(|file| (file.uid(), file.gid())).unwrap();
        assert_eq!(owner(all.join("file")), (65536 + 33, 131_072 + 44));
        assert_eq!(owner(all.join("below")), (65536, 131_072));
        assert_eq!(owner(top.join("below")), (0, 0));
        chown(all.join("file"), Some(65536 + 1), Some(131_072 + 2)).unwrap();
        assert_eq!(owner(source.join("file")), (1, 2));
        // Who serves the files does this as root, and is not the host's.
        std::fs::rename(all.join("file"), all.join("renamed")).unwrap();
        std::fs::hard_link(all.join("renamed"), all.join("linked")).unwrap();
        std::fs::write(all.join("by-root"), "").unwrap();
        assert_eq!(owner(source.join("by-root")), (65536, 131_072));
    }

    fn copies(root: &Path) {
        let none = None::<&str>;
        // Both shared: the host's volume by systemd, the machine's directory for who serves it.
        let tmpfs = |path: &Path| {
            std::fs::create_dir(path).unwrap();
            mount(Some("none"), path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
            mount(none, path, none, MsFlags::MS_SHARED, none).unwrap();
            std::fs::write(path.join("marker"), "").unwrap();
        };
        let (source, shared) = (root.join("source"), root.join("shared"));
        for path in [&source, &source.join("early"), &shared] {
            tmpfs(path);
        }
        let bound = |name: &str, access, below| {
            let target = shared.join(name);
            std::fs::create_dir(&target).unwrap();
            bind(&source, &target, access, below, None).unwrap();
            target
        };
        let all = bound("all", Access::ReadAll, Below::Now);
        let read = bound("read", Access::Read, Below::Now);
        let plain = bound("plain", Access::Write, Below::Nothing);
        let follows = bound("follows", Access::Write, Below::Always);
        tmpfs(&source.join("late"));

        let writes = |path: PathBuf| std::fs::write(path, "").is_ok();
        assert!(!writes(all.join("file")) && !writes(all.join("early/file")));
        assert!(!writes(read.join("file")) && writes(read.join("early/file")));
        let shows = |target: &Path, name: &str| target.join(name).join("marker").exists();
        assert!(shows(&all, "early") && !shows(&all, "late"));
        assert!(!shows(&plain, "early") && !shows(&plain, "late"));
        assert!(shows(&follows, "early") && shows(&follows, "late"));

        for target in [all, read, plain, follows] {
            umount2(&target, MntFlags::MNT_DETACH).unwrap();
        }
        assert!(shows(&source, "early") && shows(&source, "late"));
    }
}
