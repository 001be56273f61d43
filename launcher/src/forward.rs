//! Forwards of QEMU's user network: ports of the host that lead to ports of the guest, in QEMU's own syntax
//! (qemu(1), `-netdev user`, `hostfwd`). They are checked before QEMU starts, which would say less.

use std::{
    fmt, io,
    net::{Ipv4Addr, TcpListener, UdpSocket},
    num::NonZeroU16,
    path::Path,
    str::FromStr,
};

/// The network of the user network, its guest, and what QEMU answers for in it: QEMU's defaults.
pub const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
pub const PREFIX_LENGTH: u8 = 24;
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

/// One forward: `tcp:127.0.0.1:2222-10.0.2.15:22`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    pub transport: Transport,
    /// Address of the host at which QEMU listens; 0.0.0.0 is every one.
    pub host: Ipv4Addr,
    pub host_port: NonZeroU16,
    /// Address of the guest, in its network.
    pub guest: Ipv4Addr,
    pub guest_port: NonZeroU16,
}

/// What QEMU forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// As QEMU takes it.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            transport,
            host,
            host_port,
            guest,
            guest_port,
        } = self;
        write!(f, "{transport}:{host}:{host_port}-{guest}:{guest_port}")
    }
}

/// A text that is no forward.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{text:?} is no forward: {problem}; expected is hostfwd=tcp:[host address]:port-[guest address]:port, such as hostfwd=tcp::2222-:22, several by commas"
)]
pub struct InvalidForward {
    text: String,
    problem: String,
}

impl FromStr for Forward {
    type Err = InvalidForward;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|problem| InvalidForward {
            text: text.to_owned(),
            problem,
        })
    }
}

fn parse(text: &str) -> Result<Forward, String> {
    let rule = text.strip_prefix("hostfwd=").unwrap_or(text);
    let (host_side, guest_side) = rule
        .split_once('-')
        .ok_or("there is no '-' between the host's side and the guest's")?;
    let (transport, host_side) = host_side
        .split_once(':')
        .ok_or("the host's side is not protocol:address:port")?;
    let transport = match transport {
        "" | "tcp" => Transport::Tcp,
        "udp" => Transport::Udp,
        other => return Err(format!("the protocol is tcp or udp, not {other:?}")),
    };
    let (host, host_port) = address_and_port(host_side, "host", Ipv4Addr::UNSPECIFIED)?;
    let (guest, guest_port) = address_and_port(guest_side, "guest", GUEST)?;
    if guest.octets()[..3] != NETWORK.octets()[..3] {
        return Err(format!("the guest is at {GUEST}, and {guest} is not in its network"));
    }
    Ok(Forward {
        transport,
        host,
        host_port,
        guest,
        guest_port,
    })
}

fn address_and_port(text: &str, side: &str, default: Ipv4Addr) -> Result<(Ipv4Addr, NonZeroU16), String> {
    let (address, port) = text
        .split_once(':')
        .ok_or_else(|| format!("the {side}'s side has no ':' before its port"))?;
    let address = if address.is_empty() {
        default
    } else {
        address
            .parse()
            .map_err(|_| format!("{address:?} is no IPv4 address of the {side}"))?
    };
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits);
    let port = port.ok_or_else(|| format!("the {side}'s port is a number from 1 to 65535"))?;
    Ok((address, port))
}

/// Reads several forwards, by commas; an empty text is none.
///
/// # Errors
/// Of the first that is wrong.
pub fn parse_list(text: &str) -> Result<Vec<Forward>, InvalidForward> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    text.split(',').map(|forward| forward.trim().parse()).collect()
}

/// QEMU's network of that name with these forwards: the value of qemu(1)'s option `-netdev`.
pub(crate) fn netdev(name: &str, forwards: &[Forward]) -> String {
    let mut netdev = format!("user,id={name},ipv6=off,net={NETWORK}/{PREFIX_LENGTH},dhcpstart={GUEST}");
    for forward in forwards {
        netdev += &format!(",hostfwd={forward}");
    }
    netdev
}

