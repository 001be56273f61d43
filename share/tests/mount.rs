//! The program behind a real mount of this machine's kernel: what a guest's programs find there, by ordinary calls. It needs root and /dev/fuse.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on fails

mod support;

use std::{
    collections::HashMap,
    ffi::CString,
    fs::{self, File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    num::NonZeroUsize,
    os::{
        fd::AsRawFd,
        unix::fs::{DirEntryExt, FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, Flock, FlockArg, fcntl},
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::{
        mman::{MapFlags, ProtFlags, mmap, munmap},
        stat::{Mode, SFlag, mknod},
        statvfs::statvfs,
    },
};
use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use support::guest::in_guest;

/// Bytes that tell where they are.
fn pattern(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at ^ at >> 8 ^ at >> 16).to_le_bytes()[0])
        .collect()
}

#[test]
fn files_are_written_read_extended_cut_and_renamed() {
    in_guest(|directory, guest| {
        let (inside, host) = (guest.at("files/big"), directory.files().join("big"));
        let mut data = pattern(5 << 20);
        fs::write(&inside, &data).unwrap();
        assert!(fs::read(&host).unwrap() == data);
        assert!(fs::read(&inside).unwrap() == data);

        let mut appended = OpenOptions::new().append(true).open(&inside).unwrap();
        // Written on the host since, which the guest's kernel does not know: it is the host that appends.
        OpenOptions::new()
            .append(true)
            .open(&host)
            .unwrap()
            .write_all(b"host ")
            .unwrap();
        appended.write_all(b"guest").unwrap();
        drop(appended);
        data.extend(b"host guest");
        assert!(fs::read(&host).unwrap() == data);

        let file = OpenOptions::new().read(true).write(true).open(&inside).unwrap();
        file.set_len(70_000).unwrap();
        assert_eq!(fs::metadata(&host).unwrap().len(), 70_000);
        file.write_all_at(b"hole", 1 << 20).unwrap();
        assert_eq!((&file).seek(SeekFrom::End(0)).unwrap(), (1 << 20) + 4);
        file.sync_all().unwrap();
        fs::rename(&inside, guest.at("files/renamed")).unwrap();
        assert!(!host.exists());
        // Still open under its old name.
        let mut part = [0; 4];
        file.read_exact_at(&mut part, 1 << 20).unwrap();
        assert_eq!(&part, b"hole");
        fs::File::create(guest.at("files/renamed")).unwrap();
        assert_eq!(fs::metadata(directory.files().join("renamed")).unwrap().len(), 0);
        fs::remove_file(guest.at("files/renamed")).unwrap();
        fs::create_dir_all(guest.at("files/a/b/c")).unwrap();
        fs::remove_dir_all(guest.at("files/a")).unwrap();
        assert_eq!(fs::read_dir(directory.files()).unwrap().count(), 0);
    });
}

#[test]
fn what_the_host_changes_shows_within_seconds() {
    in_guest(|directory, guest| {
        let host = directory.files().join("setting");
        fs::write(&host, "old").unwrap();
        assert_eq!(fs::read(guest.at("files/setting")).unwrap(), b"old");
        // As the kubelet updates a volume.
        fs::write(directory.files().join("new"), "newer").unwrap();
        fs::rename(directory.files().join("new"), &host).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(fs::read(guest.at("files/setting")).unwrap(), b"newer");
    });
}

#[test]
fn what_the_guest_changes_itself_shows_at_once_although_it_keeps_what_it_has_seen() {
    in_guest(|directory, guest| {
        fs::create_dir(directory.files().join("own")).unwrap();
        let (file, other) = (guest.at("files/own/file"), guest.at("files/own/other"));
        let read = |path: &PathBuf| fs::read_to_string(path).unwrap();
        // What is not there, and then is.
        assert_eq!(error(fs::read(&file)), libc::ENOENT);
        fs::write(&file, "one").unwrap();
        assert_eq!(read(&file), "one");
        // By another opening, longer and shorter.
        fs::write(&file, "longer than one").unwrap();
        assert_eq!(
            (read(&file), file.metadata().unwrap().len()),
            ("longer than one".to_owned(), 15)
        );
        File::options().write(true).open(&file).unwrap().set_len(6).unwrap();
        assert_eq!((read(&file), file.metadata().unwrap().len()), ("longer".to_owned(), 6));
        // Under another name, and another file under this one.
        fs::write(&other, "another").unwrap();
        fs::rename(&other, &file).unwrap();
        assert_eq!(
            (read(&file), error(fs::read(&other))),
            ("another".to_owned(), libc::ENOENT)
        );
        fs::hard_link(&file, &other).unwrap();
        fs::write(&other, "both").unwrap();
        assert_eq!((read(&file), file.metadata().unwrap().nlink()), ("both".to_owned(), 2));
        fs::remove_file(&file).unwrap();
        assert_eq!(
            (error(fs::read(&file)), other.metadata().unwrap().nlink()),
            (libc::ENOENT, 1)
        );
        fs::create_dir(&file).unwrap();
        fs::write(file.join("a"), "").unwrap();
        let names = |path: &PathBuf| fs::read_dir(path).unwrap().count();
        assert_eq!((names(&file), names(&guest.at("files/own"))), (1, 2));
        fs::remove_dir_all(&file).unwrap();
        assert_eq!(names(&guest.at("files/own")), 1);
    });
}

