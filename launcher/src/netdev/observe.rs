//! What CNI made in the pod's network namespace, as the guest is to have it.

use std::{collections::HashMap, net::IpAddr};

use coreos_kvm_proto::agent;
use futures::TryStreamExt;
use rtnetlink::{
    Handle, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressScope},
        link::{LinkAttribute, LinkFlags, LinkLayerType},
        neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourState},
        route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType},
    },
};

use super::NetdevError;
use crate::{
    mac::Mac,
    machine::{PortProtocol, PortRedirect},
};

/// One Ethernet interface that is up.
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub mac: Mac,
    pub mtu: u32,
    addresses: Vec<String>,
}

/// A whole namespace.
pub(super) struct Observed {
    pub links: Vec<Link>,
    routes: Vec<agent::Route>,
    neighbours: Vec<agent::Neighbour>,
}

impl Observed {
    /// The addresses of all interfaces, in their order.
    pub(super) fn addresses(&self) -> Vec<IpAddr> {
        let all = self.links.iter().flat_map(|link| &link.addresses);
        all.filter_map(|address| address.split('/').next()?.parse().ok())
            .collect()
    }

    pub(super) fn configuration(self, redirects: &[PortRedirect]) -> agent::ConfigureNetworkRequest {
        let interface = |link: Link| agent::Interface {
            name: link.name,
            mac: link.mac.to_string(),
            mtu: link.mtu,
            addresses: link.addresses,
            ..Default::default()
        };
        let redirect = |redirect: &PortRedirect| agent::PortRedirect {
            protocol: match redirect.protocol {
                PortProtocol::Tcp => "tcp",
                PortProtocol::Udp => "udp",
                PortProtocol::Sctp => "sctp",
            }
            .to_owned(),
            port: redirect.port.into(),
            guest_port: redirect.guest_port.into(),
            ..Default::default()
        };
        agent::ConfigureNetworkRequest {
            interfaces: self.links.into_iter().map(interface).collect(),
            routes: self.routes,
            neighbours: self.neighbours,
            redirects: redirects.iter().map(redirect).collect(),
            ..Default::default()
        }
    }
}

pub(super) async fn observe(handle: &Handle) -> Result<Observed, NetdevError> {
    let mut links = links(handle).await?;
    addresses(handle, &mut links).await?;
    let names: HashMap<u32, &str> = links.iter().map(|link| (link.index, link.name.as_str())).collect();
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        routes.extend(self::routes(handle, family, &names).await?);
    }
    let neighbours = neighbours(handle, &names).await?;
    Ok(Observed {
        links,
        routes,
        neighbours,
    })
}

async fn links(handle: &Handle) -> Result<Vec<Link>, NetdevError> {
    let mut found = Vec::new();
    let mut messages = handle.link().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(NetdevError::netlink("listing the interfaces"))?
    {
        let header = message.header;
        let unusable = header.flags.contains(LinkFlags::Loopback) || !header.flags.contains(LinkFlags::Up);
        if unusable || header.link_layer_type != LinkLayerType::Ether {
            continue;
        }
        let mut link = Link {
            index: header.index,
            name: String::new(),
            mac: Mac([0; 6]),
            mtu: 1500,
            addresses: Vec::new(),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Address(bytes) => link.mac = Mac::try_from(bytes.as_slice()).unwrap_or(link.mac),
                _ => {}
            }
        }
        // A machine's own taps, when one is looked at again.
        if !link.name.starts_with("tap") {
            found.push(link);
        }
    }
    found.sort_by_key(|link| link.index);
    Ok(found)
}

async fn addresses(handle: &Handle, links: &mut [Link]) -> Result<(), NetdevError> {
    let mut messages = handle.address().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(NetdevError::netlink("listing the addresses"))?
    {
        // A link's own address follows from its MAC in the guest as it does here.
        if message.header.scope == AddressScope::Link {
            continue;
        }
        let Some(link) = links.iter_mut().find(|link| link.index == message.header.index) else {
            continue;
        };
        // On a point-to-point link IFA_LOCAL is ours and IFA_ADDRESS the peer's: rtnetlink(7).
        let (mut local, mut address) = (None, None);
        for attribute in message.attributes {
            match attribute {
                AddressAttribute::Local(ip) => local = Some(ip),
                AddressAttribute::Address(ip) => address = Some(ip),
                _ => {}
            }
        }
        if let Some(ip) = local.or(address) {
            link.addresses.push(format!("{ip}/{}", message.header.prefix_len));
        }
    }
    Ok(())
}

async fn routes(
    handle: &Handle,
    family: AddressFamily,
    names: &HashMap<u32, &str>,
) -> Result<Vec<agent::Route>, NetdevError> {
    let any: RouteMessage = match family {
        AddressFamily::Inet => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        _ => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    };
    let mut found = Vec::new();
    let mut messages = handle.route().get(any).execute();
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(NetdevError::netlink("listing the routes"))?
    {
        let header = &message.header;
        // The guest's kernel makes those of its addresses itself.
        let made = header.table == RouteHeader::RT_TABLE_MAIN
            && header.kind == RouteType::Unicast
            && header.protocol != RouteProtocol::Kernel;
        if !made {
            continue;
        }
        let mut route = agent::Route {
            scope: u32::from(u8::from(header.scope)),
            family: if family == AddressFamily::Inet { 4 } else { 6 },
            onlink: header.flags.contains(RouteFlags::Onlink),
            ..Default::default()
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => {
                    if let Some(ip) = ip(address) {
                        route.destination = format!("{ip}/{}", header.destination_prefix_length);
                    }
                }
                RouteAttribute::Gateway(address) => {
                    route.gateway = ip(address).map(|ip| ip.to_string()).unwrap_or_default();
                }
                RouteAttribute::PrefSource(address) => {
                    route.source = ip(address).map(|ip| ip.to_string()).unwrap_or_default();
                }
                RouteAttribute::Oif(index) => {
                    route.interface = names.get(index).copied().unwrap_or_default().to_owned();
                }
                RouteAttribute::Priority(metric) => route.metric = *metric,
                _ => {}
            }
        }
        if !route.interface.is_empty() {
            found.push(route);
        }
    }
    Ok(found)
}

async fn neighbours(handle: &Handle, names: &HashMap<u32, &str>) -> Result<Vec<agent::Neighbour>, NetdevError> {
    let mut found = Vec::new();
    let mut messages = handle.neighbours().get().execute();
    while let Some(message) = messages
        .try_next()
        .await
        .map_err(NetdevError::netlink("listing the neighbours"))?
    {
        // What was learnt is learnt again; what somebody has set is set.
        if message.header.state != NeighbourState::Permanent {
            continue;
        }
        let Some(interface) = names.get(&message.header.ifindex) else {
            continue;
        };
        let mut neighbour = agent::Neighbour {
            interface: (*interface).to_owned(),
            ..Default::default()
        };
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => neighbour.address = ip.to_string(),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => neighbour.address = ip.to_string(),
                NeighbourAttribute::LinkLayerAddress(address) => {
                    neighbour.mac = Mac::try_from(address.as_ref())
                        .map(|mac| mac.to_string())
                        .unwrap_or_default();
                }
                _ => {}
            }
        }
        if !neighbour.address.is_empty() && !neighbour.mac.is_empty() {
            found.push(neighbour);
        }
    }
    Ok(found)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}
