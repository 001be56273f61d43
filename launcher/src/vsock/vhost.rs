//! The kernel's vsock device: `Documentation/virt/` has no page for it; its interface is `linux/vhost.h`.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
};

nix::ioctl_write_ptr!(
    /// VHOST_VSOCK_SET_GUEST_CID of linux/vhost.h.
    set_guest_cid,
    0xAF,
    0x60,
    u64
);

/// Context ids below are the hypervisor's and the host's: vsock(7).
const FIRST_CID: u32 = 3;
/// Tries to find one that no other guest of this node has.
const TRIES: usize = 64;

/// Opens the device.
pub(super) fn open() -> io::Result<OwnedFd> {
    Ok(std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/vhost-vsock")?
        .into())
}

/// Gives the device a context id that is free on this node, and holds it as long as the device is open.
pub(super) fn claim_cid(device: &OwnedFd) -> io::Result<u32> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..TRIES {
        let mut bytes = [0; 4];
        nix_random(&mut bytes)?;
        // Half the range: the kernel takes 32 bits, u32::MAX means "any".
        let cid = FIRST_CID + u32::from_ne_bytes(bytes) % (u32::MAX / 2);
        // SAFETY: the ioctl reads one u64, which lives longer than the call.
        match unsafe { set_guest_cid(device.as_raw_fd(), &u64::from(cid)) } {
            Ok(_) => return Ok(cid),
            Err(nix::Error::EADDRINUSE) => {}
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

fn nix_random(bytes: &mut [u8]) -> io::Result<()> {
    // SAFETY: getrandom(2) fills at most so many bytes of the slice.
    let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match usize::try_from(filled) {
        Ok(filled) if filled == bytes.len() => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
