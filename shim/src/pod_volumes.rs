//! Folders that belong to the pod: one mount each in the guest, whichever of its containers have it. Two mounts of one folder would have
//! files of their own there, so that neither a socket nor a named pipe nor a lock of one container would be one of the other's.
//!
//! A folder that a container may write to is writable to the guest as long as any container has that mount, also one that may only read:
//! the guest's kernel is what keeps those from writing. Where nobody may write, the guest cannot, save for the pod's own emptyDir
//! volumes, which are nobody else's: there who writes may come after who reads.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use coreos_kvm_launcher::mountinfo::{self, Mount};
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use crate::{
    error::ShimError,
    guestspec::{Access, Below, Owners, Volume},
    volume::EmptyDirs,
};

/// Their folder in the directory that pod and guest share. No container's id begins with a dot (`identifiers` in containerd).
const FOLDER: &str = ".volumes";

/// Those of one pod.
#[derive(Debug, Clone, Default)]
pub(crate) struct PodVolumes(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    all: Mutex<All>,
    own: OnceLock<EmptyDirs>,
}

#[derive(Debug, Default)]
struct All {
    used: Vec<Used>,
    /// How many there have been: what the guest has known by a name is never another thing.
    count: u64,
    /// Places of those that no container uses any more, and that the guest is to let go of.
    ended: Vec<PathBuf>,
}

#[derive(Debug)]
struct Used {
    volume: Arc<PodVolume>,
    by: usize,
}

#[derive(Debug)]
struct PodVolume {
    identity: Identity,
    access: Access,
    /// Below the share.
    place: PathBuf,
    /// Held while it is being mounted, for others that need it.
    mounted: Mutex<bool>,
}

/// What two mounts have to have in common to be one.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    device: (u32, u32),
    inode: u64,
    through: Through,
    /// What is mounted below it later shows.
    follows: bool,
    owners: Owners,
}

/// The mount on the host that a folder is taken from.
#[derive(Debug, PartialEq, Eq)]
enum Through {
    /// One of several that do the same: the kubelet has a mount of a `subPath` for each container.
    Any { options: String },
    /// This one alone: what is mounted below it later shows, or it changes whose its files are.
    This(u64),
}

impl Identity {
    /// None for what is no folder: a file may be replaced, and each container is to have the one that is there then.
    fn of(volume: &Volume, mounts: &[Mount]) -> io::Result<Option<Self>> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let found = statx(CWD, &volume.source, AtFlags::empty(), wanted)?;
        if FileType::from_raw_mode(found.stx_mode.into()) != FileType::Directory {
            return Ok(None);
        }
        let find = |mounts: &[Mount]| mounts.iter().find(|mount| mount.id == found.stx_mnt_id).cloned();
        let mount = match find(mounts) {
            // Looking at a folder may have had it mounted.
            None => find(&mountinfo::mounts()?),
            mount => mount,
        };
        let follows = volume.below == Below::Always;
        let through = match mount {
            Some(mount) if !follows && !is_mapped(&mount) => Through::Any { options: mount.options },
            _ => Through::This(found.stx_mnt_id),
        };
        Ok(Some(Self {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            through,
            follows,
            owners: volume.owners,
        }))
    }
}

/// Whether its files are shown as those of others: "idmapped" in fs/proc_namespace.c.
fn is_mapped(mount: &Mount) -> bool {
    mount.options.split(',').any(|option| option == "idmapped")
}

impl PodVolumes {
    /// These are the pod's alone.
    pub(crate) fn own(&self, empty_dirs: EmptyDirs) {
        // A pod has one machine, and is told once.
        self.0.own.get_or_init(|| empty_dirs);
    }

    /// What the volume is for the pod, for one more container until [`Use::end`]. None for one that is the container's alone: a file,
    /// or a folder with something mounted below it, of which each container sees what is there when it is made. `mounts` are all of the host.
    ///
    /// # Errors
    /// When the host cannot tell what is there.
    pub(crate) fn used(&self, volume: &Volume, mounts: &[Mount]) -> Result<Option<Use>, ShimError> {
        if volume.has_mounts_below {
            return Ok(None);
        }
        let sharing = || ShimError::while_doing(format!("sharing {}", volume.source.display()));
        let is_own = self.0.own.get().is_some_and(|own| own.contain(&volume.source));
        // Nothing is mounted below.
        let access = match volume.access {
            Access::Write => Access::Write,
            Access::Read | Access::ReadAll if is_own => Access::Write,
            Access::Read | Access::ReadAll => Access::Read,
        };
        Ok(Identity::of(volume, mounts)
            .map_err(sharing())?
            .map(|identity| self.add(identity, access)))
    }