#[test]
fn a_large_directory_is_listed_whole() {
    in_guest(|directory, guest| {
        for number in 0..5000 {
            File::create(directory.files().join(format!("file-with-a-longer-name-{number}"))).unwrap();
        }
        let mut listed: Vec<_> = fs::read_dir(guest.at("files"))
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                assert_eq!(entry.ino(), entry.metadata().unwrap().ino());
                entry.file_name()
            })
            .collect();
        listed.sort();
        listed.dedup();
        assert_eq!(listed.len(), 5000);
    });
}

#[test]
fn files_belong_to_who_makes_them_and_modes_hold() {
    in_guest(|directory, guest| {
        fs::set_permissions(directory.files(), fs::Permissions::from_mode(0o1777)).unwrap();
        let shell = |user: u32, text: &str| {
            Command::new("setpriv")
                .arg(format!("--reuid={user}"))
                .arg(format!("--regid={}", user + 1))
                .arg(format!("--groups={},4321", user + 1))
                .args(["/bin/sh", "-c", text])
                .current_dir(guest.at("files"))
                .stderr(std::process::Stdio::null())
                .status()
                .unwrap()
                .success()
        };
        assert!(shell(
            1234,
            "umask 027; echo text >file; mkdir directory; ln -s file link; mkfifo fifo"
        ));
        for (name, mode) in [
            ("file", 0o100_640),
            ("directory", 0o40_750),
            ("link", 0o120_777),
            ("fifo", 0o10_640),
        ] {
            for place in [directory.files(), guest.at("files")] {
                let metadata = fs::symlink_metadata(place.join(name)).unwrap();
                assert_eq!(
                    (metadata.uid(), metadata.gid(), metadata.mode()),
                    (1234, 1235, mode),
                    "{name}"
                );
            }
        }
        assert!(!shell(5678, "cat file >/dev/null"));
        assert!(!shell(5678, "rm -f file"));
        assert!(shell(
            1234,
            "cat file >/dev/null && chmod 604 file && touch -d 2001-02-03 file"
        ));
        assert!(shell(5678, "cat file >/dev/null"));
        assert!(!shell(1234, "chown 5678 file"));
        std::os::unix::fs::chown(guest.at("files/file"), Some(5678), Some(9)).unwrap();
        let metadata = fs::metadata(directory.files().join("file")).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode()), (5678, 9, 0o100_604));
        assert_eq!(metadata.mtime() / 86400, 11_356);
        // A directory whose group is handed on, and a user who is in the group by a supplementary one alone.
        fs::create_dir(guest.at("files/grouped")).unwrap();
        std::os::unix::fs::chown(guest.at("files/grouped"), Some(0), Some(4321)).unwrap();
        fs::set_permissions(guest.at("files/grouped"), fs::Permissions::from_mode(0o2770)).unwrap();
        assert!(shell(1234, "echo text >grouped/file"));
        assert_eq!(
            fs::metadata(directory.files().join("grouped/file")).unwrap().gid(),
            4321
        );
        mknod(
            &guest.at("files/null"),
            SFlag::S_IFCHR,
            Mode::from_bits_truncate(0o600),
            libc::makedev(1, 3),
        )
        .unwrap();
        let made = fs::symlink_metadata(directory.files().join("null")).unwrap();
        assert!(made.file_type().is_char_device());
        assert_eq!(made.rdev(), libc::makedev(1, 3));
        std::os::unix::net::UnixListener::bind(guest.at("files/socket")).unwrap();
        assert!(
            fs::symlink_metadata(directory.files().join("socket"))
                .unwrap()
                .file_type()
                .is_socket()
        );
    });
}