/// Forwards that QEMU could not set up.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("the {transport} port {port} of the host is to be forwarded twice: {first} and {second}")]
    Twice {
        transport: Transport,
        port: NonZeroU16,
        first: Forward,
        second: Forward,
    },
    #[error(
        "the host's port {port} of {forward} is below {first_free}, and QEMU runs without the right to take it: forward one from \
         {first_free} on, or lower the sysctl net.ipv4.ip_unprivileged_port_start to {port}"
    )]
    Privileged {
        forward: Forward,
        port: NonZeroU16,
        first_free: u16,
    },
    #[error("the host's {transport} port {port} of {forward} is taken: end what listens there, or forward another one")]
    Taken {
        forward: Forward,
        transport: Transport,
        port: NonZeroU16,
    },
    #[error("the host has no address {address} for {forward} to listen at")]
    Address { forward: Forward, address: Ipv4Addr },
    #[error("the host's {transport} port {port} of {forward} cannot be taken")]
    Other {
        forward: Forward,
        transport: Transport,
        port: NonZeroU16,
        #[source]
        source: io::Error,
    },
}

/// Whether QEMU can set them all up, in this thread's network namespace, as a user without rights.
///
/// # Errors
/// When a port stands in two of them, is taken, needs rights, or the host lacks the address.
pub fn check(forwards: &[Forward]) -> Result<(), ForwardError> {
    let first_free = first_unprivileged_port(Path::new("/proc/sys/net/ipv4/ip_unprivileged_port_start"));
    for (number, forward) in forwards.iter().enumerate() {
        if let Some(first) = forwards[..number].iter().find(|other| collide(other, forward)) {
            return Err(ForwardError::Twice {
                transport: forward.transport,
                port: forward.host_port,
                first: *first,
                second: *forward,
            });
        }
        let (transport, port) = (forward.transport, forward.host_port);
        if port.get() < first_free {
            return Err(ForwardError::Privileged {
                forward: *forward,
                port,
                first_free,
            });
        }
        listen(forward).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => ForwardError::Taken {
                forward: *forward,
                transport,
                port,
            },
            io::ErrorKind::AddrNotAvailable => ForwardError::Address {
                forward: *forward,
                address: forward.host,
            },
            _ => ForwardError::Other {
                forward: *forward,
                transport,
                port,
                source,
            },
        })?;
    }
    Ok(())
}

fn collide(one: &Forward, other: &Forward) -> bool {
    let everywhere = one.host.is_unspecified() || other.host.is_unspecified();
    one.transport == other.transport && one.host_port == other.host_port && (everywhere || one.host == other.host)
}

/// Listens for a moment, as QEMU will (and like it, beside connections that are only closing).
fn listen(forward: &Forward) -> io::Result<()> {
    let address = (forward.host, forward.host_port.get());
    match forward.transport {
        Transport::Tcp => TcpListener::bind(address).map(drop),
        Transport::Udp => UdpSocket::bind(address).map(drop),
    }
}

