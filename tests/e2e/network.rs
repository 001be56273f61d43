//! The pod's network: its address, its ports, the way out.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::wait_for_log;
use kubeception_tests::http;
use kubeception_tests::image::{WEB, WEB_PAGE};
use kubeception_tests::pod::Container;
use kubeception_tests::stream;
use libtest_mimic::Trial;

use crate::lab::{Lab, Together, eventually};

/// That nobody serves a port is told at once: this is what a busy node may take for it.
const REFUSED: Duration = Duration::from_secs(5);
const BOUND: Duration = Duration::from_secs(30);

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial("a web server answers at the pod's addresses and at its hostPort", web),
        lab.trial("a container reaches the node", outward),
        lab.trial("a port that listens on loopback alone is forwarded", forwarded),
    ]
}

fn web(lab: &Together<'_>) -> Result<()> {
    let _web = lab.running(&Container::new("web", WEB))?;
    let network = lab
        .pod_status(&lab.shared()?.id)?
        .network
        .context("the pod has no network")?;
    let further = network.additional_ips.into_iter().map(|address| address.ip);
    let addresses: Vec<IpAddr> = std::iter::once(network.ip)
        .chain(further)
        .map(|address| address.parse())
        .collect::<Result<_, _>>()?;
    ensure!(
        addresses.iter().any(IpAddr::is_ipv4) && addresses.iter().any(IpAddr::is_ipv6),
        "it has {addresses:?}"
    );

    let gateway = IpAddr::from([10, 88, 0, 1]);
    let by_pod = addresses.into_iter().map(|address| SocketAddr::new(address, 8080));
    let by_host = [gateway, IpAddr::from([127, 0, 0, 1])].map(|address| SocketAddr::new(address, 18080));
    for address in by_pod.chain(by_host) {
        let page = eventually(BOUND, || http::get(&lab.node, address))?;
        ensure!(page == WEB_PAGE, "{address} answered {page:?}");
    }

    // The shim has them from containerd, for they are in no annotation.
    let log = std::fs::read_to_string(lab.node.log()).context("reading containerd's log")?;
    ensure!(
        log.contains(r#"ports="18080->8080/tcp""#),
        "the shim does not know the pod's ports"
    );

    // The containers of a pod share the guest's loopback.
    let asks = lab.running(&Container::script("asks", "wget -q -O - http://127.0.0.1:8080/"))?;
    wait_for_log(&asks.log, BOUND, |line| line.text == WEB_PAGE.trim())?;
    Ok(())
}

fn forwarded(lab: &Together<'_>) -> Result<()> {
    let ask = |port| {
        let url = lab.port_forward_url(&lab.shared()?.id, port)?;
        stream::ask_port(&lab.node, &url, port, "GET / HTTP/1.0\r\n\r\n")
    };
    for (name, address) in [("v4", "127.0.0.1:8091"), ("v6", "[::1]:8092")] {
        let container = Container::new(&format!("web-{name}"), WEB);
        let _web = lab.running(&container.command(&["httpd", "-f", "-p", address, "-h", "/www"]))?;
        let port = address.rsplit(':').next().unwrap_or_default().parse()?;
        let page = eventually(BOUND, || {
            let page = ask(port)?;
            ensure!(page.ends_with(WEB_PAGE), "{address} answered {page:?}");
            Ok(page)
        })?;
        ensure!(page.contains(" 200 "), "{page:?}");
    }
    let begun = Instant::now();
    let nobody = ask(8093);
    ensure!(
        !nobody.as_ref().is_ok_and(|said| !said.is_empty()),
        "a port without a server says {nobody:?}"
    );
    let took = begun.elapsed();
    ensure!(took < REFUSED, "that nobody serves a port was told after {took:?}");
    Ok(())
}

fn outward(lab: &Together<'_>) -> Result<()> {
    let listener = lab
        .node
        .in_network(|| TcpListener::bind(("10.88.0.1", 0)))?
        .context("listening on the node")?;
    listener.set_nonblocking(true)?;
    let port = listener.local_addr()?.port();
    let container = lab.running(&Container::script("asks-node", &format!("nc 10.88.0.1 {port}")))?;
    let deadline = Instant::now() + BOUND;
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                ensure!(
                    Instant::now() < deadline,
                    "nobody came; {:?}",
                    lab.status(&container.id)?.state()
                );
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(error) => return Err(error).context("waiting for the container"),
        }
    };
    stream.write_all(b"greetings from the node\n")?;
    drop(stream);
    wait_for_log(&container.log, BOUND, |line| line.text == "greetings from the node")?;
    Ok(())
}