#[test]
fn extended_attributes_are_the_hosts() {
    in_guest(|directory, guest| {
        let (inside, host) = (guest.at("files/file"), directory.files().join("file"));
        fs::write(&inside, "").unwrap();
        setxattr(&inside, "user.one", b"first", XattrFlags::CREATE).unwrap();
        // What setcap(8) makes of cap_net_raw+ep.
        let capability = [[1, 0, 0, 2], [0, 0x20, 0, 0], [0; 4], [0; 4], [0; 4]].concat();
        setxattr(&inside, "security.capability", &capability, XattrFlags::empty()).unwrap();
        // Nothing of the host's own, such as overlayfs's notes.
        let trusted = setxattr(&inside, "trusted.overlay.opaque", b"y", XattrFlags::empty());
        assert_eq!(trusted, Err(rustix::io::Errno::PERM));
        let mut value = [0; 64];
        let length = getxattr(&host, "user.one", &mut value).unwrap();
        assert_eq!(&value[..length], b"first");
        let length = getxattr(&host, "security.capability", &mut value).unwrap();
        assert_eq!(value[..length], capability);
        let length = listxattr(&inside, &mut value).unwrap();
        let listed: Vec<_> = value[..length]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .collect();
        assert!(listed.contains(&&b"user.one"[..]), "{listed:?}");
        removexattr(&inside, "user.one").unwrap();
        assert_eq!(getxattr(&host, "user.one", &mut value), Err(rustix::io::Errno::NODATA));
        setxattr(&inside, "user.two", b"", XattrFlags::CREATE).unwrap();
        let again = setxattr(&inside, "user.two", b"", XattrFlags::CREATE);
        assert_eq!(again, Err(rustix::io::Errno::EXIST));
        // A write takes the capability away, here as anywhere.
        fs::write(&inside, "other").unwrap();
        assert_eq!(
            getxattr(&host, "security.capability", &mut value),
            Err(rustix::io::Errno::NODATA)
        );
    });
}

#[test]
fn hard_links_are_one_file_and_symbolic_links_are_the_guests_own() {
    in_guest(|directory, guest| {
        fs::write(guest.at("files/file"), "text").unwrap();
        fs::hard_link(guest.at("files/file"), guest.at("files/hard")).unwrap();
        let [file, hard] = ["files/file", "files/hard"].map(|name| fs::metadata(guest.at(name)).unwrap());
        assert_eq!((file.ino(), file.nlink()), (hard.ino(), 2));
        fs::write(guest.at("files/hard"), "changed").unwrap();
        assert_eq!(fs::read(guest.at("files/file")).unwrap(), b"changed");

        // The guest follows it in its own tree: in this one, whose root is the host's, it leads to the host.
        let secret = directory.outside().join("secret");
        symlink(&secret, guest.at("files/out")).unwrap();
        assert_eq!(fs::read_link(guest.at("files/out")).unwrap(), secret);
        assert_eq!(fs::read_link(directory.files().join("out")).unwrap(), secret);
        symlink("file", guest.at("files/near")).unwrap();
        assert_eq!(fs::read(guest.at("files/near")).unwrap(), b"changed");
        let up = guest.at("files/../..").canonicalize().unwrap();
        assert_eq!(up, directory.outside().canonicalize().unwrap());
        assert_eq!(fs::read_dir(guest.at(".")).unwrap().count(), 1);
    });
}

#[test]
fn mounts_made_later_show_and_stay_as_writable_as_they_are() {
    in_guest(|directory, guest| {
        assert_eq!(Errno::EROFS as i32, error(fs::write(guest.at("new"), "")));
        assert_eq!(Errno::EROFS as i32, error(fs::create_dir(guest.at("new"))));
        let late = directory.tmpfs("late", MsFlags::empty());
        fs::write(late.join("file"), "text").unwrap();
        assert_eq!(fs::read(guest.at("late/file")).unwrap(), b"text");
        fs::write(guest.at("late/other"), "").unwrap();

        // Made read-only before it is mounted in the share, for what is done to a mount does not reach its copies.
        let source = directory.outside().join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "text").unwrap();
        let none: Option<&str> = None;
        mount(Some(&source), &source, none, MsFlags::MS_BIND, none).unwrap();
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, &source, none, read_only, none).unwrap();
        directory.bind(&source, "sealed");
        assert_eq!(fs::read(guest.at("sealed/file")).unwrap(), b"text");
        let file = guest.at("sealed/file");
        for failed in [
            fs::write(&file, ""),
            fs::remove_file(&file),
            fs::rename(&file, guest.at("sealed/new")),
            fs::set_permissions(&file, fs::Permissions::from_mode(0o777)),
            fs::hard_link(&file, guest.at("sealed/new")),
            symlink("file", guest.at("sealed/new")),
            std::os::unix::fs::chown(&file, Some(1), None),
        ] {
            assert_eq!(error(failed), Errno::EROFS as i32);
        }
        let set = setxattr(&file, "user.one", b"", XattrFlags::empty());
        assert_eq!(set, Err(rustix::io::Errno::ROFS));
        // From one mount to another there is no rename.
        assert_eq!(
            error(fs::rename(guest.at("late/file"), guest.at("files/file"))),
            libc::EXDEV
        );

        // A mount that is gone.
        umount2(&source, MntFlags::MNT_DETACH).unwrap();
        umount2(&late, MntFlags::MNT_DETACH).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert_eq!(error(fs::read(guest.at("late/file"))), libc::ENOENT);
    });
}

