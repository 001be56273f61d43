//! libFuzzer's targets (`ignition/fuzz`) without libFuzzer: on every file of the corpus, and on texts made of the corpus by
//! chance, the same ones for the same seed. `FUZZ_SEED=number` begins elsewhere, `FUZZ_SECONDS=number` goes on for longer.

#![allow(clippy::unwrap_used)] // a trial that cannot read the corpus has failed

#[path = "../fuzz/targets.rs"]
mod targets;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use targets::{SEPARATOR, TARGETS};

/// Longest text that is made.
const LENGTH_MAX: usize = 64 << 10;
/// What a target may take for it, in a build without optimisation.
const BOUND: Duration = Duration::from_secs(2);

#[test]
fn whatever_the_text_there_is_an_answer() {
    let number = |name, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (seed, seconds) = (number("FUZZ_SEED", 2001), number("FUZZ_SECONDS", 15));
    // Written before it is tried, so that it is there whatever happens to this process.
    let input = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-input-{seed}"));
    println!("FUZZ_SEED={seed}; what is tried is in {}", input.display());

    let (done, waiting) = mpsc::channel();
    let worker = thread::spawn({
        let input = input.clone();
        move || drive(seed, Duration::from_secs(seconds), &input, &done)
    });
    let mut tried = 0;
    loop {
        match waiting.recv_timeout(BOUND) {
            Ok(()) => tried += 1,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                panic!("{} takes longer than {BOUND:?}", input.display())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    assert!(
        worker.join().is_ok(),
        "{} is a finding; FUZZ_SEED={seed}",
        input.display()
    );
    let _ = fs::remove_file(&input);
    println!("{tried} texts");
}

fn drive(seed: u64, time: Duration, input: &Path, done: &mpsc::Sender<()>) {
    let seeds = corpus();
    let attempt = |data: &[u8]| {
        fs::write(input, data).unwrap();
        for (_, target) in TARGETS {
            target(data);
        }
        // Nobody waits any longer: the test is over.
        let _ = done.send(());
    };
    for data in &seeds {
        attempt(data);
    }
    let begun = Instant::now();
    let mut chance = Chance(seed);
    while begun.elapsed() < time {
        attempt(&text_by_chance(&mut chance, &seeds));
    }
}

/// The contents of every file below `ignition/corpus`, in the order of their paths.
fn corpus() -> Vec<Vec<u8>> {
    let mut paths = Vec::new();
    collect(&Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus"), &mut paths);
    paths.sort();
    let files: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(files.len() > 100, "the corpus is there");
    files
}

fn collect(folder: &Path, paths: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, paths);
        } else {
            paths.push(path);
        }
    }
}

/// SplitMix64: small, and the same everywhere.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Less than `end`; 0 where there is nothing less.
    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).unwrap()).unwrap()
    }

    fn one_of<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// Part of something of this length.
    fn range(&mut self, length: usize, most: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        start..(start + self.below(most + 1)).min(length)
    }
}

fn text_by_chance(chance: &mut Chance, seeds: &[Vec<u8>]) -> Vec<u8> {
    let mut text = seeds[chance.below(seeds.len())].clone();
    if chance.below(3) == 0 {
        text.push(SEPARATOR);
        text.extend(&seeds[chance.below(seeds.len())]);
    }
    for _ in 0..=chance.below(4) {
        change(chance, &mut text, seeds);
        text.truncate(LENGTH_MAX);
    }
    text
}

/// What a text may have in the wrong place.
const TOKENS: &[&str] = &[
    "- ",
    ": ",
    ":",
    "? ",
    "[",
    "]",
    "{",
    "}",
    ",",
    "'",
    "\"",
    "|\n",
    ">-\n",
    "|9\n",
    "&a ",
    "*a",
    "&a [*a, *a]",
    "<<: *a\n",
    "<<: [*a, *a]\n",
    "!!binary ",
    "!!str ",
    "!!int ",
    "!t ",
    "#",
    "%YAML 1.1\n",
    "%TAG ! tag:a,2000:\n",
    "---\n",
    "...\n",
    "\n",
    "\r\n",
    "\r",
    "\t",
    " ",
    "\0",
    "\u{feff}",
    "\u{85}",
    "\u{2028}",
    "é",
    "\u{10ffff}",
    "\\ud800",
    "\\u0000",
    "\\x",
    "\\",
    "/",
    "..",
    "%",
    "%zz",
    "~",
    "null",
    "true",
    "yes",
    "0",
    "-1",
    "0o7777",
    "01000",
    "0x",
    "1e400",
    ".inf",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
    "-9223372036854775808",
    "4294967296",
    "NaN",
    "\"\"",
    "{}",
    "[]",
    "[{}]",
    "[null]",
    "[[]]",
    "data:,",
    "data:;base64,",
    "data:;base64,H4sIAAAAAAAC/8tIzcnJBwCGphA2BQAAAA==",
    "sha512-",
    "http://",
    "http://[::1",
    "https://a/%",
    "s3://",
    "arn:aws:s3:::",
    "tftp://",
    "$private_ipv4",
    "{PRIVATE_IPV4}",
    "{HOSTNAME",
    "#cloud-config\n",
    "#!",
    "variant: fcos\nversion: 1.5.0\n",
    "variant: flatcar\nversion: 1.1.0\n",
    "{\"ignition\":{\"version\":\"3.4.0\"}}",
    "{\"ignition\":{\"version\":\"2.2.0\"}}",
    "storage",
    "files",
    "path",
    "/a",
    "contents",
    "inline",
    "source",
    "local",
    "trees",
    "systemd",
    "units",
    "name",
    "a.service",
    "enabled",
    "[Install]\nWantedBy=multi-user.target\n",
    "[Unit\n",
    "passwd",
    "users",
    "core",
    "etcd",
    "version",
    "coreos",
    "boot_device",
    "luks",
    "mirror",
    "partitions",
    "number",
    "size_mib",
    "with_mount_unit",
    "filesystems",
    "raid",
    "clevis",
    "custom",
    "mode",
    "append",
    "overwrite",
    "merge",
    "config",
    "ignition",
    "http_headers",
    "compression",
    "gzip",
    "verification",
    "hash",
];

