//! Clones in a network like that of pods: what they have of it, and that packets come through.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::{
    fs::File,
    io::Read,
    net::UdpSocket,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use common::{
    Place,
    clones::{assert_clone, cloneable, end, eventually, text, with_template},
};
use coreos_kvm_launcher::{
    config::CloneModeChoice,
    machine::{Machine, Network},
    vm::Vm,
};
use nix::sched::{CloneFlags, setns};

/// A network namespace, which ends with it.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let mut holder = Command::new("unshare")
            .args(["--net", "sh", "-c", "echo; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        Self(holder)
    }

    fn path(&self) -> PathBuf {
        format!("/proc/{}/ns/net", self.0.id()).into()
    }

    /// Sends back what comes to the address by datagrams, one of them.
    fn echo(&self, address: &'static str) -> JoinHandle<usize> {
        let namespace = File::open(self.path()).unwrap();
        let (bound, is_bound) = mpsc::channel();
        let echo = std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            let socket = UdpSocket::bind(address).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            bound.send(()).unwrap();
            let mut datagram = [0; 10_000];
            let (length, sender) = socket.recv_from(&mut datagram).unwrap();
            socket.send_to(&datagram[..length], sender).unwrap();
            length
        });
        is_bound.recv().unwrap();
        echo
    }

    fn run(&self, script: &str) {
        let mut inside = Command::new("nsenter");
        inside.arg(format!("--net={}", self.path().display()));
        let status = inside.args(["sh", "-ec", script]).status();
        assert!(status.unwrap().success(), "{script}");
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// One pod's network, with two interfaces of which the first takes large packets, and the namespace with their far ends.
fn network() -> (Namespace, Namespace) {
    let (pod, far) = (Namespace::new(), Namespace::new());
    for (number, (name, mtu)) in [("eth0", 9000), ("net1", 1400)].into_iter().enumerate() {
        pod.run(&format!(
            "ip link add {name} address 02:00:00:00:{number}:02 mtu {mtu} type veth peer name far{number} \
               address 02:00:00:00:{number}:01 mtu {mtu}
             ip link set far{number} netns {}
             ip link set {name} up
             ip address add 10.9.{number}.2/24 dev {name}",
            far.0.id()
        ));
        far.run(&format!(
            "ip link set far{number} up
             ip address add 10.9.{number}.1/24 dev far{number}"
        ));
    }
    (pod, far)
}

async fn clone_in(place: &Place, pod: &Namespace, name: &str) -> (Machine, Vm) {
    let machine = Machine {
        network: Network::Tap {
            netns: pod.path(),
            redirects: Vec::new(),
        },
        ..cloneable(place, name)
    };
    with_template(place, &machine).await;
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    assert_clone(place, &vm);
    (machine, vm)
}

#[rstest::rstest]
#[case::copy_on_write(CloneModeChoice::CopyOnWrite)]
#[case::copy(CloneModeChoice::Copy)]
#[tokio::test]
async fn a_clone_has_the_interfaces_of_its_pod_and_none_of_its_template(#[case] mode: CloneModeChoice) {
    let (pod, far) = network();
    let place = Place::alone(mode).await;
    let (machine, vm) = clone_in(&place, &pod, "networked").await;

    assert_eq!(text(&vm, "ls -x /sys/class/net").await, "eth0  lo  net1");
    for (number, (name, mtu)) in [("eth0", 9000), ("net1", 1400)].into_iter().enumerate() {
        let link = text(&vm, &format!("ip -details link show {name}")).await;
        let says = |what: &str| assert!(link.contains(what), "{what}: {link}");
        says(&format!("mtu {mtu} "));
        // One that differs from what the card says would be named beside it, as permaddr.
        says(&format!("link/ether 02:00:00:00:0{number}:02 "));
        assert!(!link.contains("permaddr"), "{link}");
        // Who is at the other end is asked and answered by packets.
        text(&vm, &format!("bash -c 'echo >/dev/udp/10.9.{number}.1/9'")).await;
        let neighbour = format!("ip neigh show 10.9.{number}.1 dev {name} | grep -o 'lladdr [^ ]*'");
        let address = eventually(&vm, &neighbour).await;
        assert_eq!(address, format!("lladdr 02:00:00:00:0{number}:01"));
    }
    // One packet, for whoever sends datagrams sends none in pieces that the interface takes whole.
    let echo = far.echo("10.9.0.1:7");
    let script = "bash -c 'exec 3<>/dev/udp/10.9.0.1/7; dd if=/dev/zero bs=8900 count=1 status=none >&3; \
                  dd bs=10000 count=1 status=none <&3 | wc -c'";
    assert_eq!(text(&vm, script).await, "8900");
    assert_eq!(echo.join().unwrap(), 8900);
    end(&place, vec![vm], &[machine]).await;
}

#[tokio::test]
async fn a_clones_card_can_be_taken_from_its_driver_and_given_back() {
    let (pod, _far) = network();
    let place = Place::alone(CloneModeChoice::CopyOnWrite).await;
    let (machine, vm) = clone_in(&place, &pod, "unbound").await;

    let script = "cd /sys/class/net/eth0/device/driver && card=$(ls -d virtio* | head -n 1) && \
                  echo $card >unbind && test ! -e /sys/class/net/eth0 && echo $card >bind && cat /sys/class/net/eth*/address";
    assert_eq!(text(&vm, script).await, "02:00:00:00:00:02");
    end(&place, vec![vm], &[machine]).await;
}
