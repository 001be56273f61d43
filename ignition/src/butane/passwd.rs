//! `ssh_authorized_keys_local`: files of public keys, one a line.

use super::{
    local::Local,
    resource::{each, within},
};
use crate::{
    node::{Map, Node},
    report::{Place, Report},
};

pub(super) fn translate(source: &mut Node, local: &mut Local<'_>, report: &mut Report) {
    within(source, &Place::ROOT, "passwd", |passwd, place| {
        each(passwd, place, "users", |user, place| {
            if let Some(user) = user.as_map_mut() {
                keys(user, place, local, report);
            }
        });
    });
}

/// The keys of the files come after those of the user's text.
fn keys(user: &mut Map, place: &Place<'_>, local: &mut Local<'_>, report: &mut Report) {
    const LOCAL: &str = "ssh_authorized_keys_local";
    let Some(files) = user.remove(LOCAL) else { return };
    let place = place.key(LOCAL);
    for (index, file) in files.items().iter().enumerate() {
        let Some(text) = local.read_text(file, &place.index(index), report) else {
            continue;
        };
        let keys = text.lines().filter(|line| !line.is_empty());
        user.list_mut("ssh_authorized_keys")
            .extend(keys.map(|key| Node::at(file.position, key)));
    }
}
