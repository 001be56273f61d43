//! A template's memory in this node's: a file that nobody can change any more, which all clones of the template map copy-on-write. It
//! has no name and lasts as long as a machine uses it; the launchers that hold it open stand in a register, from which the next one
//! has it.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, RawFd},
        unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use memmap2::{Advice, MmapMut};
use nix::{
    fcntl::{FallocateFlags, FcntlArg, Flock, FlockArg, SealFlag, fallocate, fcntl},
    sys::memfd::{MFdFlags, memfd_create},
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{
    Manifest, Template, TemplateError,
    memory::{Change, is_damage},
};
use crate::{
    process::no_process_starts,
    state::{ProcessId, make_state_dir, read_bounded},
};

/// Whoever fills a memory has the register meanwhile: some tenths of a second for a memory of usual size.
const REGISTER: Duration = Duration::from_secs(30);
/// Whoever looks who is gone has it for a moment.
const SWEEP: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(2);
/// Launchers that are written down. More are of no use: one is asked.
const HOLDERS_MAX: usize = 64;

/// A launcher that holds the memory open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    process: ProcessId,
    descriptor: RawFd,
    /// Of the file, so that a descriptor of that number that is something else is not taken for it.
    inode: u64,
    /// Which making of the template it is: [`making`].
    making: String,
}

/// A template that is made anew has the same key and another memory.
fn making(manifest: &Manifest) -> String {
    format!(
        "{} {:08x} {:08x}",
        manifest.created, manifest.map_crc, manifest.state_crc
    )
}

/// Nobody can write to such a memory, make it longer or shorter, or take that back: fcntl(2), F_ADD_SEALS. Mapping it privately is
/// all that is left.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL
}

/// The memory of a template. It may be mapped at once, but what was in it may still be on its way.
#[derive(Debug)]
pub struct Resident {
    memory: File,
    state: State,
}

#[derive(Debug)]
enum State {
    Whole,
    /// A thread fills it.
    Filling {
        /// Closed without a word when that has failed; why is said at the end.
        content: oneshot::Receiver<()>,
        end: oneshot::Receiver<Result<(), TemplateError>>,
    },
    /// All that the template had is there.
    Filled {
        end: oneshot::Receiver<Result<(), TemplateError>>,
    },
    Failed,
}

impl Resident {
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Waits until all that the template had in memory is there, and was checked.
    ///
    /// # Errors
    /// When the template is damaged, and of the system.
    pub async fn filled(&mut self) -> Result<(), TemplateError> {
        self.state = match std::mem::replace(&mut self.state, State::Failed) {
            State::Filling { content, end } => match content.await {
                Ok(()) => State::Filled { end },
                Err(_) => return ended(end).await,
            },
            State::Failed => return Err(TemplateError::Unfilled),
            state => state,
        };
        Ok(())
    }

    /// Waits until all of it is in the node's memory and nobody can change it any more, and answers it. No pod's program may run before.
    ///
    /// # Errors
    /// As of [`Resident::filled`], and when there is no room.
    pub async fn sealed(self) -> Result<File, TemplateError> {
        match self.state {
            State::Whole => {}
            State::Filling { end, .. } | State::Filled { end } => ended(end).await?,
            State::Failed => return Err(TemplateError::Unfilled),
        }
        Ok(self.memory)
    }
}

async fn ended(end: oneshot::Receiver<Result<(), TemplateError>>) -> Result<(), TemplateError> {
    end.await.unwrap_or(Err(TemplateError::Unfilled))
}

