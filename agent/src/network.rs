//! The guest takes over the pod's addresses: interfaces are found by their MAC and set up by rtnetlink(7).

use std::{
    collections::HashMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use coreos_kvm_proto::agent::{ConfigureNetworkRequest, Interface, Neighbour, Route};
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_core::ErrorMessage,
    packet_route::route::{RouteFlags, RouteScope},
};
use tokio::time::{Instant, sleep};

use crate::error::AgentError;

/// The device's driver may still be loading.
const DEVICE: Duration = Duration::from_secs(10);
/// Where the kernel lists the interfaces, each with its address and number (Documentation/ABI/testing/sysfs-class-net).
const INTERFACES: &str = "/sys/class/net";

/// Sets up everything that is asked.
pub(crate) async fn configure(request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
    if let Some(redirect) = request.redirects.first() {
        return Err(AgentError::InvalidArgument(format!(
            "port {} cannot be another port ({}) in the guest yet: let the container listen on {} itself",
            redirect.port, redirect.guest_port, redirect.port
        )));
    }
    let (connection, handle, _) = rtnetlink::new_connection().map_err(AgentError::failed("opening netlink failed"))?;
    let connection = tokio::spawn(connection);
    let result = configure_by(&handle, request).await;
    connection.abort();
    result
}

async fn configure_by(handle: &Handle, request: &ConfigureNetworkRequest) -> Result<(), AgentError> {
    up(handle, 1, "lo").await?;
    let mut indexes = HashMap::new();
    for interface in &request.interfaces {
        let index = find(&interface.mac, &interface.name).await?;
        configure_interface(handle, index, interface).await?;
        indexes.insert(interface.name.as_str(), index);
    }
    let index = |name: &str| {
        indexes
            .get(name)
            .copied()
            .ok_or_else(|| AgentError::InvalidArgument(format!("there is no interface {name:?}")))
    };
    // Routes on the link first: gateways are reached over them.
    let (on_link, by_gateway): (Vec<_>, Vec<_>) = request.routes.iter().partition(|route| route.gateway.is_empty());
    for route in on_link.into_iter().chain(by_gateway) {
        add_route(handle, route, index(&route.interface)?).await?;
    }
    for neighbour in &request.neighbours {
        add_neighbour(handle, neighbour, index(&neighbour.interface)?).await?;
    }
    Ok(())
}

async fn configure_interface(handle: &Handle, index: u32, interface: &Interface) -> Result<(), AgentError> {
    let name = &interface.name;
    let what = |what: &str| AgentError::failed(format!("{what} of interface {name} failed"));
    let named = async || {
        let settings = LinkUnspec::new_with_index(index).name(name.clone()).mtu(interface.mtu);
        handle.link().set(settings.build()).execute().await
    };
    let mut done = named().await;
    // A name can be changed only while the interface is down.
    if done.as_ref().is_err_and(|error| refused_with(error, libc::EBUSY)) {
        let settings = LinkUnspec::new_with_index(index).down().build();
        handle.link().set(settings).execute().await.map_err(what("halting"))?;
        done = named().await;
    }
    done.map_err(what("setting name and MTU"))?;
    for address in &interface.addresses {
        let (ip, length) = parse_prefix(address)?;
        if ip.is_ipv6() {
            // Nobody else has it: the pod's network gave it to this pod.
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0");
        }
        let added = handle.address().add(index, ip, length).execute().await;
        unless_there(added).map_err(what("adding an address"))?;
    }
    up(handle, index, name).await
}

async fn up(handle: &Handle, index: u32, name: &str) -> Result<(), AgentError> {
    let settings = LinkUnspec::new_with_index(index).up().build();
    handle
        .link()
        .set(settings)
        .execute()
        .await
        .map_err(AgentError::failed(format!("bringing up interface {name} failed")))
}

