//! The program, spoken to by hand-made FUSE messages that no kernel sends, but a hostile guest might. They need root, as the program does.

#![allow(clippy::unwrap_used, clippy::expect_used)] // a test that cannot go on fails

mod support;

use std::io::Write;

use support::{
    Directory, IN_HEADER, ROOT, Served, create_in, longs, message, named, opcode, read_in, with_own_mounts, words,
    write_in,
};

#[test]
fn a_link_is_not_followed_on_the_host() {
    with_own_mounts(|| {
        let directory = Directory::new();
        std::fs::write(directory.outside().join("secret"), "").unwrap();
        std::os::unix::fs::symlink(directory.outside(), directory.files().join("out")).unwrap();
        std::os::unix::fs::symlink("/", directory.files().join("top")).unwrap();
        let mut served = Served::ready(&directory.shared);
        for link in ["files/out", "files/top"] {
            let node = served.walk(link);
            assert!(served.lookup(node, "secret").is_err());
            assert!(served.lookup(node, "files").is_err());
            assert!(served.open(opcode::OPEN, node, libc::O_RDONLY).is_err());
            assert!(served.open(opcode::OPENDIR, node, 0).is_err());
            let body = create_in("new", libc::O_RDWR, 0o100_600);
            assert!(served.call(opcode::CREATE, node, &body).is_err());
        }
        // CREATE of a name that is a link to a place outside makes nothing there.
        let files = served.walk("files");
        std::os::unix::fs::symlink(directory.outside().join("new"), directory.files().join("new")).unwrap();
        let body = create_in("new", libc::O_RDWR | libc::O_CREAT, 0o100_600);
        assert!(served.call(opcode::CREATE, files, &body).is_err());
        assert!(!directory.outside().join("new").exists());
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn names_that_are_no_names_are_refused() {
    with_own_mounts(|| {
        let directory = Directory::new();
        std::fs::create_dir(directory.files().join("sub")).unwrap();
        let mut served = Served::ready(&directory.shared);
        let (files, sub) = (served.walk("files"), served.walk("files/sub"));
        for name in ["..", ".", "", "/", "a/b", "../new", "/etc", "sub/../../../new", "sub/"] {
            let refused = [
                (opcode::LOOKUP, named(&[], &[name])),
                (opcode::MKDIR, named(&words(&[0o700, 0]), &[name])),
                (opcode::MKNOD, named(&words(&[libc::S_IFREG | 0o600, 0, 0, 0]), &[name])),
                (opcode::CREATE, create_in(name, libc::O_RDWR, 0o100_600)),
                (opcode::SYMLINK, named(&[], &[name, "target"])),
                (opcode::UNLINK, named(&[], &[name])),
                (opcode::LINK, named(&longs(&[sub]), &[name])),
                (opcode::RENAME, named(&longs(&[files]), &["sub", name])),
                (opcode::RENAME, named(&longs(&[files]), &[name, "new"])),
            ];
            for (opcode, body) in refused {
                assert_eq!(
                    served.call(opcode, files, &body).unwrap_err(),
                    libc::EINVAL,
                    "{opcode} of {name}"
                );
            }
        }
        assert!(directory.files().join("sub").exists());
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn what_is_not_known_is_refused_and_the_program_goes_on() {
    with_own_mounts(|| {
        let directory = Directory::new();
        std::fs::write(directory.files().join("file"), "text").unwrap();
        let mut served = Served::ready(&directory.shared);
        let node = served.walk("files/file");
        for opcode in [0, 7, 99, 4096, u32::MAX] {
            assert_eq!(served.call(opcode, ROOT, &[]).unwrap_err(), libc::ENOSYS);
        }
        for stranger in [0, 1 << 40, u64::MAX] {
            assert_eq!(served.lookup(stranger, "file").unwrap_err(), libc::EBADF);
            assert_eq!(
                served.call(opcode::GETATTR, stranger, &[0; 16]).unwrap_err(),
                libc::EBADF
            );
            assert_eq!(served.open(opcode::OPEN, stranger, 0).unwrap_err(), libc::EBADF);
            let read = read_in(stranger, 0, 4096);
            assert_eq!(served.call(opcode::READ, node, &read).unwrap_err(), libc::EBADF);
        }

        let handle = served.open(opcode::OPEN, node, libc::O_RDWR).unwrap();
        for (offset, size) in [(u64::MAX, 4096), (1 << 63, 1), (i64::MAX as u64, 1)] {
            let read = read_in(handle, offset, size);
            assert_eq!(served.call(opcode::READ, node, &read).unwrap_err(), libc::EINVAL);
        }
        let write = write_in(handle, u64::MAX, 1, b"x");
        assert_eq!(served.call(opcode::WRITE, node, &write).unwrap_err(), libc::EINVAL);
        assert_eq!(
            served.call(opcode::READ, node, &read_in(handle, 0, u32::MAX)).unwrap(),
            b"text"
        );
        let seek = [longs(&[handle, u64::MAX]), words(&[u32::MAX, 0])].concat();
        assert_eq!(served.call(opcode::LSEEK, node, &seek).unwrap_err(), libc::EINVAL);

        let files = served.walk("files");
        let handle = served.open(opcode::OPENDIR, files, 0).unwrap();
        for opcode in [opcode::READDIR, opcode::READDIRPLUS] {
            served.call(opcode, files, &read_in(handle, 0, u32::MAX)).unwrap();
            assert_eq!(
                served.call(opcode, files, &read_in(handle, 0, 1)).unwrap_err(),
                libc::EINVAL
            );
            let _ = served.call(opcode, files, &read_in(handle, u64::MAX, 4096));
        }
        let get = named(&words(&[u32::MAX, 0]), &["user.none"]);
        assert_eq!(served.call(opcode::GETXATTR, node, &get).unwrap_err(), libc::ENOMEM);

        // The root forgotten, and everything begun anew.
        served.send(&message(opcode::FORGET, 0, ROOT, 0, &longs(&[u64::MAX])));
        assert_eq!(served.call(opcode::GETATTR, ROOT, &[0; 16]).unwrap_err(), libc::EBADF);
        served.send(&message(opcode::DESTROY, 0, 0, 0, &[]));
        served.init();
        served.init();
        served.walk("files/file");
        assert_eq!(served.end().0.code(), Some(0));
    });
}

#[test]
fn whoever_breaks_the_protocol_ends_the_program() {
    with_own_mounts(|| {
        let directory = Directory::new();
        std::fs::write(directory.files().join("file"), "text").unwrap();
        let with_length = |length: u32| {
            let mut message = message(opcode::GETATTR, 8, ROOT, 0, &[0; 16]);
            message[..4].copy_from_slice(&length.to_le_bytes());
            message
        };
        let whole = |opcode, body: &[u8]| message(opcode, 8, ROOT, 0, body);
        let violations = [
            (with_length(0), "a request of 0 bytes"),
            (with_length(39), "a request of 39 bytes"),
            (with_length((1 << 20) + 4097), "a request of 1052673 bytes"),
            (with_length(u32::MAX), "a request of 4294967295 bytes"),
            (whole(opcode::LOOKUP, b"no end"), "a malformed request of kind 1"),
            (whole(opcode::LOOKUP, b"in\0side\0"), "a malformed request of kind 1"),
            (whole(opcode::LOOKUP, b""), "a malformed request of kind 1"),
            (whole(opcode::GETATTR, &[0; 3]), "a malformed request of kind 3"),
            (
                whole(opcode::RENAME, &named(&longs(&[ROOT]), &["one"])),
                "a malformed request of kind 12",
            ),
            (whole(opcode::READ, &[0; 39]), "a malformed request of kind 15"),
            (whole(opcode::WRITE, &[0; 39]), "a malformed request of kind 16"),
            (
                whole(opcode::WRITE, &write_in(0, 0, 5, b"more than told")),
                "wants 5 bytes written and sent 14",
            ),
            (
                whole(opcode::WRITE, &write_in(0, 0, u32::MAX, b"less")),
                "wants 4294967295 bytes written and sent 4",
            ),
            (
                whole(opcode::SETXATTR, &named(&words(&[u32::MAX, 0]), &["user.a", "b"])),
                "a malformed request of kind 21",
            ),
            (
                whole(opcode::BATCH_FORGET, &words(&[1 << 16, 0])),
                "forgets 65536 nodes in a request of 48 bytes",
            ),
            (
                whole(opcode::BATCH_FORGET, &[words(&[u32::MAX, 0]), longs(&[2, 1])].concat()),
                "forgets 4294967295 nodes in a request of 64 bytes",
            ),
            (
                whole(opcode::BATCH_FORGET, &[0; 7]),
                "forgets 0 nodes in a request of 47 bytes",
            ),
        ];
        for (message, sentence) in violations {
            let mut served = Served::ready(&directory.shared);
            served.send(&message);
            let (status, said) = served.ended();
            assert_eq!(status.code(), Some(1), "{sentence}: {said}");
            assert!(
                said.starts_with("coreos-kvm-share: the guest ") && said.contains(sentence),
                "{said}"
            );
            assert_eq!(said.lines().count(), 1, "{said}");
        }
        for cut in [1, IN_HEADER - 1, IN_HEADER, IN_HEADER + 15] {
            let mut served = Served::ready(&directory.shared);
            served.send(&whole(opcode::GETATTR, &[0; 16])[..cut]);
            let (status, said) = served.end();
            assert_eq!(status.code(), Some(1));
            assert!(said.contains("in the middle of a request"), "{said}");
        }
    });
}

#[test]
fn noise_never_crashes_it() {
    with_own_mounts(|| {
        let directory = Directory::new();
        std::fs::write(directory.files().join("file"), "text").unwrap();
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..60 {
            let mut served = Served::ready(&directory.shared);
            served.walk("files/file");
            let mut socket = served.socket.try_clone().unwrap();
            let reader = std::thread::spawn(move || {
                // An end with requests unread resets the connection.
                let _ = std::io::copy(&mut served.socket, &mut std::io::sink());
                served.child
            });
            for _ in 0..200 {
                // Long enough for any structure, every other time.
                let length = random() % 60 + if random() % 2 == 0 { 64 } else { 0 };
                let body: Vec<u8> = (0..length)
                    .map(|_| {
                        if random() % 3 == 0 {
                            random().to_le_bytes()[0]
                        } else {
                            0
                        }
                    })
                    .collect();
                let opcode = u32::from(random().to_le_bytes()[0]) % 54;
                let message = message(
                    opcode,
                    random(),
                    random() % 5,
                    u32::from(random().to_le_bytes()[0]) % 2,
                    &body,
                );
                if socket.write_all(&message).is_err() {
                    break;
                }
            }
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let child = reader.join().unwrap();
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert!(matches!(output.status.code(), Some(0 | 1)), "{}: {said}", output.status);
            assert!(!said.contains("panicked"), "{said}");
        }
    });
}
