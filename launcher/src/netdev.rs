//! The guest's way into the pod's network: each interface of the pod's network namespace is bridged to a tap by the kernel's
//! traffic control, and the guest takes over its address, routes and neighbours. Host programs thereby see one machine with the
//! pod's address, and the namespace's own network stack sees nothing any more.
//!
//! `tc qdisc add dev eth0 ingress; tc filter add dev eth0 parent ffff: protocol all u32 match u8 0 0 action mirred egress
//! redirect dev tap2`, and the same the other way: tc-u32(8), tc-mirred(8).

use std::{
    fs::File,
    future::Future,
    io,
    net::IpAddr,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use coreos_kvm_proto::agent::{ConfigureNetworkRequest, Interface, Route};
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::{Handle, LinkUnspec, packet_core::ErrorMessage, packet_route::tc::TcHandle};

use crate::{
    forward,
    mac::Mac,
    machine::{Network, PortRedirect},
    qemu::devices::{USER_MAC, USER_MTU},
};

mod observe;
mod tap;

/// The pod's network cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum NetdevError {
    #[error("entering the pod's network namespace {} failed", path.display())]
    Namespace {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "making a network namespace failed: that takes root, and room for one more (the sysctl user.max_net_namespaces)"
    )]
    NewNamespace(#[source] io::Error),
    #[error("{what} failed in the pod's network namespace")]
    Netlink {
        what: String,
        #[source]
        source: rtnetlink::Error,
    },
    #[error("making the tap device {name} failed: /dev/net/tun and the kernel module tun are needed")]
    Tap {
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("the thread that works in the pod's network namespace failed")]
    Thread,
}

impl NetdevError {
    fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source }
    }
}

/// What QEMU and the agent get to know of the pod's network.
#[derive(Debug)]
pub struct Attached {
    pub taps: Vec<Tap>,
    pub configuration: ConfigureNetworkRequest,
}

/// The host's end of one interface of the guest. It vanishes when the descriptor is closed everywhere.
#[derive(Debug)]
pub struct Tap {
    pub descriptor: OwnedFd,
    /// An open /dev/vhost-net, where there is one: packets then bypass QEMU.
    pub vhost: Option<OwnedFd>,
    /// Of the guest's interface: that of the pod's, so that neighbours need not learn anew.
    pub mac: Mac,
    pub mtu: u32,
}

/// Bridges every Ethernet interface of the network namespace to a tap of its own.
///
/// # Errors
/// When the namespace is gone, or the kernel lacks tap devices, the ingress qdisc, u32 or mirred. What was made then stays, for
/// [`detach`].
pub async fn attach(netns: &Path, redirects: &[PortRedirect]) -> Result<Attached, NetdevError> {
    let redirects = redirects.to_vec();
    inside(netns, async move |handle| {
        let observed = observe::observe(&handle).await?;
        let mut taps = Vec::new();
        for link in &observed.links {
            let name = format!("tap{}", link.index);
            let descriptor = tap::create(&name).map_err(|source| NetdevError::Tap {
                name: name.clone(),
                source,
            })?;
            let index = tap::bring_up(&handle, &name, link.mtu).await?;
            bridge(&handle, link.index, index).await?;
            taps.push(Tap {
                descriptor,
                vhost: vhost(),
                mac: link.mac,
                mtu: link.mtu,
            });
        }
        Ok(Attached {
            taps,
            configuration: observed.configuration(&redirects),
        })
    })
    .await
}

/// An open /dev/vhost-net, where there is one.
pub fn vhost() -> Option<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/vhost-net");
    device.ok().map(OwnedFd::from)
}

/// A tap device that leads nowhere: nobody else is in its network namespace, which is there as long as it.
///
/// # Errors
/// When the kernel lacks tap devices, or the right to make namespaces is missing.
pub async fn unconnected() -> Result<OwnedFd, NetdevError> {
    const NAME: &str = "tap0";
    on_own_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| NetdevError::NewNamespace(error.into()))?;
        tap::create(NAME).map_err(|source| NetdevError::Tap {
            name: NAME.to_owned(),
            source,
        })
    })
    .await
}