/// The memory of `template`, from a launcher that has it, or one that a thread fills. It is accounted to this process, and not to
/// the machine that happens to be the first. Blocks while another process fills it.
///
/// # Errors
/// Of the system.
pub fn resident(state_dir: &Path, template: Template) -> Result<Resident, TemplateError> {
    let path = register_of(state_dir, &template.manifest.key);
    let failed = |what: &'static str| TemplateError::io::<io::Error>(what, &path);
    make_state_dir(state_dir).map_err(|error| failed("making the folder of")(io::Error::other(error)))?;
    let register = Register::lock(&path, REGISTER).map_err(failed("locking"))?;
    let making = making(&template.manifest);
    let size = template.manifest.memory_mib << 20;
    let holders = register.holders();
    let found = holders
        .iter()
        .filter(|holder| holder.making == making)
        .filter_map(Holder::open)
        .find(|memory| memory.metadata().is_ok_and(|file| file.len() == size));
    if let Some(memory) = found {
        register.note(holders, Holder::new(&memory, making));
        return Ok(Resident {
            memory,
            state: State::Whole,
        });
    }
    let (memory, writer) = empty(size).map_err(failed("making the memory of"))?;
    let another = memory.try_clone().map_err(failed("making the memory of"))?;
    let holder = Holder::new(&memory, making);
    let (has_content, content) = oneshot::channel();
    let (has_ended, end) = oneshot::channel();
    let work = move || {
        let filled = fill(&template, &another, writer, has_content);
        if filled.is_ok() {
            register.note(holders, holder);
        }
        // Whoever asked for it may be gone.
        let _ = has_ended.send(filled);
    };
    std::thread::Builder::new()
        .name("memory".to_owned())
        .spawn(work)
        .map_err(failed("filling the memory of"))?;
    Ok(Resident {
        memory,
        state: State::Filling { content, end },
    })
}

/// Strikes those from the register of the template `key` that do not hold its memory any more, unless somebody has it who is filling a
/// memory: the next one will.
///
/// # Errors
/// Of the register's file.
pub fn sweep(state_dir: &Path, key: &str) -> io::Result<()> {
    let path = register_of(state_dir, key);
    if !path.exists() {
        return Ok(());
    }
    let register = match Register::lock(&path, SWEEP) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
        register => register?,
    };
    let holders = register.holders();
    let holders: Vec<_> = holders.into_iter().filter(|holder| holder.open().is_some()).collect();
    register.keep(&holders);
    Ok(())
}

fn register_of(state_dir: &Path, key: &str) -> PathBuf {
    state_dir.join(format!("memory-{key}.json"))
}

/// Who holds the memory of a template: a file, locked.
struct Register {
    path: PathBuf,
    file: Flock<File>,
}

impl Register {
    fn lock(path: &Path, at_most: Duration) -> io::Result<Self> {
        let deadline = Instant::now() + at_most;
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                // Whoever had it before may have removed it.
                Ok(file) if file.metadata()?.nlink() > 0 => {
                    return Ok(Self {
                        path: path.to_owned(),
                        file,
                    });
                }
                Ok(_) => {}
                Err((_, nix::Error::EWOULDBLOCK)) if Instant::now() < deadline => std::thread::sleep(LOOK),
                Err((_, error)) => return Err(error.into()),
            }
        }
    }

    /// Those that are alive. What cannot be read is nobody: then the memory is filled once more, and written anew.
    fn holders(&self) -> Vec<Holder> {
        let text = read_bounded(&self.path).unwrap_or_default();
        let holders: Vec<Holder> = serde_json::from_slice(&text).unwrap_or_default();
        holders.into_iter().filter(|holder| holder.process.is_alive()).collect()
    }

    /// Adds one to them.
    fn note(self, mut holders: Vec<Holder>, holder: Option<Holder>) {
        holders.extend(holder);
        self.keep(&holders);
    }

    /// Writes them down, or removes the file where there are none. A failure costs the next one a memory of its own, no more.
    fn keep(self, holders: &[Holder]) {
        let write = || {
            if holders.is_empty() {
                return std::fs::remove_file(&self.path);
            }
            let text = serde_json::to_vec(&holders[holders.len().saturating_sub(HOLDERS_MAX)..])?;
            self.file.set_len(0)?;
            self.file.write_all_at(&text, 0)
        };
        if let Err(error) = write() {
            tracing::warn!(register = %self.path.display(), %error, "who holds a template's memory is not written down");
        }
    }
}

impl Holder {
    /// This process, which has `memory` open. None where it is not known.
    fn new(memory: &File, making: String) -> Option<Self> {
        Some(Self {
            process: ProcessId::of(std::process::id())?,
            descriptor: memory.as_raw_fd(),
            inode: memory.metadata().ok()?.ino(),
            making,
        })
    }

