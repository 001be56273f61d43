//! The test images, in one archive that `ctr images import` takes: no registry is needed.
//!
//! All of them have one layer, Debian's busybox: the dynamic one with its libraries and its applets as hard links, since
//! that is what an image of a distribution looks like.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::artifacts;
use crate::layout::{Archive, Layout};

/// The image of the pods' sandboxes.
pub const PAUSE: &str = "localhost/pause:1";
/// A shell and its tools, as root.
pub const BUSYBOX: &str = "localhost/busybox:1";
/// A web server on port 8080 that answers [`WEB_PAGE`].
pub const WEB: &str = "localhost/web:1";
pub const WEB_PAGE: &str = "it works: this page comes from inside the pod\n";

/// Libraries of Debian's busybox, and the loader at the place its ELF header names.
const LIBRARIES: [&str; 3] = [
    "lib/x86_64-linux-gnu/libc.so.6",
    "lib/x86_64-linux-gnu/libresolv.so.2",
    "lib64/ld-linux-x86-64.so.2",
];

/// Writes all test images into one archive.
pub fn write_archive(path: &Path) -> Result<()> {
    let mut layout = Layout::default();
    let layer = layout.add(busybox_layer()?);
    let images = [
        (PAUSE, json!({ "Cmd": ["tail", "-f", "/dev/null"] })),
        (BUSYBOX, json!({ "Cmd": ["sh"] })),
        (
            WEB,
            json!({ "Cmd": ["httpd", "-f", "-v", "-p", "8080", "-h", "/www"], "ExposedPorts": { "8080/tcp": {} } }),
        ),
    ];
    for (name, config) in images {
        layout.add_image(name, config, &[&layer])?;
    }
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    layout
        .write_archive(file)
        .with_context(|| format!("writing {}", path.display()))
}

/// A layer with Debian's busybox and a few users.
pub fn busybox_layer() -> Result<Vec<u8>> {
    let root = artifacts::busybox_root()?;
    let mut layer = Archive::new(Vec::new());
    for folder in [
        "bin",
        "dev",
        "etc",
        "home",
        "lib",
        "lib64",
        "lib/x86_64-linux-gnu",
        "proc",
        "root",
        "run",
        "sys",
        "usr",
        "usr/bin",
        "usr/sbin",
        "sbin",
        "var",
        "www",
    ] {
        layer.folder(folder, 0o755)?;
    }
    layer.folder("tmp", 0o1777)?;
    layer.file("bin/busybox", 0o755, &read(&root.join("bin/busybox"))?)?;
    for library in LIBRARIES {
        layer.file(library, 0o755, &read(&root.join(library))?)?;
    }
    for applet in applets(&root)? {
        layer.hard_link(&applet, "bin/busybox")?;
    }
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www:/www:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/sh\n",
    )?;
    layer.file("etc/group", 0o644, b"root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n")?;
    layer.file("www/index.html", 0o644, WEB_PAGE.as_bytes())?;
    layer.finish()
}

/// The applets' paths, as busybox itself names them; busybox runs with its own libraries, whatever this machine's are.
fn applets(root: &Path) -> Result<Vec<String>> {
    let output = Command::new(root.join("lib64/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(root.join("lib/x86_64-linux-gnu"))
        .arg(root.join("bin/busybox"))
        .arg("--list-full")
        .output()
        .context("running busybox")?;
    ensure!(
        output.status.success(),
        "busybox --list-full: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let applets = String::from_utf8(output.stdout).context("busybox --list-full")?;
    Ok(applets
        .lines()
        .filter(|path| *path != "bin/busybox")
        .map(str::to_owned)
        .collect())
}

fn read(path: &PathBuf) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}
