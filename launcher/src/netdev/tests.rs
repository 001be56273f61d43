//! In a network namespace of the test's own, which ends with its thread.

use std::{
    io::Read,
    os::fd::{AsRawFd, FromRawFd},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use super::*;
use crate::machine::PortProtocol;

/// A pod's network as CNI's bridge plugin makes it, with the far end of its veth in a namespace of its own. Both end with it.
struct Network {
    path: PathBuf,
    far: Child,
    _end: mpsc::Sender<()>,
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(self.far.stdin.take());
        let _ = self.far.wait();
    }
}

fn network() -> Network {
    let mut far = Command::new("unshare")
        .args(["--net", "sh", "-c", "echo; exec cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    far.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let script = format!(
        "set -e
        ip link set lo up
        ip link add eth0 address 02:00:00:00:00:02 mtu 1450 type veth peer name far0 address 02:00:00:00:00:01
        ip link set far0 netns {0}
        nsenter --target {0} --net ip link set far0 up
        ip link set eth0 up
        ip address add 10.9.0.2/24 dev eth0
        ip -6 address add fd09::2/64 dev eth0 nodad
        ip route add default via 10.9.0.1 dev eth0
        ip route add 10.10.0.0/16 via 10.9.0.7 dev eth0 metric 5
        ip neighbour add 10.9.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        far.id()
    );
    let (end, ended) = mpsc::channel::<()>();
    let (made, made_path) = mpsc::channel();
    std::thread::spawn(move || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNET).unwrap();
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
        let path = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
        made.send(PathBuf::from(path)).unwrap();
        let _ = ended.recv();
    });
    Network {
        path: made_path.recv().unwrap(),
        far,
        _end: end,
    }
}

/// Sends one Ethernet frame on the far end of the veth.
async fn send_from_far(network: &Network, frame: &'static [u8]) {
    let far = PathBuf::from(format!("/proc/{}/ns/net", network.far.id()));
    let sent = inside(&far, async move |_| {
        // SAFETY: plain system calls on values that live longer than they; the descriptor is owned at once.
        unsafe {
            let socket = OwnedFd::from_raw_fd(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0));
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_ifindex = libc::if_nametoindex(c"far0".as_ptr()) as i32;
            let size = std::mem::size_of_val(&address) as u32;
            let to = (&raw const address).cast();
            let count = libc::sendto(socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0, to, size);
            Ok(usize::try_from(count) == Ok(frame.len()))
        }
    });
    assert!(sent.await.unwrap());
}

/// Reads frames from the tap until one is `frame`; a virtio_net_hdr of 10 bytes precedes each.
fn arrives(tap: &OwnedFd, frame: &[u8]) -> bool {
    let mut file = File::from(tap.try_clone().unwrap());
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while std::time::Instant::now() < deadline {
        let mut poll = [nix::poll::PollFd::new(tap.as_fd(), nix::poll::PollFlags::POLLIN)];
        if nix::poll::poll(&mut poll, 1000u16).unwrap() > 0 {
            let mut buffer = [0; 2048];
            let count = file.read(&mut buffer).unwrap();
            if buffer[..count].ends_with(frame) {
                return true;
            }
        }
    }
    false
}

const FRAME: &[u8] = b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01\x88\xb5hello guest, this is a frame of an experimental type";

#[tokio::test]
async fn the_guest_takes_over_what_cni_made() {
    let network = network();
    let redirect = PortRedirect {
        protocol: PortProtocol::Tcp,
        port: 2222,
        guest_port: 22,
    };
    let attached = attach(&network.path, &[redirect]).await.unwrap();
    let said = attached.configuration;
    assert_eq!(attached.taps.len(), 1);
    assert_eq!(
        (attached.taps[0].mac, attached.taps[0].mtu),
        (Mac([2, 0, 0, 0, 0, 2]), 1450)
    );
    assert_eq!(said.interfaces.len(), 1);
    assert_eq!(said.interfaces[0].name, "eth0");
    assert_eq!(said.interfaces[0].addresses, ["10.9.0.2/24", "fd09::2/64"]);
    let routes: Vec<_> = said
        .routes
        .iter()
        .map(|route| (route.destination.as_str(), route.gateway.as_str(), route.metric))
        .collect();
    assert_eq!(routes, [("", "10.9.0.1", 0), ("10.10.0.0/16", "10.9.0.7", 5)]);
    assert_eq!(said.neighbours.len(), 1);
    assert_eq!(
        (said.neighbours[0].address.as_str(), said.neighbours[0].mac.as_str()),
        ("10.9.0.9", "02:00:00:00:00:09")
    );
    assert_eq!((said.redirects[0].port, said.redirects[0].guest_port), (2222, 22));
}

#[tokio::test]
async fn frames_reach_the_tap_until_it_is_detached() {
    let network = network();
    let attached = attach(&network.path, &[]).await.unwrap();
    send_from_far(&network, FRAME).await;
    assert!(arrives(&attached.taps[0].descriptor, FRAME));
    detach(&network.path).await.unwrap();
    detach(&network.path).await.unwrap();
    drop(attached);
    // The same network can be given to another machine.
    let again = attach(&network.path, &[]).await.unwrap();
    send_from_far(&network, FRAME).await;
    assert!(arrives(&again.taps[0].descriptor, FRAME));
}

#[tokio::test]
async fn a_namespace_that_is_gone_is_detached_already() {
    detach(Path::new("/nonexistent/netns")).await.unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    detach(file.path()).await.unwrap();
    let error = attach(file.path(), &[]).await.unwrap_err().to_string();
    assert!(error.contains("entering the pod's network namespace"), "{error}");
}