fn error<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn files_of_two_file_systems_with_one_number_are_two_files() {
    in_guest(|directory, guest| {
        let [one, two] = ["one", "two"].map(|name| directory.tmpfs(name, MsFlags::empty()));
        for place in [&one, &two] {
            for file in ["first", "second"] {
                fs::write(place.join(file), place.to_str().unwrap()).unwrap();
            }
        }
        let number = |path: &Path| {
            let metadata = fs::symlink_metadata(path).unwrap();
            (metadata.dev(), metadata.ino())
        };
        assert_eq!(number(&one.join("first")).1, number(&two.join("first")).1);
        let mut seen = HashMap::new();
        for name in [
            "one",
            "two",
            "one/first",
            "two/first",
            "one/second",
            "two/second",
            "files",
            ".",
        ] {
            let other = seen.insert(number(&guest.at(name)), name);
            assert_eq!(other, None, "has the number of {name}");
        }
        // What a program does that compares numbers.
        let copied = Command::new("cp")
            .args([guest.at("one/first"), guest.at("two/first")])
            .output()
            .unwrap();
        assert!(copied.status.success(), "{copied:?}");
        assert_eq!(fs::read(two.join("first")).unwrap(), one.to_str().unwrap().as_bytes());
        // Names are forgotten, and looked up again.
        let before: Vec<_> = ["one/first", "two/first"].map(|name| number(&guest.at(name))).into();
        fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
        let after: Vec<_> = ["one/first", "two/first"].map(|name| number(&guest.at(name))).into();
        assert_eq!(before, after);
    });
}

#[test]
fn the_root_of_a_container_works() {
    in_guest(|directory, guest| {
        let [lower, upper] = ["lower", "upper"].map(|name| {
            let place = directory.outside().join(name);
            fs::create_dir(&place).unwrap();
            mount(Some("tmpfs"), &place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
            place
        });
        fs::create_dir(lower.join("etc")).unwrap();
        fs::write(lower.join("etc/hosts"), "old").unwrap();
        fs::write(lower.join("etc/gone"), "").unwrap();
        let [files, work] = ["files", "work"].map(|name| upper.join(name));
        fs::create_dir(&files).unwrap();
        fs::create_dir(&work).unwrap();
        fs::create_dir(directory.points.join("rootfs")).unwrap();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            files.display(),
            work.display()
        );
        let root = directory.shared.join("rootfs");
        mount(
            Some("overlay"),
            &root,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();

        let inside = guest.at("rootfs");
        assert_eq!(fs::read(inside.join("etc/hosts")).unwrap(), b"old");
        fs::write(inside.join("etc/hosts"), "new").unwrap();
        fs::write(inside.join("etc/made"), "made").unwrap();
        fs::remove_file(inside.join("etc/gone")).unwrap();
        fs::rename(inside.join("etc/made"), inside.join("etc/renamed")).unwrap();
        assert_eq!(fs::read(files.join("etc/hosts")).unwrap(), b"new");
        assert_eq!(fs::read(lower.join("etc/hosts")).unwrap(), b"old");
        let mut numbers: Vec<_> = ["", "etc", "etc/hosts", "etc/renamed"]
            .map(|name| fs::metadata(inside.join(name)).unwrap().ino())
            .into();
        numbers.push(fs::metadata(guest.at("files")).unwrap().ino());
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 5);
        assert_eq!(fs::read_dir(inside.join("etc")).unwrap().count(), 2);
        fs::remove_dir_all(inside.join("etc")).unwrap();
        assert!(!root.join("etc").exists());
        for place in [&root, &lower, &upper] {
            umount2(place, MntFlags::MNT_DETACH).unwrap();
        }
    });
}

