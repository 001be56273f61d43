//! Butane: variants `fcos` 1.0.0 to 1.7.0 and `flatcar` 1.0.0 and 1.1.0, each for one version of Ignition 3.
//! (<https://coreos.github.io/butane/specs/>)
//!
//! - [`dialect`]: variant and version
//! - [`shape`]: the tables of keys
//! - [`resource`]: `inline` and `local`, wherever contents are fetched
//! - [`local`]: the files that `local` and its kin name
//! - [`names`]: keys as Ignition calls them
//! - [`mode`]: modes that were meant octal
//! - [`passwd`]: keys by `ssh_authorized_keys_local`
//! - [`systemd`]: units and drop-ins by `contents_local`
//! - [`mount_unit`]: filesystems that are mounted, by `with_mount_unit`
//! - [`trees`]: whole directories, by `storage.trees`
//! - [`boot_device`]: a LUKS or a mirror for the system's own disk; the mirror's disks are in [`mirror`]
//! - [`partitions`]: partitions of the system's own disk
//! - [`luks`]: what a variant has no support for
//! - [`grub`]: passwords of the boot loader, by `grub.users`

mod boot_device;
mod dialect;
mod grub;
mod local;
mod luks;
mod mirror;
mod mode;
mod mount_unit;
mod names;
mod partitions;
mod passwd;
mod resource;
mod shape;
mod systemd;
#[cfg(test)]
mod tests;
mod trees;

use crate::{
    gzip::Packer,
    node::Node,
    report::Report,
    transpile::{Options, Translation},
    v3,
};
use dialect::Dialect;
use local::Local;

/// The Ignition configuration that a Butane configuration stands for. None where its variant or version is not known.
///
/// What the sugar makes is the parent, what the user says the child of Ignition's own merge, so that the user can change
/// whatever is made.
pub(crate) fn translate(tree: Node, options: &Options<'_>, report: &mut Report) -> Option<Translation> {
    let dialect = Dialect::of(&tree, report)?;
    let mut source = dialect.language().shape(tree, dialect.level(), report);
    mode::check(&source, report);
    luks::check(&source, dialect, report);
    let mut take = |key| source.as_map_mut().and_then(|map| map.remove(key));
    let (boot_device, grub) = (take("boot_device"), take("grub"));

    let mut local = Local::new(options.files);
    let mut packer = Packer::default();
    resource::translate(&mut source, dialect, &mut local, &mut packer, report);
    passwd::translate(&mut source, &mut local, report);
    systemd::translate(&mut source, &mut local, report);
    let mount_units = mount_unit::render(&source, dialect, report);
    partitions::check_numbers(&source, dialect, report);
    let trees = trees::take(&mut source);

    let mut root = names::ignition(source);
    if let Some(mount_units) = mount_units {
        root = v3::merge(&mount_units, &root);
    }
    if let Some(trees) = trees {
        trees::translate(&trees, &mut root, &mut local, &mut packer, report);
    }
    if let Some(rendered) = boot_device.and_then(|node| boot_device::render(&node, &root, dialect, report)) {
        root = v3::merge(&rendered, &root);
    }
    partitions::check(&root, dialect, report);
    if let Some(rendered) = grub.and_then(|grub| grub::render(&grub, &mut packer, report)) {
        root = v3::merge(&rendered, &root);
    }
    Some((dialect.ignition(), root))
}

/// The value of a key, if it is not empty.
fn text<'a>(node: &'a Node, key: &str) -> Option<&'a str> {
    node.text(key).filter(|text| !text.is_empty())
}

/// Whether a key is there and true.
fn is_true(node: &Node, key: &str) -> bool {
    node.get(key).and_then(Node::as_bool) == Some(true)
}

/// The elements of the list at a path of keys; none where there is no such list.
fn items<'a>(node: &'a Node, path: &[&str]) -> &'a [Node] {
    node.find(path).map(Node::items).unwrap_or_default()
}
