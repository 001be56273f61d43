//! The devices of a template and its clones: the network card that all have, and those that a clone is given when it wakes up.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::quiet::run;

/// Drivers of the devices that a clone finds when it wakes up, or has from its template; each is loaded there, or part of its kernel.
const DRIVERS: [&str; 5] = [
    "virtio_console",
    "fuse",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "virtio_net",
];

/// Documentation/ABI/testing/sysfs-bus-pci.
const PCI_RESCAN: &str = "/sys/bus/pci/rescan";
const CARD_DRIVER: &str = "/sys/bus/virtio/drivers/virtio_net";

/// Loads the drivers, so that a device that appears has its driver at once.
pub(crate) fn load_drivers() -> Result<()> {
    run("modprobe", &[&["-a"], DRIVERS.as_slice()].concat())
}

/// Has the kernel look for devices: those that came while the machine was asleep.
pub(crate) fn find_new() -> Result<()> {
    fs::write(PCI_RESCAN, "1").context("looking for new devices")
}

/// Has the kernel find the network card that was plugged in.
///
/// # Errors
/// When it is not there, or its driver does not take it.
pub(crate) fn find_card() -> Result<()> {
    find_new()?;
    card(Path::new(CARD_DRIVER)).map(drop)
}

/// Takes the network card from its driver, in a clone for which it leads nowhere: there is no such interface then.
pub(crate) fn stop_card() -> Result<()> {
    let driver = Path::new(CARD_DRIVER);
    fs::write(driver.join("unbind"), card(driver)?).context("taking the network card from its driver")
}

/// The name of the first network card that the driver has, as `virtio4`.
fn card(driver: &Path) -> Result<String> {
    let entries = fs::read_dir(driver).context("looking at the driver of network cards")?;
    let names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .filter(|name| name.starts_with("virtio"))
        .min()
        .context("the guest has no network card")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_card_is_found_among_what_its_driver_has() {
        let driver = tempfile::tempdir().unwrap();
        for name in ["bind", "module", "uevent", "unbind"] {
            fs::write(driver.path().join(name), "").unwrap();
        }
        let error = card(driver.path()).unwrap_err().to_string();
        assert_eq!(error, "the guest has no network card");
        fs::create_dir(driver.path().join("virtio4")).unwrap();
        assert_eq!(card(driver.path()).unwrap(), "virtio4");
    }
}
