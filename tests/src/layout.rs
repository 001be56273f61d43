//! OCI images made here, and the two forms in which a containerd can have them: one archive, which `ctr images import` takes, or
//! the files of a registry.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A blob that is part of the layout.
#[derive(Debug, Clone)]
pub struct Descriptor {
    digest: String,
    size: usize,
}

/// Images with their blobs.
#[derive(Debug, Default)]
pub struct Layout {
    /// By the digest's digits.
    blobs: BTreeMap<String, Vec<u8>>,
    images: Vec<Image>,
}

#[derive(Debug)]
struct Image {
    /// As users write it: `registry.example/repository/of/it:tag`.
    name: String,
    manifest: Descriptor,
    /// All that the manifest names.
    parts: Vec<Descriptor>,
}

impl Layout {
    /// Adds a blob; a layer is a tar archive without compression.
    pub fn add(&mut self, blob: Vec<u8>) -> Descriptor {
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

    /// Adds an image of these layers, with a configuration as `docker inspect` shows it.
    pub fn add_image(&mut self, name: &str, mut config: Value, layers: &[&Descriptor]) -> Result<()> {
        config["Env"] = json!(["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        // A layer without compression: its digest is also that of its content.
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.digest.as_str()).collect();
        let config = self.add(serde_json::to_vec(&json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        }))?);
        let layer_type = "application/vnd.oci.image.layer.v1.tar";
        let manifest = self.add(serde_json::to_vec(&json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.describe("application/vnd.oci.image.config.v1+json"),
            "layers": layers.iter().map(|layer| layer.describe(layer_type)).collect::<Vec<_>>(),
        }))?);
        self.images.push(Image {
            name: name.to_owned(),
            manifest,
            parts: std::iter::once(config)
                .chain(layers.iter().map(|&layer| layer.clone()))
                .collect(),
        });
        Ok(())
    }

    /// Writes it as an OCI image layout in a tar archive (OCI image specification 1.1, image-layout.md).
    pub fn write_archive(&self, file: File) -> Result<()> {
        let manifests: Vec<_> = self
            .images
            .iter()
            .map(|image| {
                let mut entry = image.manifest.describe(MANIFEST);
                entry["platform"] = json!({ "architecture": "amd64", "os": "linux" });
                entry["annotations"] = json!({
                    "io.containerd.image.name": image.name,
                    "org.opencontainers.image.ref.name": image.name,
                });
                entry
            })
            .collect();
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        let mut archive = Archive::new(file);
        archive.file("oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        archive.file("index.json", 0o644, &serde_json::to_vec(&index)?)?;
        for (hash, blob) in &self.blobs {
            archive.file(&format!("blobs/sha256/{hash}"), 0o644, blob)?;
        }
        archive.finish().map(drop)
    }

    /// Writes it as a registry keeps it on disk (distribution 2, `registry/storage/paths.go`): blobs by their digest, and
    /// links to them in each repository. An image's repository is its name without the registry's own.
    pub fn write_registry(&self, root: &Path) -> Result<()> {
        let root = root.join("docker/registry/v2");
        for (hash, blob) in &self.blobs {
            let start = hash.get(..2).context("a digest is longer")?;
            write(&root.join("blobs/sha256").join(start).join(hash).join("data"), blob)?;
        }
        for image in &self.images {
            let (_, name) = image.name.split_once('/').context("an image's name has a registry")?;
            let (repository, tag) = name.split_once(':').unwrap_or((name, "latest"));
            let repository = root.join("repositories").join(repository);
            let link = |folder: PathBuf, blob: &Descriptor| write(&folder.join("link"), blob.digest.as_bytes());
            for part in &image.parts {
                link(repository.join("_layers").join(part.path()), part)?;
            }
            let manifests = repository.join("_manifests");
            let manifest = &image.manifest;
            link(manifests.join("revisions").join(manifest.path()), manifest)?;
            let tag = manifests.join("tags").join(tag);
            link(tag.join("index").join(manifest.path()), manifest)?;
            link(tag.join("current"), manifest)?;
        }
        Ok(())
    }
}

impl Descriptor {
    fn describe(&self, media_type: &str) -> Value {
        json!({ "mediaType": media_type, "digest": self.digest, "size": self.size })
    }

    /// The digest as a path.
    fn path(&self) -> String {
        self.digest.replace(':', "/")
    }
}

fn write(path: &Path, content: &[u8]) -> Result<()> {
    let folder = path.parent().context("a file is in a folder")?;
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, content))
        .with_context(|| format!("writing {}", path.display()))
}

/// A tar archive whose entries belong to root and carry no time, so that equal content has equal bytes.
pub struct Archive<W: std::io::Write>(Builder<W>);

impl<W: std::io::Write> Archive<W> {
    pub fn new(target: W) -> Self {
        Self(Builder::new(target))
    }

    pub fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        self.entry(EntryType::Directory, &format!("{path}/"), mode, &[])
    }

    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entry(EntryType::Regular, path, mode, content)
    }

    fn entry(&mut self, kind: EntryType, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let mut header = header(kind, mode);
        header.set_size(content.len() as u64);
        self.0
            .append_data(&mut header, path, content)
            .with_context(|| format!("adding {path}"))
    }

    pub fn hard_link(&mut self, path: &str, target: &str) -> Result<()> {
        let mut header = header(EntryType::Link, 0o755);
        self.0
            .append_link(&mut header, path, target)
            .with_context(|| format!("adding {path}"))
    }

    /// Ends it, and answers what it was written to.
    pub fn finish(self) -> Result<W> {
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