    /// The memory, if it is still there as it was.
    fn open(&self) -> Option<File> {
        let pid = Pid::from_raw(i32::try_from(self.process.pid).ok()?)?;
        let process = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // After the descriptor is open, the number is no other process's.
        if !self.process.is_alive() {
            return None;
        }
        let memory = File::from(pidfd_getfd(process.as_fd(), self.descriptor, PidfdGetfdFlags::empty()).ok()?);
        let sealed = fcntl(&memory, FcntlArg::F_GET_SEALS).ok()?;
        let same = memory.metadata().ok()?.ino() == self.inode;
        (same && SealFlag::from_bits_truncate(sealed).contains(seals())).then_some(memory)
    }
}

/// A memory of so many bytes, of which nothing is there yet. From the beginning only what is answered with it can write to it, whoever
/// else has it open.
fn empty(size: u64) -> io::Result<(File, MmapMut)> {
    let memory = File::from(memfd_create(
        c"template",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?);
    memory.set_len(size)?;
    let writer = {
        // A process of this one's would have it as long as it lives, or until it is another program, and a seal is refused as long as
        // anybody has it.
        let _alone = no_process_starts();
        // SAFETY: the file cannot become shorter, and nothing else has mapped it to write to it.
        let writer = unsafe { MmapMut::map_mut(&memory) }?;
        writer.advise(Advice::DontFork)?;
        writer
    };
    let seals = SealFlag::F_SEAL_FUTURE_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK;
    fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))?;
    Ok((memory, writer))
}

fn allocate(memory: &File, place: usize, length: usize) -> io::Result<()> {
    let (place, length) = (i64::try_from(place), i64::try_from(length));
    let (place, length) = (place.map_err(io::Error::other)?, length.map_err(io::Error::other)?);
    // Any signal interrupts it.
    while let Err(error) = fallocate(memory, FallocateFlags::empty(), place, length) {
        if error != nix::Error::EINTR {
            return Err(error.into());
        }
    }
    Ok(())
}

fn fill(
    template: &Template,
    memory: &File,
    mut writer: MmapMut,
    has_content: oneshot::Sender<()>,
) -> Result<(), TemplateError> {
    let Manifest { key, memory_mib, .. } = &template.manifest;
    let make = || {
        template.map.each(&template.data, |place, content| {
            let place = usize::try_from(place).map_err(io::Error::other)?;
            // Before it is written to: where no page can be had, this is an error, and that the end of the process.
            match writer.advise_range(Advice::PopulateWrite, place, content.len()) {
                // Linux before 5.14 does not know it.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => allocate(memory, place, content.len())?,
                populated => populated?,
            }
            let to = writer.get_mut(place..place + content.len());
            to.ok_or(io::ErrorKind::InvalidInput)?.copy_from_slice(content);
            Ok(())
        })?;
        let _ = has_content.send(());
        // All of it: what a clone writes to where nothing is would be kept here as well, on the account of whoever is the first there.
        allocate(memory, 0, usize::try_from(memory_mib << 20).map_err(io::Error::other)?)?;
        drop(writer);
        fcntl(memory, FcntlArg::F_ADD_SEALS(seals()))?;
        Ok(())
    };
    make().map_err(|error: io::Error| {
        if is_damage(&error) {
            TemplateError::damaged(key, "its memory is not the one that was saved")
        } else {
            TemplateError::io("copying the memory of the template", Path::new(key))(error)
        }
    })
}

/// Writes to what `process` has mapped of `memory`, which becomes its own thereby: each change is a place, in bytes from the memory's
/// beginning, and what is to be there.
///
/// # Errors
/// Of /proc/PID/mem, proc_pid_mem(5); `NotFound` when the process has not mapped all of the memory privately.
pub fn change(process: ProcessId, memory: &File, changes: &[Change]) -> io::Result<()> {
    let metadata = memory.metadata()?;
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid))?;
    let mapping = maps.lines().find_map(|line| mapping(line, metadata.ino()));
    let (begin, length) = mapping.filter(|(_, length)| *length >= metadata.len()).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "QEMU has not mapped its guest's memory for itself",
        )
    })?;
    let own = File::options().write(true).open(format!("/proc/{}/mem", process.pid))?;
    for (place, content) in changes {
        if place.saturating_add(content.len() as u64) > length {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        own.write_all_at(content, begin + place)?;
    }
    Ok(())
}