fn change(chance: &mut Chance, text: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let at = chance.below(text.len() + 1);
    match chance.below(14) {
        0 => text.insert(at, u8::try_from(chance.below(256)).unwrap()),
        1 => {
            if let Some(byte) = text.get_mut(at) {
                *byte ^= 1 << chance.below(8);
            }
        }
        2 => drop(text.drain(chance.range(text.len(), 40))),
        3 | 4 => drop(text.splice(at..at, chance.one_of(TOKENS).bytes())),
        5 => {
            // Something in the place of something else.
            let range = chance.range(text.len(), 12);
            text.splice(range, chance.one_of(TOKENS).bytes());
        }
        6 => {
            let part = text[chance.range(text.len(), 200)].repeat(1 + chance.below(40));
            text.splice(at..at, part);
        }
        7 => {
            let other = &seeds[chance.below(seeds.len())];
            let part = other[chance.range(other.len(), 400)].to_vec();
            text.splice(at..at, part);
        }
        8 => {
            let other = &seeds[chance.below(seeds.len())];
            text.truncate(at);
            text.extend(&other[chance.below(other.len())..]);
        }
        9 => number(chance, text),
        10 => {
            let depth = 1 + chance.below(2000);
            let (open, close) = chance.one_of::<(&str, &str)>(&[
                &("[", "]"),
                &("{a: ", "}"),
                &("{\"a\":", "}"),
                &("- ", ""),
                &("? ", ""),
            ]);
            let end = chance.range(text.len(), 40).end.max(at);
            text.splice(end..end, close.repeat(depth).into_bytes());
            text.splice(at..at, open.repeat(depth).into_bytes());
        }
        11 => aliases(chance, text),
        _ => lines(chance, text, seeds),
    }
}

/// Another number in the place of one that is there.
fn number(chance: &mut Chance, text: &mut Vec<u8>) {
    let from = chance.below(text.len());
    let Some(start) = text
        .iter()
        .skip(from)
        .position(u8::is_ascii_digit)
        .map(|offset| from + offset)
    else {
        return;
    };
    let length = text[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let digits = "9".repeat(chance.below(400));
    let new = chance.one_of(&[
        "0",
        "-1",
        "07777",
        "4294967296",
        "9223372036854775807",
        "9223372036854775808",
        "1.5",
        "1e99",
        &digits,
    ]);
    text.splice(start..start + length, new.bytes());
}

/// Texts that stand for ever longer ones.
fn aliases(chance: &mut Chance, text: &mut Vec<u8>) {
    let (width, depth) = (2 + chance.below(9), 1 + chance.below(12));
    let mut bomb = String::from("a0: &a0 {b: c}\n");
    for level in 1..=depth {
        let alias = format!("*a{}", level - 1);
        let value = match chance.below(3) {
            0 => format!("[{}]", vec![alias; width].join(", ")),
            1 => format!("{{<<: {alias}, b{level}: {alias}}}"),
            _ => format!("{{<<: [{}], b{level}: {alias}}}", vec![alias.clone(); width].join(", ")),
        };
        bomb += &format!("a{level}: &a{level} {value}\n");
    }
    let lines: Vec<usize> = (0..text.len())
        .filter(|index| *index == 0 || text[index - 1] == b'\n')
        .collect();
    let at = lines.get(chance.below(lines.len())).copied().unwrap_or_default();
    text.splice(at..at, bomb.into_bytes());
}

/// Lines moved, doubled, left out, indented otherwise.
fn lines(chance: &mut Chance, text: &mut Vec<u8>, seeds: &[Vec<u8>]) {
    let mut lines: Vec<Vec<u8>> = text
        .split_inclusive(|byte| *byte == b'\n')
        .map(<[u8]>::to_vec)
        .collect();
    if lines.is_empty() {
        return;
    }
    let (one, other) = (chance.below(lines.len()), chance.below(lines.len()));
    match chance.below(6) {
        0 => lines.swap(one, other),
        1 => lines.insert(other, lines[one].clone()),
        2 => drop(lines.remove(one)),
        3 => drop(lines[one].splice(0..0, vec![b' '; 1 + chance.below(6)])),
        4 => {
            let blanks = lines[one].iter().take_while(|byte| **byte == b' ').count();
            lines[one].drain(..chance.below(blanks + 1));
        }
        _ => {
            let from: Vec<_> = seeds[chance.below(seeds.len())]
                .split_inclusive(|byte| *byte == b'\n')
                .collect();
            if let Some(line) = from.get(chance.below(from.len())) {
                lines.insert(one, line.to_vec());
            }
        }
    }
    *text = lines.concat();
}