    /// The places of volumes that no container uses any more, and that the guest has not let go of so far.
    pub(crate) fn ended(&self) -> Vec<PathBuf> {
        self.all().ended.clone()
    }

    /// The guest has let go of these.
    pub(crate) fn released(&self, places: &[PathBuf]) {
        self.all().ended.retain(|place| !places.contains(place));
    }

    fn add(&self, identity: Identity, access: Access) -> Use {
        let mut all = self.all();
        let like = |access| {
            let same = |used: &Used| used.volume.identity == identity && used.volume.access == access;
            all.used.iter().position(same)
        };
        let volume = match like(Access::Write).or_else(|| like(access)) {
            Some(place) => {
                all.used[place].by += 1;
                all.used[place].volume.clone()
            }
            None => all.added(identity, access),
        };
        drop(all);
        Use {
            volumes: self.clone(),
            volume,
        }
    }

    fn all(&self) -> MutexGuard<'_, All> {
        // Every change leaves it whole.
        self.0.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    fn added(&mut self, identity: Identity, access: Access) -> Arc<PodVolume> {
        let volume = Arc::new(PodVolume {
            identity,
            access,
            place: Path::new(FOLDER).join(self.count.to_string()),
            mounted: Mutex::default(),
        });
        self.count += 1;
        self.used.push(Used {
            volume: volume.clone(),
            by: 1,
        });
        volume
    }
}

/// That a container has a volume.
#[derive(Debug)]
pub(crate) struct Use {
    volumes: PodVolumes,
    volume: Arc<PodVolume>,
}

impl Use {
    /// Where it is, below the directory that pod and guest share.
    pub(crate) fn place(&self) -> &Path {
        &self.volume.place
    }

    /// Has `mount` mount it there with this access, unless that has been done. Waits while another container does.
    ///
    /// # Errors
    /// Those of `mount`, after which the next one tries.
    pub(crate) fn mount(&self, mount: impl FnOnce(Access) -> Result<(), ShimError>) -> Result<(), ShimError> {
        let mut mounted = self.volume.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if !*mounted {
            mount(self.volume.access)?;
            *mounted = true;
        }
        Ok(())
    }

    /// Whether this is the folder that was looked at: its path may lead to another by now, to which the pod has no such access.
    pub(crate) fn is_at(&self, path: &Path) -> io::Result<bool> {
        let found = statx(CWD, path, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
        let Identity { device, inode, .. } = self.volume.identity;
        Ok((device, inode) == ((found.stx_dev_major, found.stx_dev_minor), found.stx_ino))
    }

    /// Answers where the volume is mounted if it was the last use: the next one has another mount. The guest is to let go of it.
    pub(crate) fn end(self) -> Option<PathBuf> {
        let mut all = self.volumes.all();
        let place = all
            .used
            .iter()
            .position(|used| Arc::ptr_eq(&used.volume, &self.volume))?;
        all.used[place].by -= 1;
        if all.used[place].by > 0 {
            return None;
        }
        all.used.swap_remove(place);
        // Nobody else has it, so that nobody is mounting it.
        if !*self.volume.mounted.lock().unwrap_or_else(PoisonError::into_inner) {
            return None;
        }
        all.ended.push(self.volume.place.clone());
        Some(self.volume.place.clone())
    }
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};

    use super::*;
    use crate::tests::in_own_mounts;

    fn volume(source: &Path, access: Access) -> Volume {
        Volume {
            source: source.to_owned(),
            mount: 0,
            access,
            below: Below::Now,
            has_mounts_below: false,
            owners: Owners::Same,
        }
    }

    fn used(volumes: &PodVolumes, volume: &Volume) -> Option<Use> {
        volumes.used(volume, &mountinfo::mounts().unwrap()).unwrap()
    }

    /// How it is mounted for the first time.
    fn access_of(used: &Use) -> Option<Access> {
        let mut access = None;
        let mount = |wanted| {
            access = Some(wanted);
            Ok(())
        };
        used.mount(mount).unwrap();
        access
    }

    fn place(used: Option<&Use>) -> Option<&str> {
        used.map(|used| used.place().to_str().unwrap())
    }