/// What the guest is told of QEMU's own network. It could ask by DHCP as well, but the answer is known.
pub fn user_configuration() -> ConfigureNetworkRequest {
    let name = "eth0".to_owned();
    ConfigureNetworkRequest {
        interfaces: vec![Interface {
            name: name.clone(),
            mac: USER_MAC.to_string(),
            mtu: USER_MTU,
            addresses: vec![format!("{}/{}", forward::GUEST, forward::PREFIX_LENGTH)],
            ..Default::default()
        }],
        routes: vec![Route {
            gateway: forward::GATEWAY.to_string(),
            interface: name,
            family: 4,
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// The addresses by which the guest will be reached, as far as they are known before it boots: the first of each family.
///
/// # Errors
/// When the network namespace is gone or cannot be read.
pub async fn addresses(network: &Network) -> Result<Vec<IpAddr>, NetdevError> {
    let all = match network {
        Network::None => Vec::new(),
        Network::User { .. } => vec![forward::GUEST.into()],
        Network::Tap { netns, .. } => {
            inside(netns, async |handle| Ok(observe::observe(&handle).await?.addresses())).await?
        }
    };
    let v4 = all.iter().find(|address| address.is_ipv4());
    let v6 = all.iter().find(|address| address.is_ipv6());
    Ok(v4.into_iter().chain(v6).copied().collect())
}

/// Undoes [`attach`], wholly or partly done, as far as it outlives the taps' descriptors. A namespace that is gone is no error.
///
/// # Errors
/// When the namespace is there and cannot be entered or changed.
pub async fn detach(netns: &Path) -> Result<(), NetdevError> {
    if !netns.exists() {
        return Ok(());
    }
    let result = inside(netns, async |handle| {
        for link in observe::observe(&handle).await?.links {
            let mut request = handle.qdisc().del(signed(link.index));
            request.message_mut().header.parent = TcHandle::INGRESS;
            if let Err(error) = request.execute().await
                && !is_absent(&error)
            {
                return Err(NetdevError::netlink(format!(
                    "removing the ingress qdisc of interface {}",
                    link.name
                ))(error));
            }
        }
        Ok(())
    })
    .await;
    match result {
        // The path of a namespace stays for a moment as a plain file, after the namespace itself.
        Err(NetdevError::Namespace { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

/// Whatever comes in at one goes out at the other, both ways.
async fn bridge(handle: &Handle, one: u32, other: u32) -> Result<(), NetdevError> {
    for (from, to) in [(one, other), (other, one)] {
        handle
            .qdisc()
            .add(signed(from))
            .ingress()
            .execute()
            .await
            .map_err(NetdevError::netlink("adding an ingress qdisc"))?;
        handle
            .traffic_filter(signed(from))
            .add()
            .parent(INGRESS)
            .protocol(ETH_P_ALL.to_be())
            .redirect(to)
            .map_err(NetdevError::netlink("describing a redirecting filter"))?
            .execute()
            .await
            .map_err(NetdevError::netlink(
                "adding a redirecting filter (the kernel needs cls_u32 and act_mirred)",
            ))?;
    }
    Ok(())
}

/// `ffff:` of tc(8), the handle of an ingress qdisc.
const INGRESS: u32 = 0xffff_0000;
/// Every protocol: linux/if_ether.h.
const ETH_P_ALL: u16 = 0x0003;

/// Interface indexes are positive and fit either type.
fn signed(index: u32) -> i32 {
    i32::try_from(index).unwrap_or(i32::MAX)
}

fn is_absent(error: &rtnetlink::Error) -> bool {
    let rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) = error else {
        return false;
    };
    matches!(-code.get(), libc::ENOENT | libc::EINVAL | libc::ENODEV)
}

/// Runs `work` with a netlink connection into the network namespace.
async fn inside<T, W, F>(netns: &Path, work: W) -> Result<T, NetdevError>
where
    T: Send + 'static,
    W: FnOnce(Handle) -> F + Send + 'static,
    F: Future<Output = Result<T, NetdevError>>,
{
    let path = netns.to_owned();
    on_own_thread(move || {
        let namespace = |source| NetdevError::Namespace {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(namespace)?;
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(|error| namespace(error.into()))?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(namespace)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(namespace)?;
            let connection = tokio::spawn(connection);
            let result = work(handle).await;
            connection.abort();
            result
        })
    })
    .await
}

/// Namespaces are the thread's.
async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetdevError> + Send + 'static,
) -> Result<T, NetdevError> {
    let (answer, answered) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || answer.send(work()))
        .map_err(|_| NetdevError::Thread)?;
    answered.await.map_err(|_| NetdevError::Thread)?
}

/// The message that brings a link up.
fn up(index: u32) -> rtnetlink::packet_route::link::LinkMessage {
    LinkUnspec::new_with_index(index).up().build()
}

#[cfg(test)]
mod tests;
