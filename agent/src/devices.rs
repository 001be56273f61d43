//! The devices of a template and its clones: the network card that all have, and those that a clone is given when it wakes up.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

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
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
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

/// The folder in /sys of the PCI device of that vendor and kind, as `0x1af4` and `0x1110`.
///
/// # Errors
/// `NotFound` when there is none.
pub(crate) fn find_device(vendor: &str, kind: &str) -> io::Result<PathBuf> {
    device(Path::new(PCI_DEVICES), vendor, kind)
}

fn device(devices: &Path, vendor: &str, kind: &str) -> io::Result<PathBuf> {
    let is = |path: PathBuf, expected: &str| fs::read_to_string(path).is_ok_and(|said| said.trim() == expected);
    let mut devices = fs::read_dir(devices)?.flatten().map(|device| device.path());
    devices
        .find(|device| is(device.join("vendor"), vendor) && is(device.join("device"), kind))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the machine has no such device"))
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
    fn a_device_is_found_by_its_vendor_and_its_kind() {
        let devices = tempfile::tempdir().unwrap();
        for (name, vendor, kind) in [("00:01.0", "0x1af4", "0x1042"), ("00:02.0", "0x1af4", "0x1110")] {
            let folder = devices.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("vendor"), format!("{vendor}\n")).unwrap();
            fs::write(folder.join("device"), format!("{kind}\n")).unwrap();
        }
        let found = |vendor, kind| device(devices.path(), vendor, kind);
        assert_eq!(found("0x1af4", "0x1110").unwrap(), devices.path().join("00:02.0"));
        assert_eq!(found("0x8086", "0x1110").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

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