#[test]
fn the_size_of_the_file_system_is_told() {
    in_guest(|directory, guest| {
        let small = directory.outside().join("small");
        fs::create_dir(&small).unwrap();
        mount(Some("tmpfs"), &small, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).unwrap();
        directory.bind(&small, "small");
        let told = statvfs(&guest.at("small")).unwrap();
        assert_eq!(told.blocks() * told.fragment_size(), 64 << 10);
        assert_eq!(
            error(fs::write(guest.at("small/file"), vec![1; 128 << 10])),
            libc::ENOSPC
        );
        umount2(&small, MntFlags::MNT_DETACH).unwrap();
    });
}

#[test]
fn locks_hold_among_the_guests_programs() {
    in_guest(|_, guest| {
        let path = guest.at("files/lock");
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .unwrap()
        };
        let held = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
        let (_, busy) = Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap_err();
        assert_eq!(busy, Errno::EWOULDBLOCK);
        drop(held);
        Flock::lock(open(), FlockArg::LockExclusiveNonblock).unwrap();
        let (one, other) = (open(), open());
        let lock = libc::flock {
            l_type: libc::F_WRLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 10,
            l_pid: 0,
        };
        fcntl(&one, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
        assert_eq!(fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)), Err(Errno::EAGAIN));
    });
}

#[test]
fn programs_run_and_files_are_mapped() {
    in_guest(|directory, guest| {
        fs::copy("/bin/cat", directory.files().join("program")).unwrap();
        let output = Command::new(guest.at("files/program"))
            .arg("/proc/self/comm")
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"program\n");

        let data = pattern(300_000);
        fs::write(directory.files().join("mapped"), &data).unwrap();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(guest.at("files/mapped"))
            .unwrap();
        let length = NonZeroUsize::new(data.len()).unwrap();
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping; it is read and written as plain bytes, and unmapped once.
        unsafe {
            let mapped = mmap(None, length, protection, MapFlags::MAP_SHARED, &file, 0).unwrap();
            let bytes = std::slice::from_raw_parts_mut(mapped.as_ptr().cast::<u8>(), data.len());
            assert!(bytes == data);
            bytes[200_000..200_004].copy_from_slice(b"Maps");
            munmap(mapped, data.len()).unwrap();
        }
        file.sync_all().unwrap();
        assert_eq!(
            &fs::read(directory.files().join("mapped")).unwrap()[200_000..200_004],
            b"Maps"
        );
    });
}

#[test]
fn direct_and_exclusive_opens_work_as_on_the_host() {
    in_guest(|directory, guest| {
        let path = guest.at("files/file");
        let exclusive = || OpenOptions::new().write(true).create_new(true).mode(0o4711).open(&path);
        exclusive().unwrap();
        assert_eq!(error(exclusive()), libc::EEXIST);
        assert_eq!(fs::metadata(directory.files().join("file")).unwrap().mode(), 0o104_711);
        // virtiofsd leaves O_DIRECT to the guest's kernel.
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        // SAFETY: a system call on an open descriptor and numbers.
        assert_eq!(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, 10_000) }, 0);
        assert_eq!(fs::metadata(directory.files().join("file")).unwrap().len(), 10_000);
        // Exchanged at once, as programs do that replace a directory.
        fs::create_dir(guest.at("files/directory")).unwrap();
        let [one, other] =
            ["files/file", "files/directory"].map(|name| CString::new(guest.at(name).to_str().unwrap()).unwrap());
        // SAFETY: a system call on two strings.
        let exchanged = unsafe {
            libc::renameat2(
                libc::AT_FDCWD,
                one.as_ptr(),
                libc::AT_FDCWD,
                other.as_ptr(),
                libc::RENAME_EXCHANGE,
            )
        };
        assert_eq!(exchanged, 0);
        assert!(directory.files().join("file").is_dir());
    });
}

#[test]
fn many_programs_use_it_at_once() {
    in_guest(|_, guest| {
        std::thread::scope(|scope| {
            for number in 0..8 {
                scope.spawn(move || {
                    let own = guest.at(&format!("files/{number}"));
                    fs::create_dir(&own).unwrap();
                    let data = pattern(300_000 + number);
                    for round in 0..10 {
                        let file = own.join(round.to_string());
                        fs::write(&file, &data).unwrap();
                        assert!(fs::read(&file).unwrap() == data);
                        fs::rename(&file, own.join(format!("done-{round}"))).unwrap();
                    }
                    assert_eq!(fs::read_dir(&own).unwrap().count(), 10);
                });
            }
        });
    });
}