/// Address and length of a line of proc_pid_maps(5) that maps the beginning of that inode privately, to be read and written.
fn mapping(line: &str, inode: u64) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let (begin, end) = fields.next()?.split_once('-')?;
    let (access, offset, _device, number) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let (begin, end) = (hexadecimal(begin)?, hexadecimal(end)?);
    let ours = access == "rw-p" && hexadecimal(offset)? == 0 && number.parse() == Ok(inode);
    ours.then(|| end.checked_sub(begin).map(|length| (begin, length)))?
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap};

    use super::*;
    use crate::{
        process::{Confinement, Process},
        template::memory::{self, ID},
    };

    const KEY: &str = "00112233445566778899aabbccddeeff";
    const SIZE: u64 = 1 << 20;

    /// What [`super::resident`] answers, when it is whole.
    fn resident(state_dir: &Path, template: Template) -> Result<File, TemplateError> {
        let resident = super::resident(state_dir, template)?;
        futures::executor::block_on(resident.sealed())
    }

    fn template(root: &Path, created: u64, fill: u8) -> Template {
        let memory = tempfile::tempfile_in(root).unwrap();
        memory.set_len(SIZE).unwrap();
        memory.write_all_at(&[fill; 4096], 8192).unwrap();
        let mut data = tempfile::tempfile_in(root).unwrap();
        let saved = memory::save(&memory, SIZE, &mut data, &[]).unwrap();
        let manifest = Manifest {
            created,
            data_bytes: 4096,
            map_bytes: 16,
            ..Manifest::of_trial(KEY)
        };
        Template {
            folder: root.to_owned(),
            manifest,
            map: saved.map,
            data,
            state: Vec::new(),
        }
    }

    #[test]
    fn machines_of_one_template_have_the_same_memory_as_long_as_one_of_them_is_there() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path();
        let inode = |memory: &File| memory.metadata().unwrap().ino();
        let first = resident(path, template(path, 1, 7)).unwrap();
        let second = resident(path, template(path, 1, 7)).unwrap();
        assert_eq!(inode(&first), inode(&second));
        let number = inode(&first);
        drop(first);
        let third = resident(path, template(path, 1, 7)).unwrap();
        assert_eq!(inode(&third), number);
        drop(third);
        sweep(path, KEY).unwrap();
        assert!(register_of(path, KEY).exists(), "somebody holds it");
        drop(second);
        sweep(path, KEY).unwrap();
        assert!(!register_of(path, KEY).exists(), "nobody holds it");
        sweep(path, KEY).unwrap();
        let fourth = resident(path, template(path, 1, 7)).unwrap();
        assert_ne!(inode(&fourth), number, "nobody holds it any more");
    }

    #[test]
    fn a_template_that_was_made_anew_has_another_memory() {
        let root = tempfile::tempdir().unwrap();
        let old = resident(root.path(), template(root.path(), 1, 7)).unwrap();
        let new = resident(root.path(), template(root.path(), 2, 8)).unwrap();
        let byte = |memory: &File| {
            let mut byte = [0];
            memory.read_exact_at(&mut byte, 8192).unwrap();
            byte[0]
        };
        assert_eq!((byte(&old), byte(&new)), (7, 8));
    }

    #[test]
    fn nobody_can_change_it() {
        let root = tempfile::tempdir().unwrap();
        let memory = resident(root.path(), template(root.path(), 1, 7)).unwrap();
        assert!(memory.write_all_at(b"x", 0).is_err());
        assert!(memory.set_len(SIZE * 2).is_err());
        let again = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
            .unwrap();
        assert!(again.write_all_at(b"x", 0).is_err());
        let length = std::num::NonZeroUsize::new(SIZE as usize).unwrap();
        // SAFETY: a new mapping, which is not used.
        let shared = unsafe { mmap(None, length, ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &again, 0) };
        assert!(shared.is_err());
    }

    #[test]
    fn only_its_writer_can_change_what_is_being_filled() {
        let (memory, mut writer) = empty(SIZE).unwrap();
        assert!(memory.write_all_at(b"x", 0).is_err());
        assert!(memory.set_len(SIZE / 2).is_err());
        let length = std::num::NonZeroUsize::new(SIZE as usize).unwrap();
        // SAFETY: a new mapping, which is not used.
        let shared = unsafe { mmap(None, length, ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, &memory, 0) };
        assert!(shared.is_err());
        writer[0] = 7;
        let mut byte = [0];
        memory.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [7]);
    }

    #[tokio::test]
    async fn processes_that_start_while_memories_are_made_have_nothing_of_them() {
        let root = tempfile::tempdir().unwrap();
        let template = template(root.path(), 1, 7);
        let making = tokio::task::spawn_blocking(move || {
            for _ in 0..500 {
                let (memory, writer) = empty(SIZE).unwrap();
                fill(&template, &memory, writer, oneshot::channel().0).unwrap();
            }
        });
        let mut started = std::collections::VecDeque::new();
        while !making.is_finished() {
            // One that never becomes another program.
            let waits = || loop {
                // SAFETY: takes nothing.
                unsafe { libc::pause() };
            };
            started.push_back(Process::fork(waits, &Confinement::default()).unwrap());
            if started.len() > 8 {
                started.pop_front().unwrap().kill().await;
            }
        }
        making.await.unwrap();
    }

    #[test]
    fn damage_is_noticed() {
        let root = tempfile::tempdir().unwrap();
        let template = template(root.path(), 1, 7);
        template.data.write_all_at(b"x", 17).unwrap();
        let error = resident(root.path(), template).unwrap_err();
        assert!(matches!(error, TemplateError::Damaged { .. }), "{error}");
    }

    #[test]
    fn another_file_of_that_number_and_a_register_of_nonsense_are_not_believed() {
        let root = tempfile::tempdir().unwrap();
        let memory = resident(root.path(), template(root.path(), 1, 7)).unwrap();
        let number = memory.as_raw_fd();
        drop(memory);
        let other = OwnedFd::from(tempfile::tempfile().unwrap());
        // SAFETY: the number was closed above, and other tests open theirs elsewhere or are served an error by this one's checks.
        let _ = unsafe { libc::fcntl(other.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
        let memory = resident(root.path(), template(root.path(), 1, 7)).unwrap();
        assert!(memory.write_all_at(b"x", 0).is_err());
        std::fs::write(register_of(root.path(), KEY), "{").unwrap();
        resident(root.path(), template(root.path(), 1, 7)).unwrap();
    }

    #[test]
    fn what_a_process_has_mapped_is_changed_for_it_alone() {
        let root = tempfile::tempdir().unwrap();
        let memory = resident(root.path(), template(root.path(), 1, 7)).unwrap();
        let me = ProcessId::of(std::process::id()).unwrap();
        assert!(change(me, &memory, &[]).is_err(), "nothing is mapped");
        let length = std::num::NonZeroUsize::new(SIZE as usize).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, read below within its length.
        let mapped = unsafe { mmap(None, length, access, MapFlags::MAP_PRIVATE, &memory, 0) }.unwrap();
        change(me, &memory, &[(8192, vec![5; ID]), (4096, vec![6; ID])]).unwrap();
        let taken = memory.metadata().unwrap().blocks() * 512;
        assert_eq!(taken, SIZE, "all of it is there before anybody writes");
        // SAFETY: the mapping is that long.
        let bytes = unsafe { std::slice::from_raw_parts(mapped.as_ptr().cast::<u8>().add(8192), ID + 1) };
        assert_eq!(bytes, [[5; ID].as_slice(), &[7]].concat());
        let mut there = [0; ID];
        memory.read_exact_at(&mut there, 8192).unwrap();
        assert_eq!(there, [7; ID]);
        assert!(change(me, &memory, &[(SIZE - 1, vec![5; ID])]).is_err());
    }
}
