//! The program, spoken to by hand-made FUSE messages as a kernel sends them. They need root, as the program does.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on fails

mod support;

use std::{io::Write, os::fd::OwnedFd, os::unix::fs::MetadataExt, os::unix::net::UnixStream, time::Duration};

use nix::mount::MsFlags;
use support::{
    Directory, Entry, ROOT, Served, create_in, init, longs, message, named, opcode, read_in, u32_at, u64_at,
    with_own_mounts, words, write_in,
};

#[test]
fn init_offers_what_virtiofsd_offers_and_the_end_is_silent() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let mut served = Served::start(&directory.shared);
        let reply = served.init();
        assert_eq!(u32_at(&reply, 0), 7);
        assert_eq!(u32_at(&reply, 20), 1 << 20, "max_write");
        assert_eq!(reply[28..30], 256_u16.to_le_bytes(), "max_pages");
        let (status, said) = served.end();
        assert_eq!((status.code(), said.as_str()), (Some(0), ""));
    });
}

#[test]
fn files_are_found_read_and_listed() {
    with_own_mounts(|| {
        let directory = Directory::new();
        std::fs::write(directory.files().join("greeting"), "hello, guest").unwrap();
        let mut served = Served::ready(&directory.shared);
        let files = served.walk("files");
        let greeting = served.lookup(files, "greeting").unwrap();
        assert_eq!(greeting.mode, 0o100_644);
        assert_eq!(served.lookup(files, "nothing").unwrap_err(), libc::ENOENT);

        let handle = served.open(opcode::OPEN, greeting.node, libc::O_RDONLY).unwrap();
        let read = |offset, size| read_in(handle, offset, size);
        assert_eq!(
            served.call(opcode::READ, greeting.node, &read(0, 4096)).unwrap(),
            b"hello, guest"
        );
        // No more than was asked for, though virtiofsd would fill the whole buffer.
        assert_eq!(served.call(opcode::READ, greeting.node, &read(7, 3)).unwrap(), b"gue");
        assert_eq!(served.call(opcode::READ, greeting.node, &read(0, 0)).unwrap(), b"");

        let handle = served.open(opcode::OPENDIR, files, 0).unwrap();
        let plain = served.call(opcode::READDIR, files, &read_in(handle, 0, 4096)).unwrap();
        assert_eq!(names(&plain, 0), [".", "..", "greeting"]);
        let plus = served
            .call(opcode::READDIRPLUS, files, &read_in(handle, 0, 4096))
            .unwrap();
        assert_eq!(names(&plus, Entry::SIZE), [".", "..", "greeting"]);
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn of_what_is_the_guests_own_it_may_keep_what_it_has_seen() {
    const DAY: u64 = 24 * 60 * 60;
    /// FOPEN_KEEP_CACHE of linux/fuse.h.
    const KEEP_CACHE: u32 = 1 << 1;

    with_own_mounts(|| {
        let directory = Directory::new();
        for (folder, inside) in [("files", "own"), ("files/other", "own")] {
            let inside = directory.shared.join(folder).join(inside);
            std::fs::create_dir_all(&inside).unwrap();
            std::fs::write(inside.join("file"), "").unwrap();
        }
        let mut served = Served::ready(&directory.shared);
        for (path, own) in [("files/own", true), ("files/other/own", false), ("files", false)] {
            let folder = served.walk(path);
            let nothing = served.lookup(folder, "nothing");
            assert_eq!(
                nothing.map(|nothing| (nothing.node, nothing.valid[0])),
                own.then_some((0, DAY)).ok_or(libc::ENOENT),
                "{path}"
            );
        }
        let files = served.walk("files");
        assert_eq!(
            served.lookup(files, "own").unwrap().valid,
            [1, DAY],
            "its name may be another's"
        );
        for (path, valid) in [("files/own", DAY), ("files/other/own", 1)] {
            let folder = served.walk(path);
            let file = served.lookup(folder, "file").unwrap();
            assert_eq!(file.valid, [valid; 2], "{path}");
            let attributes = served.call(opcode::GETATTR, file.node, &longs(&[0, 0])).unwrap();
            assert_eq!(u64_at(&attributes, 0), valid, "{path}");
            let opened = served.call(opcode::OPEN, file.node, &words(&[0, 0])).unwrap();
            assert_eq!(u32_at(&opened, 8) & KEEP_CACHE != 0, valid == DAY, "{path}");
            let created = served
                .call(opcode::CREATE, folder, &create_in("new", libc::O_WRONLY, 0o644))
                .unwrap();
            assert_eq!(Entry::read(&created).valid, [valid; 2], "{path}");
            assert_eq!(
                u32_at(&created, Entry::SIZE + 8) & KEEP_CACHE != 0,
                valid == DAY,
                "{path}"
            );
        }
    });
}

/// The names in a reply to READDIR, or READDIRPLUS with its entries of `ahead` bytes, sorted.
fn names(mut reply: &[u8], ahead: usize) -> Vec<String> {
    let mut names = Vec::new();
    while !reply.is_empty() {
        let entry = &reply[ahead..];
        let length = u32_at(entry, 16) as usize;
        names.push(String::from_utf8(entry[24..24 + length].to_vec()).unwrap());
        reply = &entry[(24 + length).next_multiple_of(8)..];
    }
    names.sort();
    names
}

#[test]
fn files_are_made_by_their_user_and_written() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let open = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(directory.files(), open(0o777)).unwrap();
        let mut served = Served::ready(&directory.shared);
        let files = served.walk("files");

        let body = create_in("made", libc::O_RDWR, 0o100_640);
        let reply = served.call_as(1234, opcode::CREATE, files, &body).unwrap();
        let (made, handle) = (Entry::read(&reply), u64_at(&reply, Entry::SIZE));
        assert_eq!(made.uid, 1234);
        let body = write_in(handle, 2, 3, b"abc");
        assert_eq!(u32_at(&served.call(opcode::WRITE, made.node, &body).unwrap(), 0), 3);
        assert_eq!(std::fs::read(directory.files().join("made")).unwrap(), b"\0\0abc");
        let reply = served.call(opcode::GETATTR, made.node, &[0; 16]).unwrap();
        assert_eq!((u64_at(&reply, 16 + 8), u32_at(&reply, 16 + 68)), (5, 1234));

        let attribute = named(&words(&[5, 0]), &["user.colour"]);
        let set = [attribute, b"green".to_vec()].concat();
        served.call(opcode::SETXATTR, made.node, &set).unwrap();
        let get = named(&words(&[64, 0]), &["user.colour"]);
        assert_eq!(served.call(opcode::GETXATTR, made.node, &get).unwrap(), b"green");

        let fifo = named(&words(&[libc::S_IFIFO | 0o600, 0, 0, 0]), &["fifo"]);
        let reply = served.call_as(1234, opcode::MKNOD, files, &fifo).unwrap();
        assert_eq!(Entry::read(&reply).mode, libc::S_IFIFO | 0o600);
        // Not opened on the host, where it would wait for ever.
        assert!(
            served
                .open(opcode::OPEN, Entry::read(&reply).node, libc::O_RDONLY)
                .is_err()
        );
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn requests_arrive_in_pieces_and_many_at_once() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let mut served = Served::ready(&directory.shared);
        let getattr = |unique| message(opcode::GETATTR, unique, ROOT, 0, &[0; 16]);
        let all: Vec<u8> = (100..140).flat_map(getattr).collect();
        served.send(&all);
        for unique in 100..140 {
            let (replied, result) = served.reply();
            assert_eq!(replied, unique);
            result.unwrap();
        }
        for part in getattr(200).chunks(7) {
            served.send(part);
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(served.reply().0, 200);
        // The end of one with the begin of the next.
        let two = [getattr(201), getattr(202)].concat();
        let (first, second) = two.split_at(70);
        served.send(first);
        assert_eq!(served.reply().0, 201);
        served.send(second);
        assert_eq!(served.reply().0, 202);
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn the_longest_writes_follow_one_another() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let mut served = Served::ready(&directory.shared);
        let files = served.walk("files");
        let reply = served
            .call(opcode::CREATE, files, &create_in("long", libc::O_RDWR, 0o100_600))
            .unwrap();
        let (node, handle) = (Entry::read(&reply).node, u64_at(&reply, Entry::SIZE));
        let data: Vec<u8> = (0..1 << 20)
            .map(|at: u32| at.to_le_bytes()[1] ^ at.to_le_bytes()[0])
            .collect();
        let mut socket = served.socket.try_clone().unwrap();
        let sent = data.clone();
        let sender = std::thread::spawn(move || {
            for part in 0..8 {
                let body = write_in(handle, part << 20, 1 << 20, &sent);
                socket
                    .write_all(&message(opcode::WRITE, 1000 + part, node, 0, &body))
                    .unwrap();
                // Of another length, so that pieces come to lie anywhere.
                let getattr = message(opcode::GETATTR, 2000 + part, node, 0, &[0; 16]);
                socket.write_all(&getattr).unwrap();
            }
        });
        for part in 0..8 {
            let (unique, written) = served.reply();
            assert_eq!((unique, u32_at(&written.unwrap(), 0)), (1000 + part, 1 << 20));
            assert_eq!(served.reply().0, 2000 + part);
        }
        sender.join().unwrap();
        assert_eq!(std::fs::read(directory.files().join("long")).unwrap(), data.repeat(8));
        let read = served
            .call(opcode::READ, node, &read_in(handle, 1 << 20, 1 << 20))
            .unwrap();
        assert!(read == data);
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn what_needs_no_reply_gets_none() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let mut served = Served::ready(&directory.shared);
        let node = served.walk("files");
        served.send(&message(opcode::FORGET, 0, node, 0, &longs(&[1])));
        served.send(&message(
            opcode::BATCH_FORGET,
            0,
            0,
            0,
            &[words(&[2, 0]), longs(&[node, 9, 77, 1])].concat(),
        ));
        served.send(&message(opcode::INTERRUPT, 5, 0, 0, &longs(&[4])));
        assert_eq!(served.call(opcode::GETATTR, node, &[0; 16]).unwrap_err(), libc::EBADF);
        served.walk("files");
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn as_much_is_forgotten_at_once_as_fits_a_request() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let names = ["first", "middle", "last"];
        for name in names {
            std::fs::write(directory.files().join(name), "").unwrap();
        }
        let mut served = Served::ready(&directory.shared);
        let files = served.walk("files");
        let nodes = names.map(|name| served.lookup(files, name).unwrap().node);
        // virtiofsd takes 65536.
        let mut forgotten = vec![[1 << 40, 1]; 65_700];
        for (node, at) in nodes.iter().zip([0, 65_536, 65_699]) {
            forgotten[at] = [*node, 1];
        }
        let count = u32::try_from(forgotten.len()).unwrap();
        let body = [words(&[count, 0]), longs(forgotten.as_flattened())].concat();
        served.send(&message(opcode::BATCH_FORGET, 0, 0, 0, &body));
        for node in nodes {
            assert_eq!(served.call(opcode::GETATTR, node, &[0; 16]).unwrap_err(), libc::EBADF);
        }
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn inode_numbers_are_unique_across_devices_and_stay() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let (one, two) = (
            directory.tmpfs("one", MsFlags::empty()),
            directory.tmpfs("two", MsFlags::empty()),
        );
        for mount in [&one, &two] {
            std::fs::write(mount.join("file"), "").unwrap();
        }
        let on_host = std::fs::metadata(one.join("file")).unwrap().ino();
        assert_eq!(on_host, std::fs::metadata(two.join("file")).unwrap().ino());
        // A mount of a single file.
        directory.bind(&two.join("file"), "single");

        let mut served = Served::ready(&directory.shared);
        let mut tell = |path: &str| {
            let node = served.walk(path);
            let told = u64_at(&served.call(opcode::GETATTR, node, &[0; 16]).unwrap(), 16);
            let (parent, name) = path
                .rsplit_once('/')
                .map_or((ROOT, path), |(parent, name)| (served.walk(parent), name));
            let again = served.lookup(parent, name).unwrap().ino;
            assert_eq!(told, again, "GETATTR and LOOKUP differ on {path}");
            served.send(&message(opcode::FORGET, 0, node, 0, &longs(&[u64::MAX])));
            assert_eq!(
                served.lookup(parent, name).unwrap().ino,
                told,
                "{path} changed when it was forgotten"
            );
            told
        };
        let (first, second, single) = (tell("one/file"), tell("two/file"), tell("single"));
        assert_ne!(first, second);
        assert_eq!(second, single);
        assert_eq!([first, second].map(|number| number & ((1 << 48) - 1)), [on_host; 2]);
        let root = std::fs::metadata(&directory.shared).unwrap().ino();
        let reply = served.call(opcode::GETATTR, ROOT, &[0; 16]).unwrap();
        assert_eq!(u64_at(&reply, 16), root);

        // Made through the share, and listed.
        let node = served.walk("two");
        let reply = served
            .call(opcode::CREATE, node, &create_in("made", libc::O_RDWR, 0o100_600))
            .unwrap();
        let made = Entry::read(&reply);
        assert_eq!(made.ino >> 48, second >> 48);
        let handle = served.open(opcode::OPENDIR, node, 0).unwrap();
        let plus = served
            .call(opcode::READDIRPLUS, node, &read_in(handle, 0, 4096))
            .unwrap();
        let mut listed = &plus[..];
        while !listed.is_empty() {
            let (entry, directory_entry) = (Entry::read(listed), &listed[Entry::SIZE..]);
            assert_eq!(u64_at(directory_entry, 0) >> 48, second >> 48);
            if entry.node != 0 {
                assert_eq!(entry.ino, u64_at(directory_entry, 0));
            }
            let length = u32_at(directory_entry, 16) as usize;
            listed = &directory_entry[(24 + length).next_multiple_of(8)..];
        }
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn a_descriptor_or_directory_that_is_none_is_said() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let run = |descriptor: OwnedFd, shared: &std::path::Path| {
            let output = Served::spawn(descriptor, shared).wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(1));
            String::from_utf8(output.stderr).unwrap()
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(run(file.into(), &directory.shared).contains("is no connected stream socket"));
        let (datagrams, _other) = std::os::unix::net::UnixDatagram::pair().unwrap();
        assert!(run(datagrams.into(), &directory.shared).contains("is no connected stream socket"));
        let (socket, _other) = UnixStream::pair().unwrap();
        let said = run(socket.into(), &directory.outside().join("nowhere"));
        assert!(said.contains("nowhere is no directory"), "{said}");
    });
}

#[test]
fn it_is_confined_and_ends_with_the_process_that_was_started() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let mut served = Served::ready(&directory.shared);
        let outer = served.child.id();
        let inner = std::fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).unwrap();
        let inner = inner.trim();
        let status = std::fs::read_to_string(format!("/proc/{inner}/status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n"), "{status}");
        // CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD, SETFCAP
        assert!(status.contains("\nCapEff:\t00000000880000df\n"), "{status}");
        assert!(status.contains("\nCapBnd:\t0000000000000000\n"), "{status}");

        // What a signal for the parent's death does not outlive: acting as another user.
        std::fs::set_permissions(directory.files(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let files = served.walk("files");
        let body = create_in("made", libc::O_RDWR, 0o100_600);
        served.call_as(1234, opcode::CREATE, files, &body).unwrap();
        served.child.kill().unwrap();
        served.child.wait().unwrap();
        let mut rest = Vec::new();
        std::io::Read::read_to_end(&mut served.socket, &mut rest).expect("the inner process lives on");
        assert!(rest.is_empty());
    });
}

#[test]
fn the_first_bytes_may_be_there_before_it_is() {
    with_own_mounts(|| {
        let directory = Directory::new();
        let (ours, theirs) = UnixStream::pair().unwrap();
        // As an asynchronous runtime leaves it.
        theirs.set_nonblocking(true).unwrap();
        (&ours).write_all(&message(opcode::INIT, 1, 0, 0, &init())).unwrap();
        let mut child = Served::spawn(theirs.into(), &directory.shared);
        let mut header = [0; 16];
        std::io::Read::read_exact(&mut &ours, &mut header).unwrap();
        assert_eq!(u64_at(&header, 8), 1);
        std::thread::sleep(Duration::from_millis(20));
        assert!(child.try_wait().unwrap().is_none(), "it does not wait for more");
        drop(ours);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    });
}