/// The interface with that address, which may have its name already: its index.
async fn find(mac: &str, name: &str) -> Result<u32, AgentError> {
    parse_mac(mac)?;
    let deadline = Instant::now() + DEVICE;
    loop {
        if let Some(index) = index_of(Path::new(INTERFACES), mac, name) {
            return Ok(index);
        }
        if Instant::now() > deadline {
            return Err(AgentError::NotFound(format!(
                "the guest has no interface with the address {mac}"
            )));
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// By sysfs: netlink's list of the interfaces has all that there is to say of each. The one of that name, if it is the one, for a clone's
/// kernel mostly has given it that; or the first one that came, for what is made on an interface, such as a VLAN, mostly has its
/// address.
fn index_of(interfaces: &Path, mac: &str, name: &str) -> Option<u32> {
    let index = |interface: &Path| {
        let said = |what: &str| fs::read_to_string(interface.join(what)).ok();
        let has_it = said("address")?.trim().eq_ignore_ascii_case(mac);
        has_it.then(|| said("ifindex")?.trim().parse().ok())?
    };
    let named = index(&interfaces.join(name));
    named.or_else(|| {
        let interfaces = fs::read_dir(interfaces).ok()?.flatten();
        interfaces.filter_map(|interface| index(&interface.path())).min()
    })
}

async fn add_route(handle: &Handle, route: &Route, index: u32) -> Result<(), AgentError> {
    let invalid = || {
        AgentError::InvalidArgument(format!(
            "the route to {:?} by {:?} mixes families",
            route.destination, route.gateway
        ))
    };
    let destination = if route.destination.is_empty() {
        None
    } else {
        Some(parse_prefix(&route.destination)?)
    };
    let gateway = parse_optional(&route.gateway)?;
    let source = parse_optional(&route.source)?;
    let scope = RouteScope::from(u8::try_from(route.scope).unwrap_or(0));
    // One message a family: the builder is typed by it.
    let message = if route.family == 4 {
        let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
            .output_interface(index)
            .scope(scope);
        match destination {
            Some((IpAddr::V4(ip), length)) => builder = builder.destination_prefix(ip, length),
            Some(_) => return Err(invalid()),
            None => {}
        }
        match gateway {
            Some(IpAddr::V4(ip)) => builder = builder.gateway(ip),
            Some(_) => return Err(invalid()),
            None => {}
        }
        if let Some(IpAddr::V4(ip)) = source {
            builder = builder.pref_source(ip);
        }
        if route.metric != 0 {
            builder = builder.priority(route.metric);
        }
        builder.build()
    } else {
        let mut builder = RouteMessageBuilder::<Ipv6Addr>::new().output_interface(index);
        match destination {
            Some((IpAddr::V6(ip), length)) => builder = builder.destination_prefix(ip, length),
            Some(_) => return Err(invalid()),
            None => {}
        }
        match gateway {
            Some(IpAddr::V6(ip)) => builder = builder.gateway(ip),
            Some(_) => return Err(invalid()),
            None => {}
        }
        if route.metric != 0 {
            builder = builder.priority(route.metric);
        }
        builder.build()
    };
    let mut request = handle.route().add(message);
    if route.onlink {
        request.message_mut().header.flags |= RouteFlags::Onlink;
    }
    let what = if route.destination.is_empty() {
        "default"
    } else {
        route.destination.as_str()
    };
    unless_there(request.execute().await).map_err(AgentError::failed(format!("adding the route {what} failed")))
}

async fn add_neighbour(handle: &Handle, neighbour: &Neighbour, index: u32) -> Result<(), AgentError> {
    let ip = parse_ip(&neighbour.address)?;
    let mac = parse_mac(&neighbour.mac)?;
    let request = handle.neighbours().add(index, ip).link_layer_address(&mac).replace();
    request
        .execute()
        .await
        .map_err(AgentError::failed(format!("adding the neighbour {ip} failed")))
}

/// What is there already needs not be added.
fn unless_there(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(error) if refused_with(&error, libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Whether that is the kernel's answer.
fn refused_with(error: &rtnetlink::Error, number: i32) -> bool {
    let rtnetlink::Error::NetlinkError(ErrorMessage { code: Some(code), .. }) = error else {
        return false;
    };
    -code.get() == number
}

fn parse_ip(text: &str) -> Result<IpAddr, AgentError> {
    text.parse()
        .map_err(|_| AgentError::InvalidArgument(format!("{text:?} is no IP address")))
}

fn parse_optional(text: &str) -> Result<Option<IpAddr>, AgentError> {
    if text.is_empty() {
        Ok(None)
    } else {
        parse_ip(text).map(Some)
    }
}

/// `10.88.0.4/16`.
fn parse_prefix(text: &str) -> Result<(IpAddr, u8), AgentError> {
    let invalid = || AgentError::InvalidArgument(format!("{text:?} is no address with a prefix length"));
    let (ip, length) = text.split_once('/').ok_or_else(invalid)?;
    let (ip, length) = (parse_ip(ip)?, length.parse().map_err(|_| invalid())?);
    let most = if ip.is_ipv4() { 32 } else { 128 };
    if length > most {
        Err(invalid())
    } else {
        Ok((ip, length))
    }
}

/// `aa:bb:cc:dd:ee:ff`.
fn parse_mac(text: &str) -> Result<Vec<u8>, AgentError> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .ok_or_else(|| AgentError::InvalidArgument(format!("{text:?} is no MAC address")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_found_by_its_address() {
        let interfaces = tempfile::tempdir().unwrap();
        let mac = "0a:58:0a:58:00:04";
        for (name, address, index) in [
            ("lo", "00:00:00:00:00:00", "1"),
            ("ens1", mac, "7"),
            ("a-vlan", mac, "8"),
            ("vlan", mac, "10"),
        ] {
            let interface = interfaces.path().join(name);
            fs::create_dir(&interface).unwrap();
            fs::write(interface.join("address"), format!("{address}\n")).unwrap();
            fs::write(interface.join("ifindex"), format!("{index}\n")).unwrap();
        }
        assert_eq!(index_of(interfaces.path(), "0A:58:0a:58:00:04", "eth0"), Some(7));
        assert_eq!(index_of(interfaces.path(), mac, "lo"), Some(7));
        assert_eq!(index_of(interfaces.path(), mac, "vlan"), Some(10));
        assert_eq!(index_of(interfaces.path(), "0a:58:0a:58:00:05", "eth0"), None);
        assert_eq!(index_of(Path::new("/nowhere"), mac, "eth0"), None);
    }

    #[test]
    fn addresses_are_read_and_nonsense_is_refused() {
        assert_eq!(
            parse_prefix("10.88.0.4/16").unwrap(),
            (IpAddr::from([10, 88, 0, 4]), 16)
        );
        assert_eq!(parse_mac("02:00:00:00:00:ff").unwrap(), [2, 0, 0, 0, 0, 255]);
        for text in ["10.0.0.1", "10.0.0.1/33", "x/8", "fd00::1/129"] {
            assert!(parse_prefix(text).is_err(), "{text}");
        }
        for text in ["", "02:00", "02:00:00:00:00:00:00", "zz:00:00:00:00:00"] {
            assert!(parse_mac(text).is_err(), "{text}");
        }
    }
}