    #[test]
    fn who_may_write_has_another_mount_than_who_may_not_and_others_join_it() {
        let there = tempfile::tempdir().unwrap();
        let volumes = PodVolumes::default();
        let of = |access| used(&volumes, &volume(there.path(), access)).unwrap();
        let (reader, other) = (of(Access::Read), of(Access::ReadAll));
        let (writer, late) = (of(Access::Write), of(Access::Read));
        let places = [&reader, &other, &writer, &late].map(|used| place(Some(used)).unwrap());
        assert_eq!(places, [".volumes/0", ".volumes/0", ".volumes/1", ".volumes/1"]);
        assert_eq!(access_of(&late), Some(Access::Write));
        assert!(late.is_at(there.path()).unwrap());
        assert!(!late.is_at(tempfile::tempdir().unwrap().path()).unwrap());
        writer.mount(|_| panic!("it is mounted")).unwrap();

        assert_eq!(writer.end(), None);
        assert_eq!(volumes.ended(), Vec::<PathBuf>::new());
        assert_eq!(late.end(), Some(".volumes/1".into()));
        assert_eq!(volumes.ended(), [Path::new(".volumes/1")], "until the guest is told");
        volumes.released(&volumes.ended());
        assert_eq!(volumes.ended(), Vec::<PathBuf>::new());
        assert_eq!(reader.end(), None);
        assert_eq!(other.end(), None, "it has not been mounted");
        assert_eq!(place(Some(&of(Access::Read))), Some(".volumes/2"));
    }

    #[test]
    fn an_empty_dir_of_the_pods_own_is_one_for_readers_and_writers_in_any_order() {
        let there = tempfile::tempdir().unwrap();
        let volumes = PodVolumes::default();
        volumes.own(EmptyDirs::of(there.path(), "a-uid").unwrap());
        let own = there.path().join("pods/a-uid/volumes/kubernetes.io~empty-dir/data");
        let below = own.join("below");
        std::fs::create_dir_all(&below).unwrap();
        let of = |source: &Path, access| used(&volumes, &volume(source, access)).unwrap();
        let (reader, writer) = (of(&own, Access::Read), of(&own, Access::Write));
        assert_eq!(reader.place(), writer.place());
        assert_eq!(access_of(&reader), Some(Access::Write));
        // What a pod can make there may lead anywhere.
        assert_eq!(access_of(&of(&below, Access::Read)), Some(Access::Read));
    }

    #[test]
    fn one_that_cannot_be_mounted_is_mounted_by_the_next() {
        let there = tempfile::tempdir().unwrap();
        let volumes = PodVolumes::default();
        let [one, two] = [(), ()].map(|()| used(&volumes, &volume(there.path(), Access::Write)).unwrap());
        let failed = one.mount(|_| Err(ShimError::Internal("it is full".to_owned())));
        assert!(failed.is_err());
        two.mount(|_| Ok(())).unwrap();
        assert_eq!(one.end(), None);
        assert_eq!(two.end(), Some(".volumes/0".into()));
    }

    #[test]
    fn a_file_and_what_has_mounts_below_are_a_containers_alone() {
        let there = tempfile::tempdir().unwrap();
        let file = there.path().join("file");
        std::fs::write(&file, "").unwrap();
        let volumes = PodVolumes::default();
        assert_eq!(place(used(&volumes, &volume(&file, Access::Write)).as_ref()), None);
        let with_mounts = Volume {
            has_mounts_below: true,
            ..volume(there.path(), Access::Write)
        };
        assert_eq!(place(used(&volumes, &with_mounts).as_ref()), None);
        let gone = volume(&there.path().join("gone"), Access::Read);
        let error = volumes.used(&gone, &[]).unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
    }

    #[test]
    fn a_folder_is_the_same_through_another_mount_that_does_the_same() {
        in_own_mounts(through_others);
    }

    fn through_others(root: &Path) {
        let none = None::<&str>;
        let folder = |name: &str| {
            let path = root.join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let bound = |name: &str, flags: MsFlags| {
            let path = folder(name);
            mount(Some(&root.join("source")), &path, none, MsFlags::MS_BIND, none).unwrap();
            mount(none, &path, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags, none).unwrap();
            path
        };
        let source = folder("source");
        let (plain, again) = (bound("plain", MsFlags::empty()), bound("again", MsFlags::empty()));
        let noexec = bound("noexec", MsFlags::MS_NOEXEC);
        let volumes = PodVolumes::default();
        let mut kept = Vec::new();
        let mut places = |source: &Path, below| {
            let volume = Volume {
                below,
                ..volume(source, Access::Write)
            };
            let used = used(&volumes, &volume).unwrap();
            let place = used.place().to_str().unwrap().to_owned();
            kept.push(used);
            place
        };
        assert_eq!(places(&plain, Below::Now), ".volumes/0");
        assert_eq!(places(&again, Below::Now), ".volumes/0");
        assert_eq!(places(&noexec, Below::Now), ".volumes/1", "it forbids more");
        assert_eq!(places(&plain, Below::Always), ".volumes/2");
        assert_eq!(places(&again, Below::Always), ".volumes/3", "others are mounted below");
        assert_eq!(places(&plain, Below::Always), ".volumes/2");
        std::fs::rename(&source, root.join("former")).unwrap();
        assert_eq!(
            places(&folder("source"), Below::Now),
            ".volumes/4",
            "it is another folder"
        );
    }
}
