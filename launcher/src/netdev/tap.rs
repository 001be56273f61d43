//! Tap devices: `Documentation/networking/tuntap.rst` of the kernel.

use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use futures::TryStreamExt;
use rtnetlink::{Handle, LinkUnspec};

use super::{NetdevError, up};

nix::ioctl_write_ptr!(
    /// TUNSETIFF of linux/if_tun.h.
    set_interface,
    b'T',
    202,
    libc::c_int
);

/// Makes a tap device in this thread's network namespace. It lives as long as the descriptor.
pub(super) fn create(name: &str) -> io::Result<OwnedFd> {
    let tun = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left for the terminating zero.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // Frames as they are, preceded by a virtio_net_hdr, so that checksums and segmentation stay with the guest.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: TUNSETIFF reads and writes one ifreq, despite the int of its number; it lives longer than the call.
    unsafe { set_interface(tun.as_raw_fd(), (&raw const request).cast()) }?;
    Ok(tun.into())
}

/// Brings the tap up with that MTU and says its index. The namespace itself is not to speak on it.
pub(super) async fn bring_up(handle: &Handle, name: &str, mtu: u32) -> Result<u32, NetdevError> {
    // A kernel without IPv6 has no such file, and nothing to silence.
    let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    let link = handle
        .link()
        .get()
        .match_name(name.to_owned())
        .execute()
        .try_next()
        .await;
    let index = match link.map_err(NetdevError::netlink(format!("finding {name}")))? {
        Some(link) => link.header.index,
        None => {
            return Err(NetdevError::netlink(format!("finding {name}"))(
                rtnetlink::Error::RequestFailed,
            ));
        }
    };
    let with_mtu = LinkUnspec::new_with_index(index).mtu(mtu).build();
    for message in [with_mtu, up(index)] {
        handle
            .link()
            .set(message)
            .execute()
            .await
            .map_err(NetdevError::netlink(format!("bringing up {name}")))?;
    }
    Ok(index)
}
