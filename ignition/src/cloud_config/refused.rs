//! Keys that other systems read in a cloud-config and coreos-cloudinit does not: passed over they would be missed, so they
//! are refused, with what to do instead.

use crate::{
    node::{Map, Node},
    report::{Place, Report},
};

const UNIT: &str = "write a unit below coreos.units, of type oneshot, that does it";
const IMAGE: &str = "Container Linux has no packages: run a container, or fetch a program to /opt/bin";
const DISKS: &str = "write a mount or swap unit below coreos.units";
const NETWORK: &str = "write a .network unit below coreos.units";
const KEYS: &str = "it would take the network: write the keys at ssh_authorized_keys";
const FILE: &str = "write the file that it stands for at write_files";

/// Keys of the document.
const KEYS_OF_ROOT: &[(&str, &str)] = &[
    ("runcmd", UNIT),
    ("bootcmd", UNIT),
    ("power_state", UNIT),
    ("phone_home", UNIT),
    ("ansible", UNIT),
    ("chef", UNIT),
    ("puppet", UNIT),
    ("salt_minion", UNIT),
    ("apt", IMAGE),
    ("apt_update", IMAGE),
    ("apt_upgrade", IMAGE),
    ("apt_sources", IMAGE),
    ("packages", IMAGE),
    ("package_update", IMAGE),
    ("package_upgrade", IMAGE),
    ("package_reboot_if_required", IMAGE),
    ("snap", IMAGE),
    ("yum_repos", IMAGE),
    ("zypper", IMAGE),
    ("mounts", DISKS),
    ("swap", DISKS),
    ("disk_setup", DISKS),
    ("fs_setup", DISKS),
    ("growpart", DISKS),
    ("resize_rootfs", DISKS),
    ("network", NETWORK),
    ("wireguard", NETWORK),
    ("ssh_import_id", KEYS),
    ("ssh_keys", FILE),
    ("ssh_pwauth", FILE),
    ("disable_root", FILE),
    ("ca_certs", FILE),
    ("ntp", FILE),
    ("timezone", FILE),
    ("locale", FILE),
    ("keyboard", FILE),
    ("resolv_conf", FILE),
    ("rsyslog", FILE),
    ("fqdn", "write it at hostname"),
    ("chpasswd", "write hashes at users, passwd"),
    ("password", "write a hash at users, passwd"),
    ("groups", "write users that have them at users, groups"),
];

/// Keys of a user.
const KEYS_OF_USER: &[(&str, &str)] = &[
    ("coreos_ssh_import_github", KEYS),
    ("coreos_ssh_import_github_users", KEYS),
    ("coreos_ssh_import_url", KEYS),
    ("ssh_import_id", KEYS),
    (
        "sudo",
        "write the group sudo or wheel at groups, or a file below /etc/sudoers.d",
    ),
    ("lock_passwd", "a user without passwd has no password to log in with"),
    ("plain_text_passwd", "write a hash at passwd"),
    ("hashed_passwd", "write it at passwd"),
    ("inactive", "it has no counterpart"),
    ("expiredate", "it has no counterpart"),
    ("selinux_user", "it has no counterpart"),
    ("uid", "it has no counterpart"),
];

/// Takes such keys out of the tree, with an error for each.
pub(super) fn take_out(root: &mut Node, report: &mut Report) {
    let Some(map) = root.as_map_mut() else { return };
    take(map, KEYS_OF_ROOT, &Place::ROOT, report);
    let Some(users) = map.get_mut("users").and_then(Node::as_list_mut) else {
        return;
    };
    let place = Place::ROOT.key("users");
    for (index, user) in users.iter_mut().enumerate() {
        if let Some(user) = user.as_map_mut() {
            take(user, KEYS_OF_USER, &place.index(index), report);
        }
    }
}

fn take(map: &mut Map, refused: &[(&str, &str)], place: &Place<'_>, report: &mut Report) {
    for (key, instead) in refused {
        if let Some(node) = map.remove(key) {
            let message = format!("{key} is nothing that a cloud-config of Container Linux can have: {instead}");
            report.error(&node, &place.key(key), message);
        }
    }
}
