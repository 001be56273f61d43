//! A script (`#!`): a file and a service that runs it as root when the network is up, at every boot.

use super::{addresses, file::Files, unit::Units};
use crate::{
    node::Position,
    report::{Report, Severity},
    transpile::Options,
};

/// Where coreos-cloudinit keeps scripts.
const PATH: &str = "/var/lib/coreos-cloudinit/scripts/user-data";
const UNIT: &str = "coreos-cloudinit-user-data.service";

/// Adds file and service.
pub(super) fn translate(text: &str, options: &Options<'_>, files: &mut Files, units: &mut Units, report: &mut Report) {
    let text = options.addresses.put_into_text(text, |name, line| {
        let place = Position { line, column: 1 };
        report.say(Severity::Error, Some(place), "", addresses::unknown(name));
    });
    // Without the path of an interpreter the kernel would not know what to do with it.
    let line = text.lines().next().unwrap_or_default();
    let interpreter = line.strip_prefix("#!").unwrap_or_default().trim_start();
    let by = if interpreter.starts_with('/') { "" } else { "/bin/bash " };
    files.write_with_mode(PATH, &text, 0o744);
    units.add_enabled(
        UNIT,
        format!(
            "[Unit]\n\
             Description=The script of the machine's user data\n\
             Wants=network-online.target\n\
             After=network-online.target\n\
             \n\
             [Service]\n\
             Type=oneshot\n\
             RemainAfterExit=yes\n\
             EnvironmentFile=-/etc/environment\n\
             ExecStart={by}{PATH}\n\
             \n\
             [Install]\n\
             WantedBy=multi-user.target\n"
        ),
    );
}
