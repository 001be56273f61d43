//! Files whose owners are others to who looks at them by a mount: mount_setattr(2), MOUNT_ATTR_IDMAP. A process that is an id of a user
//! namespace outside sees its own files as such, whoever they belong to on the disk, and what it makes belongs there to the same.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    thread,
};

use containerd_shim::mount::mount_rootfs;
use containerd_shim_protos::api::Mount;
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use crate::{
    error::ShimError,
    idler::Idler,
    rootfs::{Attributes, set_attributes},
    userns::{IdMapping, UserNamespace},
};

const OVERLAY: &str = "overlay";
/// The option of an overlay that names what is below it.
const LAYERS: &str = "lowerdir=";

/// What is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Files {
    /// Of an image, below what is written to.
    Image,
    /// What the guest gets at by who serves it.
    Served,
}

/// User namespaces that nobody is in: all that a mount needs of one is its mapping. Each is made once.
#[derive(Debug, Default)]
pub(crate) struct Mappings(Vec<(UserNamespace, Files, OwnedFd)>);

impl Mappings {
    /// # Errors
    /// When the node has no room for a further process or user namespace.
    pub(crate) fn namespace(&mut self, users: UserNamespace, files: Files) -> io::Result<BorrowedFd<'_>> {
        let same = |known: &(UserNamespace, Files, OwnedFd)| (known.0, known.1) == (users, files);
        let index = match self.0.iter().position(same) {
            Some(index) => index,
            None => {
                self.0.push((users, files, namespace(users, files)?));
                self.0.len() - 1
            }
        };
        Ok(self.0[index].2.as_fd())
    }
}

/// Makes a user namespace: of a process, as there is no other way, which ends before this returns.
fn namespace(users: UserNamespace, files: Files) -> io::Result<OwnedFd> {
    let child = Idler::start(CloneFlags::CLONE_NEWUSER)?;
    let file = |name: &str| format!("/proc/{}/{name}", child.pid());
    let lines = |mapping: IdMapping| match files {
        Files::Image => mapping.line(),
        Files::Served => mapping.line_served_by_root(),
    };
    std::fs::write(file("uid_map"), lines(users.uids()))?;
    std::fs::write(file("gid_map"), lines(users.gids()))?;
    Ok(File::open(file("ns/user"))?.into())
}

/// Mounts a container's root file system as containerd describes it, its owners mapped as the options `uidmap` and `gidmap` say, and
/// hands it out as a mount that is nowhere. None where they say nothing.
///
/// The owners of an overlay are mapped below it, a layer at a time (`core/mount/mount_linux.go` in containerd's tree), for which
/// each of them is mounted somewhere. That is a mount namespace of its own, of which nobody sees anything and nothing is left. There
/// `place`, a directory, is where it happens.
///
/// # Errors
/// When the mapping is none, or something cannot be mounted.
pub(crate) fn root(described: &Mount, place: &Path, mappings: &mut Mappings) -> Result<Option<OwnedFd>, ShimError> {
    let Some(mapped) = MappedMount::of(described)? else {
        return Ok(None);
    };
    let failed = "mounting the container's root file system with other owners";
    let files = match mapped.kind.as_str() {
        OVERLAY => Files::Image,
        _ => Files::Served,
    };
    let users = mappings.namespace(mapped.users, files);
    let users = users.map_err(ShimError::while_doing(failed))?;
    let mounted = thread::scope(|scope| {
        // A thread alone can have a mount namespace of its own.
        let mounting = thread::Builder::new().spawn_scoped(scope, || mapped.mount(place, users))?;
        let given_up = |_| Err(io::Error::other("it was given up"));
        mounting.join().unwrap_or_else(given_up)
    });
    mounted.map(Some).map_err(ShimError::while_doing(failed))
}

/// A mount of a root file system whose owners are to be mapped.
#[derive(Debug, PartialEq, Eq)]
struct MappedMount {
    kind: String,
    source: String,
    /// Those of an overlay, uppermost first, which are then not among the options.
    layers: Vec<String>,
    options: Vec<String>,
    users: UserNamespace,
}

impl MappedMount {
    fn of(described: &Mount) -> Result<Option<Self>, ShimError> {
        let value = |key: &str| described.options.iter().find_map(|option| option.strip_prefix(key));
        let users = match (value("uidmap="), value("gidmap=")) {
            (None, None) => return Ok(None),
            (uids, gids) => UserNamespace::of_options(uids.unwrap_or_default(), gids.unwrap_or_default())?,
        };
        let mut left_out = vec!["uidmap=", "gidmap="];
        let mut layers = Vec::new();
        if described.type_ == OVERLAY {
            left_out.push(LAYERS);
            layers.extend(value(LAYERS).unwrap_or_default().split(':').map(str::to_owned));
        }
        let stays = |option: &&String| !left_out.iter().any(|key| option.starts_with(key));
        Ok(Some(Self {
            kind: described.type_.clone(),
            source: described.source.clone(),
            layers,
            options: described.options.iter().filter(stays).cloned().collect(),
            users,
        }))
    }