/// The kernel's `Documentation/networking/ip-sysctl.rst`; its default where there is no such file.
fn first_unprivileged_port(sysctl: &Path) -> u16 {
    let text = std::fs::read_to_string(sysctl).unwrap_or_default();
    text.trim().parse().unwrap_or(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("hostfwd=tcp::2222-:22", "tcp:0.0.0.0:2222-10.0.2.15:22")]
    #[case("tcp::2222-:22", "tcp:0.0.0.0:2222-10.0.2.15:22")]
    #[case("hostfwd=tcp:127.0.0.1:1443-:443", "tcp:127.0.0.1:1443-10.0.2.15:443")]
    #[case("udp:127.0.0.2:5353-10.0.2.20:53", "udp:127.0.0.2:5353-10.0.2.20:53")]
    #[case("::65535-:1", "tcp:0.0.0.0:65535-10.0.2.15:1")]
    fn forwards_are_read_as_qemu_does(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(text.parse::<Forward>().unwrap().to_string(), expected);
    }

    #[test]
    fn several_are_told_apart_by_commas_and_nothing_is_none() {
        let list = parse_list("hostfwd=tcp::2222-:22, hostfwd=tcp:127.0.0.1:1443-:443,udp::53000-:53").unwrap();
        assert_eq!(list.len(), 3);
        assert_eq!(parse_list("").unwrap(), []);
        assert!(parse_list("tcp::2222-:22,").is_err());
        assert!(parse_list(",tcp::2222-:22").is_err());
    }

    #[rstest::rstest]
    #[case("", "no '-'")]
    #[case("hostfwd=", "no '-'")]
    #[case("2222:22", "no '-'")]
    #[case("2222-22", "not protocol:address:port")]
    #[case("tcp:2222-:22", "the host's side has no ':'")]
    #[case("tcp::2222-22", "the guest's side has no ':'")]
    #[case("sctp::2222-:22", "tcp or udp, not \"sctp\"")]
    #[case("TCP::2222-:22", "tcp or udp")]
    #[case("tcp::0-:22", "the host's port is a number from 1 to 65535")]
    #[case("tcp::2222-:0", "the guest's port is a number from 1 to 65535")]
    #[case("tcp::65536-:22", "the host's port")]
    #[case("tcp::-:22", "the host's port")]
    #[case("tcp::2222-:", "the guest's port")]
    #[case("tcp::+2222-:22", "the host's port")]
    #[case("tcp::2222-:ssh", "the guest's port")]
    #[case("tcp::2222-:22-:23", "the guest's port")]
    #[case("tcp::2222 -:22", "the host's port")]
    #[case("tcp:localhost:2222-:22", "\"localhost\" is no IPv4 address of the host")]
    #[case("tcp:[::1]:2222-:22", "is no IPv4 address of the host")]
    #[case("tcp:1.2.3:2222-:22", "is no IPv4 address of the host")]
    #[case("tcp::2222-guest:22", "is no IPv4 address of the guest")]
    #[case(
        "tcp::2222-192.168.0.1:22",
        "the guest is at 10.0.2.15, and 192.168.0.1 is not in its network"
    )]
    #[case("guestfwd=tcp:10.0.2.100:80-cmd:cat", "tcp or udp, not \"guestfwd=tcp\"")]
    fn what_is_no_forward_is_refused_in_a_sentence(#[case] text: &str, #[case] problem: &str) {
        let error = text.parse::<Forward>().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{text:?} is no forward: ")), "{error}");
        assert!(
            error.contains(problem) && error.contains("hostfwd=tcp::2222-:22"),
            "{error}"
        );
    }

    #[rstest::rstest]
    #[case("tcp::20022-:22,tcp::20022-:23", true)]
    #[case("tcp:127.0.0.1:20022-:22,tcp::20022-:23", true)]
    #[case("tcp:127.0.0.1:20022-:22,tcp:127.0.0.2:20022-:23", false)]
    #[case("tcp::20022-:22,udp::20022-:22", false)]
    fn a_port_is_forwarded_once(#[case] list: &str, #[case] twice: bool) {
        let list = parse_list(list).unwrap();
        assert_eq!(collide(&list[0], &list[1]), twice);
        if twice {
            let error = check(&list[..]).unwrap_err().to_string();
            assert!(
                error.contains("port 20022 of the host is to be forwarded twice"),
                "{error}"
            );
        }
    }

    #[rstest::rstest]
    #[case(Transport::Tcp)]
    #[case(Transport::Udp)]
    fn a_port_that_is_taken_is_named(#[case] transport: Transport) {
        let local = (Ipv4Addr::LOCALHOST, 0);
        let (tcp, udp) = (TcpListener::bind(local).unwrap(), UdpSocket::bind(local).unwrap());
        let address = match transport {
            Transport::Tcp => tcp.local_addr(),
            Transport::Udp => udp.local_addr(),
        };
        let port = address.unwrap().port();
        let forwards = parse_list(&format!("{transport}:127.0.0.1:{port}-:22")).unwrap();
        let error = check(&forwards).unwrap_err().to_string();
        assert!(
            error.contains(&format!("{transport} port {port}")) && error.contains("is taken"),
            "{error}"
        );
        drop((tcp, udp));
        check(&forwards).unwrap();
    }

    #[test]
    fn an_address_that_the_host_lacks_is_named() {
        let forwards = parse_list("tcp:192.0.2.1:20022-:22").unwrap();
        let error = check(&forwards).unwrap_err().to_string();
        assert!(error.contains("the host has no address 192.0.2.1"), "{error}");
    }

    #[test]
    fn a_port_that_needs_rights_is_refused_with_the_sysctl_that_helps() {
        let sysctl = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(sysctl.path(), "80\n").unwrap();
        assert_eq!(first_unprivileged_port(sysctl.path()), 80);
        assert_eq!(first_unprivileged_port(Path::new("/nonexistent")), 1024);
        let error = ForwardError::Privileged {
            forward: "tcp::22-:22".parse().unwrap(),
            port: NonZeroU16::new(22).unwrap(),
            first_free: 80,
        };
        assert!(error.to_string().contains("is below 80"), "{error}");
    }
}
