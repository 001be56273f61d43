//! The test images, written as one OCI image layout in a tar archive (OCI image specification 1.1, image-layout.md), which
//! `ctr images import` takes: no registry is needed.
//!
//! All of them have one layer, Debian's busybox: the dynamic one with its libraries and its applets as hard links, since
//! that is what an image of a distribution looks like.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::artifacts;

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
        (PAUSE, json!({ "Cmd": ["/bin/sleep", "2147483647"] })),
        (BUSYBOX, json!({ "Cmd": ["sh"] })),
        (
            WEB,
            json!({ "Cmd": ["httpd", "-f", "-v", "-p", "8080", "-h", "/www"], "ExposedPorts": { "8080/tcp": {} } }),
        ),
    ];
    for (name, config) in images {
        layout.add_image(name, config, &layer)?;
    }
    let file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    layout
        .write(file)
        .with_context(|| format!("writing {}", path.display()))
}

/// A blob that is part of the layout.
#[derive(Debug, Clone)]
struct Descriptor {
    digest: String,
    size: usize,
}

#[derive(Default)]
struct Layout {
    blobs: BTreeMap<String, Vec<u8>>,
    manifests: Vec<Value>,
}

impl Layout {
    fn add(&mut self, blob: Vec<u8>) -> Descriptor {
        let hash = Sha256::digest(&blob)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>();
        let size = blob.len();
        self.blobs.insert(hash.clone(), blob);
        Descriptor {
            digest: format!("sha256:{hash}"),
            size,
        }
    }

    fn add_image(&mut self, name: &str, mut config: Value, layer: &Descriptor) -> Result<()> {
        config["Env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        let config = self.add(serde_json::to_vec(&json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            // A layer without compression: its digest is also that of its content.
            "rootfs": { "type": "layers", "diff_ids": [layer.digest] },
        }))?);
        let manifest = self.add(serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", layer)],
        }))?);
        let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
        entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
        entry["annotations"] = json!({ "io.containerd.image.name": name, "org.opencontainers.image.ref.name": name });
        self.manifests.push(entry);
        Ok(())
    }

    fn write(self, file: File) -> Result<()> {
        let mut archive = Archive::new(file);
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": self.manifests,
        });
        archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
        for (hash, blob) in &self.blobs {
            archive.file(&format!("blobs/sha256/{hash}"), 0o644, blob)?;
        }
        archive.finish()
    }
}

fn descriptor(media_type: &str, blob: &Descriptor) -> Value {
    json!({ "mediaType": media_type, "digest": blob.digest, "size": blob.size })
}

fn busybox_layer() -> Result<Vec<u8>> {
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
        b"root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www:/www:/bin/sh\n",
    )?;
    layer.file("etc/group", 0o644, b"root:x:0:\nwww-data:x:33:\n")?;
    layer.file("www/index.html", 0o644, WEB_PAGE.as_bytes())?;
    layer.finish_into()
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

/// A tar archive whose entries belong to root and carry no time, so that equal content has equal bytes.
struct Archive<W: std::io::Write>(Builder<W>);

impl<W: std::io::Write> Archive<W> {
    fn new(target: W) -> Self {
        Self(Builder::new(target))
    }

    fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(EntryType::Directory, &format!("{path}/"), mode, &[])
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(EntryType::Regular, path, mode, content)
    }

    fn entry(&mut self, kind: EntryType, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = header(kind, mode);
        header.set_size(content.len() as u64);
        self.0
            .append_data(&mut header, path, content)
            .with_context(|| format!("adding {path}"))
    }

    fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Link, 0o755);
        self.0
            .append_link(&mut header, path, target)
            .with_context(|| format!("adding {path}"))
    }

    fn finish(self) -> Result<()> {
        self.finish_into().map(drop)
    }

    fn finish_into(self) -> Result<W> {
        let mut target = self.0.into_inner().context("ending an archive")?;
        target.flush().context("ending an archive")?;
        Ok(target)
    }
}

fn header(kind: EntryType, mode: u32) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(0);
    header
}