    fn mount(&self, place: &Path, users: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let none = None::<&str>;
        // Which includes a working directory of its own.
        unshare(CloneFlags::CLONE_NEWNS)?;
        // What the host unmounts meanwhile is unmounted here, too, and stays in nobody's way.
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
        mount(Some("none"), place, Some("tmpfs"), MsFlags::empty(), Some("mode=0700"))?;
        std::env::set_current_dir(place)?;
        let mut options = self.options.clone();
        if !self.layers.is_empty() {
            let mut names = Vec::new();
            for (number, layer) in self.layers.iter().enumerate() {
                let name = number.to_string();
                let tree = detached(Path::new(layer))?;
                set_attributes(&tree, 0, Attributes::owners(users))?;
                std::fs::create_dir(&name)?;
                attach(&tree, Path::new(&name))?;
                names.push(name);
            }
            options.push(format!("{LAYERS}{}", names.join(":")));
        }
        let root = Path::new("root");
        std::fs::create_dir(root)?;
        let kind = Some(self.kind.as_str()).filter(|kind| !kind.is_empty());
        mount_rootfs(kind, Some(&self.source), &options, root).map_err(io::Error::other)?;
        let tree = detached(root)?;
        if self.layers.is_empty() {
            set_attributes(&tree, 0, Attributes::owners(users))?;
        }
        Ok(tree)
    }
}

/// A copy of the mount at `path` that is nowhere, and to which nothing comes from the host.
fn detached(path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, path, flags)?;
    set_attributes(&tree, 0, Attributes::propagation(libc::MS_PRIVATE))?;
    Ok(tree)
}

/// Mounts what is nowhere at `target`.
pub(crate) fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    Ok(move_mount(tree.as_fd(), "", CWD, target, flags)?)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, chown},
    };

    use super::*;
    use crate::userns::tests::USERS;

    fn overlay(layers: &[&Path], upper: &Path, work: &Path) -> Mount {
        let layers: Vec<_> = layers.iter().map(|layer| layer.display().to_string()).collect();
        let options = [
            "index=off".to_owned(),
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", layers.join(":")),
            "uidmap=0:65536:65536".to_owned(),
            "gidmap=0:131072:65536".to_owned(),
        ];
        Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: options.into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_overlay_says_what_is_mapped_and_what_stays() {
        let mut described = overlay(&[Path::new("/b"), Path::new("/a")], Path::new("/u"), Path::new("/w"));
        let mapped = MappedMount::of(&described).unwrap().unwrap();
        assert_eq!(mapped.layers, ["/b", "/a"]);
        assert_eq!(mapped.options, ["index=off", "workdir=/w", "upperdir=/u"]);
        assert_eq!(mapped.users, USERS);
        described.options.pop();
        assert!(MappedMount::of(&described).is_err());
        described.options.pop();
        assert_eq!(MappedMount::of(&described).unwrap(), None);
    }

    #[test]
    fn a_mapping_is_made_once_and_leaves_no_process() {
        let mut mappings = Mappings::default();
        let inode = |namespace: BorrowedFd<'_>| rustix::fs::fstat(namespace).unwrap().st_ino;
        let first = inode(mappings.namespace(USERS, Files::Image).unwrap());
        assert_eq!(inode(mappings.namespace(USERS, Files::Image).unwrap()), first);
        assert_eq!(mappings.0.len(), 1);
        assert_ne!(inode(mappings.namespace(USERS, Files::Served).unwrap()), first);
    }

    #[test]
    fn a_roots_layers_have_other_owners_and_nothing_else_is_mounted() {
        let there = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = there.path().join(name);
            fs::create_dir(&path).unwrap();
            path
        };
        let (layer, upper, work, place, target) = (
            folder("layer"),
            folder("upper"),
            folder("work"),
            folder("place"),
            folder("target"),
        );
        fs::write(layer.join("file"), "of the image").unwrap();
        chown(layer.join("file"), Some(33), Some(44)).unwrap();
        chown(&upper, Some(65536), Some(131_072)).unwrap();
        let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
        let before = mounts();
        let described = overlay(&[&layer], &upper, &work);
        let root = root(&described, &place, &mut Mappings::default()).unwrap().unwrap();
        assert_eq!(mounts(), before);
        // On a thread with a mount namespace of its own, which takes all that is mounted with it.
        std::thread::spawn(move || {
            let none = None::<&str>;
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            attach(&root, &target).unwrap();
            let file = target.join("file");
            let owner = |path: &Path| fs::metadata(path).map(|file| (file.uid(), file.gid())).unwrap();
            assert_eq!(owner(&file), (65536 + 33, 131_072 + 44));
            assert_eq!(owner(&target), (65536, 131_072));
            fs::write(&file, "of the container").unwrap();
            assert_eq!(owner(&upper.join("file")), (65536 + 33, 131_072 + 44));
            assert_eq!(fs::read_to_string(layer.join("file")).unwrap(), "of the image");
        })
        .join()
        .unwrap();
    }
}
