//! What the program costs: its start, a round trip, memory. By root, with nothing else at work:
//!
//! ```sh
//! cargo bench -p coreos-kvm-share
//! ```

#![allow(clippy::unwrap_used, clippy::expect_used)] // a measurement that cannot go on fails

#[path = "../tests/support/mod.rs"]
mod support;

use std::{
    fs,
    time::{Duration, Instant},
};

use support::{Directory, ROOT, Served, create_in, opcode, read_in, u64_at, with_own_mounts, write_in};

fn main() {
    with_own_mounts(|| {
        let directory = Directory::new();
        for number in 0..1000 {
            fs::write(directory.files().join(number.to_string()), "").unwrap();
        }
        let start = || {
            let began = Instant::now();
            let served = Served::ready(&directory.shared);
            let took = began.elapsed();
            assert_eq!(served.end().0.code(), Some(0));
            took
        };
        println!("start until the reply to INIT: {}", spread(100, start));

        let mut served = Served::ready(&directory.shared);
        println!("memory after INIT: {}", memory(served.child.id()));
        let getattr = || timed(|| served.call(opcode::GETATTR, ROOT, &[0; 16]));
        println!("GETATTR: {}", spread(10_000, getattr));
        let files = served.walk("files");
        let mut number = 0..1000;
        let lookup = || timed(|| served.lookup(files, &number.next().unwrap().to_string()));
        println!("LOOKUP of a file not met before: {}", spread(1000, lookup));
        let again = || timed(|| served.lookup(files, "7"));
        println!("LOOKUP of a file met before: {}", spread(10_000, again));

        let reply = served
            .call(opcode::CREATE, files, &create_in("large", libc::O_RDWR, 0o100_600))
            .unwrap();
        let (node, handle) = (u64_at(&reply, 0), u64_at(&reply, support::Entry::SIZE));
        let data = vec![7; 1 << 20];
        let write = || timed(|| served.call(opcode::WRITE, node, &write_in(handle, 0, 1 << 20, &data)));
        println!("WRITE of 1 MiB: {}", spread(300, write));
        let read = || timed(|| served.call(opcode::READ, node, &read_in(handle, 0, 1 << 20)));
        println!("READ of 1 MiB: {}", spread(300, read));
        println!("memory at last: {}", memory(served.child.id()));
        assert_eq!(served.end().0.code(), Some(0));
    });
}

fn timed<T>(call: impl FnOnce() -> Result<T, i32>) -> Duration {
    let began = Instant::now();
    call().unwrap();
    began.elapsed()
}

/// The median, and a tenth from either end.
fn spread(times: usize, measure: impl FnMut() -> Duration) -> String {
    let mut taken: Vec<_> = std::iter::repeat_with(measure).take(times).collect();
    taken.sort();
    format!(
        "{:?} ({:?} to {:?})",
        taken[times / 2],
        taken[times / 10],
        taken[times * 9 / 10]
    )
}

/// The proportional memory of the process that was started and of the one that serves.
fn memory(outer: u32) -> String {
    let inner = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children")).unwrap();
    let of = |process: &str| {
        let smaps = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap();
        let line = smaps.lines().find(|line| line.starts_with("Pss:")).unwrap();
        line.trim_start_matches("Pss:").trim().to_owned()
    };
    format!("{} and {}", of(&outer.to_string()), of(inner.trim()))
}
