//! Texts that are made to exhaust whoever reads them: an answer comes soon, and does not take the machine's memory.

#![allow(unsafe_code)] // an allocator is

use std::{
    alloc::{GlobalAlloc, Layout, System},
    io::Read,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use coreos_kvm_ignition::{Options, TEXT_MAX, transpile};
use flate2::{Compression, read::GzEncoder};

/// In a build without optimisation; a released one takes a tenth.
const TIME_MAX: Duration = Duration::from_secs(10);
const MEMORY_MAX: usize = 1 << 30;

/// The system's allocator, counting.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: it hands everything to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(held, Relaxed);
        // SAFETY: the caller keeps what `GlobalAlloc` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller keeps what `GlobalAlloc` asks for.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// `part` again and again, until the text is as long as any that is read; without optimisation a quarter of it, which takes
/// a minute less and still shows whatever grows faster than its text.
fn filled(begin: &str, part: &str) -> String {
    let length = if cfg!(debug_assertions) { TEXT_MAX / 4 } else { TEXT_MAX };
    let times = (length - begin.len()) / part.len();
    format!("{begin}{}", part.repeat(times))
}

/// As [`filled`], each part with its number in place of `@`.
fn numbered(begin: &str, part: &str, times: usize) -> String {
    let parts = (0..times).map(|number| part.replace('@', &number.to_string()));
    parts.fold(begin.to_owned(), |text, part| text + &part)
}

/// So many zeros in gzip, in base64.
fn packed(length: u64) -> String {
    let mut packed = Vec::new();
    let zeros = std::io::repeat(0).take(length);
    let read = GzEncoder::new(zeros, Compression::best()).read_to_end(&mut packed);
    assert!(read.is_ok(), "{read:?}");
    BASE64_STANDARD.encode(packed)
}

const FCOS: &str = "variant: fcos\nversion: 1.5.0\n";
const IGNITION: &str = r#"{"ignition":{"version":"3.4.0"},"#;

/// What each text is, and the text; one after the other, since together they would fill the memory themselves.
fn texts(each: &mut dyn FnMut(&'static str, String)) {
    let most = if cfg!(debug_assertions) { 25_000 } else { 100_000 };
    let aliases = |begin: &str, each: &str, depth: usize| {
        (1..=depth).fold(begin.to_owned(), |text, level| {
            let line = each
                .replace('@', &level.to_string())
                .replace('<', &(level - 1).to_string());
            text + &line
        })
    };
    each("nothing", String::new());
    each("blanks", filled("", " "));
    each("tabs", filled("", "\t"));
    each("empty lines", filled("", "\n"));
    each("lines of CRLF", filled("", "\r\n"));
    each("carriage returns", filled("", "\r"));
    each("NULs", filled("", "\0"));
    each("byte order marks", filled("", "\u{feff}"));
    each("byte order marks between", filled("a: 1\n", "\u{feff}"));
    each("comments", filled("", "#\n"));
    each("comments behind tabs", filled("", "\t#\n"));
    each("comments after a value", filled("a: b\n", " # c\n"));
    each("one comment", filled("#", "a"));
    each("colons", filled("", ":"));
    each("colons apart", filled("", ": "));
    each("colons on lines", filled("", ":\n"));
    each("quotes", filled("", "\""));
    each("apostrophes", filled("", "'"));
    each("quotes in a value", filled("a: ", "'"));
    each("backslashes in quotes", filled("a: \"", "\\\\"));
    each("letters that are escaped", filled("a: \"", "\\u00e9"));
    each("dashes", filled("", "-"));
    each("dashes apart", filled("", "- "));
    each("a list of letters", filled("", "- a\n"));
    each("a list of nothing", filled("", "-\n"));
    each("lists in a list on lines", filled("", "- - a\n"));
    each("question marks", filled("", "? "));
    each("question marks on lines", filled("", "?\n"));
    each("pipes", filled("", "|"));
    each("ampersands", filled("", "&"));
    each("anchors", filled("", "&a "));
    each("anchors on lines", filled("", "- &a b\n"));
    each("aliases of nothing", filled("", "*a "));
    each("exclamation marks", filled("", "!"));
    each("tags", filled("", "!a "));
    each("tags on lines", filled("", "- !!str a\n"));
    each("percents", filled("", "%"));
    each("directives", filled("", "%YAML 1.2\n"));
    each("directives of tags", numbered("", "%TAG !@! tag:a,2000:\n", most));
    each("documents", filled("", "---\n"));
    each("documents with values", filled("", "--- a\n"));
    each("ends of documents", filled("", "...\n"));
    each("flow lists", filled("", "["));
    each("flow lists in a value", filled("a: ", "["));
    each(
        "flow lists that close",
        format!("a: {}{}", "[".repeat(most), "]".repeat(most)),
    );
    each("flow maps", filled("", "{"));
    each("flow maps in a value", filled("a: ", "{"));
    each("flow maps with keys", filled("a: ", "{a: "));
    each("flow maps and lists", filled("a: ", "[{a: "));
    each("JSON maps", filled("", "{\"a\":"));
    each(
        "JSON maps that close",
        format!("{}1{}", "{\"a\":".repeat(most), "}".repeat(most)),
    );
    each("JSON lists", filled("{\"a\":", "["));
    each("JSON lists side by side", filled("{\"a\":[0", ",[]"));
    each("JSON blanks", filled("{", " "));
    each("JSON lines", filled("{", "\n"));
    each("JSON that ends too early", filled(IGNITION, "\n") + "x");
    each("commas in a flow list", filled("a: [", ","));
    each("a long flow list", filled("a: [", "a,"));
    each("a flow list on lines", filled("a: [", "a,\n"));
    each("a flow list of pairs", filled("a: [", "b: c, "));
    each("a flow list of colons", filled("a: [", ":"));
    each("a flow list of quotes and colons", filled("a: [", "\"b\":c,"));
    each("closing brackets", filled("", "]"));
    each("one plain scalar", filled("a: ", "b"));
    each("one plain scalar of words", filled("a: ", "b "));
    each("one plain scalar on lines", filled("a: b\n", "  b\n"));
    each("one plain scalar at the top, on lines", filled("", "b\n"));
    each("one plain scalar with tabs", filled("a: b", "\tb"));
    each("one literal scalar", filled("a: |\n", " b\n"));
    each("one literal scalar of blanks", filled("a: |\n", " "));
    each("one literal scalar of empty lines", filled("a: |\n", "\n"));
    each("one folded scalar", filled("a: >\n", " b\n"));
    each("one quoted scalar on lines", filled("a: \"", "b\n "));
    each("literal scalars", filled("", "- |\n b\n"));
    each("a scalar, wide", filled("a: ", "\u{10ffff}"));
    each("one key", filled("", "a") + ": 1\n");
    each("a key of 1 MiB", format!("{FCOS}{}: 1\n", "a".repeat(1 << 20)));
    each(
        "a JSON key of 1 MiB",
        format!("{IGNITION}\"{}\":1}}", "a".repeat(1 << 20)),
    );
    each(
        "keys of 1 MiB in each other",
        (0..14).fold(String::new(), |text, depth| {
            format!("{text}{}{}:\n", " ".repeat(depth), "a".repeat(1 << 20))
        }),
    );
    each(
        "long keys, all wrong",
        numbered(&format!("{FCOS}{}: {{", "a".repeat(1 << 20)), "b@: 1, ", most) + "}\n",
    );
    each("the same key", filled("", "a: 1\n"));
    each("the same JSON key", filled(IGNITION, "\"a\":1,") + "\"a\":1}");
    each("keys", numbered("", "a@: 1\n", most));
    each("keys that are wrong", numbered(FCOS, "a@: 1\n", most));
    each(
        "JSON keys that are wrong",
        numbered(IGNITION, "\"a@\":1,", most) + "\"b\":1}",
    );
    each(
        "files that are wrong",
        numbered(&format!("{FCOS}storage:\n  files:\n"), "    - {paht: a}\n", most),
    );
    each(
        "files at one path",
        numbered(&format!("{FCOS}storage:\n  files:\n"), "    - {path: /a}\n", most),
    );
    each(
        "files",
        numbered(&format!("{FCOS}storage:\n  files:\n"), "    - {path: /a@}\n", most),
    );
    each(
        "JSON files",
        numbered(
            &format!("{IGNITION}\"storage\":{{\"files\":["),
            "{\"path\":\"/a@\"},",
            most,
        ) + "{\"path\":\"/b\"}]}}",
    );
    each(
        "units",
        numbered(
            &format!("{FCOS}systemd:\n  units:\n"),
            "    - {name: a@.service, contents: '[Unit]'}\n",
            most,
        ),
    );
    each(
        "users",
        numbered(&format!("{FCOS}passwd:\n  users:\n"), "    - {name: a@}\n", most),
    );
    each(
        "filesystems",
        numbered(
            &format!("{FCOS}storage:\n  filesystems:\n"),
            "    - {device: /dev/a@, path: /a@, format: ext4, with_mount_unit: true}\n",
            most / 2,
        ),
    );
    each(
        "partitions",
        numbered(
            &format!("{FCOS}storage:\n  disks:\n    - device: /dev/a\n      partitions:\n"),
            "        - {number: @, size_mib: 1, start_mib: 1}\n",
            most / 2,
        ),
    );
    each(
        "units of a Container Linux Config",
        numbered(
            "systemd:\n  units:\n",
            "    - {name: a@.service, contents: '[Unit]'}\n",
            most / 2,
        ),
    );
    each(
        "files of a Container Linux Config",
        numbered(
            "storage:\n  files:\n",
            "    - {path: /a@, filesystem: root, contents: {inline: '{HOSTNAME'}}\n",
            most / 4,
        ),
    );
    each(
        "users of a cloud-config",
        numbered("#cloud-config\nusers:\n", "  - name: a@\n", most),
    );
    each(
        "files of a cloud-config",
        numbered(
            "#cloud-config\nwrite_files:\n",
            "  - {path: /a@, content: $private_ipv4}\n",
            most / 2,
        ),
    );
    each(
        "units of a cloud-config",
        numbered(
            "#cloud-config\ncoreos:\n  units:\n",
            "    - {name: a@.service, command: start}\n",
            most / 2,
        ),
    );
    each(
        "variables of a cloud-config",
        format!(
            "#cloud-config\nwrite_files:\n- path: /a\n  content: \"{}\"\n",
            "$private_ipv4".repeat(most)
        ),
    );
    each("a script", filled("#!/bin/sh\n", "true\n"));
    each(
        "sections of a unit",
        format!(
            "{FCOS}systemd:\n  units:\n  - name: a.service\n    contents: |\n{}",
            "      [Unit]\n".repeat(most)
        ),
    );
    each(
        "brackets of a unit",
        format!(
            "{FCOS}systemd:\n  units:\n  - name: a.service\n    contents: {:?}\n",
            "[".repeat(1 << 20)
        ),
    );
    each(
        "continued lines of a unit",
        format!(
            "{FCOS}systemd:\n  units:\n  - name: a.service\n    contents: |\n      [Unit]\n      A=\n{}",
            "      \\\n".repeat(most)
        ),
    );
    each("a number", filled("{\"a\":", "9") + "}");
    each("a fraction", filled("{\"a\":0.", "9") + "}");
    each("an exponent", "{\"a\":1e999999999999999999999}".to_owned());
    each(
        "a mode",
        format!(
            "{FCOS}storage: {{files: [{{path: /a, mode: {}}}]}}\n",
            "7".repeat(8 << 20)
        ),
    );
    each(
        "a version",
        format!("variant: fcos\nversion: {}\n", "1.".repeat(8 << 20)),
    );
    each(
        "half a surrogate pair",
        "{\"ignition\":{\"version\":\"\\ud800\"}}".to_owned(),
    );
    each("half a surrogate pair in YAML", "a: \"\\ud800\"\n".to_owned());
    each(
        "a path of slashes",
        format!("{FCOS}storage: {{files: [{{path: {}}}]}}\n", "/".repeat(8 << 20)),
    );
    each(
        "a path of dots",
        format!("{FCOS}storage: {{files: [{{path: {}}}]}}\n", "/..".repeat(4 << 20)),
    );
    each(
        "a data URL",
        format!(
            "{IGNITION}\"storage\":{{\"files\":[{{\"path\":\"/a\",\"contents\":{{\"source\":\"data:,{}\"}}}}]}}}}",
            "%41".repeat(4 << 20)
        ),
    );
    each(
        "parameters of a data URL",
        format!(
            "{IGNITION}\"storage\":{{\"files\":[{{\"path\":\"/a\",\"contents\":{{\"source\":\"data:{},\"}}}}]}}}}",
            ";a=b".repeat(2 << 20)
        ),
    );
    each(
        "inline contents",
        filled(
            &format!("{FCOS}storage: {{files: [{{path: /a, contents: {{inline: \""),
            "a b",
        ) + "\"}}]}\n",
    );
    each(
        "ever longer lists",
        aliases(
            "a0: &a0 [b, b]\n",
            "a@: &a@ [*a<, *a<, *a<, *a<, *a<, *a<, *a<, *a<, *a<]\n",
            60,
        ),
    );
    each(
        "ever larger maps",
        aliases("a0: &a0 {b: c}\n", "a@: &a@ {b: *a<, c: *a<, d: *a<}\n", 60),
    );
    each(
        "ever longer merges",
        aliases(
            "a0: &a0 {b: c}\n",
            "a@: &a@ {<<: [*a<, *a<, *a<, *a<], k@: 1}\n",
            20_000,
        ),
    );
    each(
        "a deep chain of aliases",
        aliases("a0: &a0 b\n", "a@: &a@ [*a<]\n", most),
    );
    each(
        "merges in each other",
        format!("a: {}{{b: c}}{}\n", "{<<: ".repeat(10_000), "}".repeat(10_000)),
    );
    each(
        "merges of one large map",
        numbered(
            &(numbered("a: &a {", "k@: v, ", 10_000) + "}\n"),
            "b@: {<<: *a}\n",
            10_000,
        ),
    );
    each(
        "one alias of a large map",
        numbered(&(numbered("a: &a {", "k@: v, ", 10_000) + "}\n"), "b@: *a\n", 10_000),
    );
    each(
        "one alias of a long text",
        numbered(&format!("a: &a {}\n", "b".repeat(1 << 20)), "b@: *a\n", most),
    );
    // Each of these files is 15 MiB, and all but the first are one too many.
    each(
        "packed files of a cloud-config",
        numbered(
            &format!("#cloud-config\nx: &a {}\nwrite_files:\n", packed(15 << 20)),
            "  - {path: /a@, encoding: gz+b64, content: *a}\n",
            1_000,
        ),
    );
    each(
        "one long text as the contents of many files",
        numbered(
            &format!("{FCOS}x: &a {}\nstorage:\n  files:\n", "ab c".repeat(1 << 18)),
            "    - {path: /a@, contents: {inline: *a}}\n",
            50,
        ),
    );
    each("anchors in each other", filled("", "&a ["));
    each(
        "blocks in each other, mappings",
        (0..5_000).fold(String::new(), |text, depth| text + &" ".repeat(depth) + "a:\n"),
    );
    each(
        "blocks in each other, lists",
        (0..5_000).fold(String::new(), |text, depth| text + &" ".repeat(depth) + "-\n"),
    );
    each("too long", "a".repeat(TEXT_MAX + 1));
}

#[test]
fn an_answer_comes_soon_and_in_little_memory() {
    let mut slow = Vec::new();
    texts(&mut |name, text| {
        let before = HELD.load(Relaxed);
        MOST.store(before, Relaxed);
        let begun = Instant::now();
        let outcome = transpile(&text, &Options::default());
        let took = begun.elapsed();
        let memory = MOST.load(Relaxed).saturating_sub(before);
        let said = match &outcome {
            Ok(done) => format!("{}, {} entries", done.kind, done.report.entries().len()),
            Err(report) => format!("{:.90}", report.to_string().lines().next().unwrap_or_default()),
        };
        println!("{:>6} ms {:>5} MiB  {name}: {said}", took.as_millis(), memory >> 20);
        if took > TIME_MAX || memory > MEMORY_MAX {
            slow.push(format!("{name}: {took:?}, {} MiB", memory >> 20));
        }
    });
    assert!(
        slow.is_empty(),
        "over {TIME_MAX:?} or {} MiB: {slow:#?}",
        MEMORY_MAX >> 20
    );
}
