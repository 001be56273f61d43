//! The test bed itself, with runc: what fails here is no fault of the runtime under test.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use kubeception_tests::cri::{RUNC, wait_for_log};
use kubeception_tests::http;
use kubeception_tests::image::{WEB, WEB_PAGE};
use kubeception_tests::leftovers::{Snapshot, expect_nothing_left};
use kubeception_tests::pod::{Container, Pod};
use kubeception_tests::stream::Session;
use libtest_mimic::Trial;

use crate::lab::{Alone, Lab, OwnPod, eventually};

pub(crate) fn trials(lab: &Arc<Lab>) -> Vec<Trial> {
    vec![
        lab.trial_alone("the test bed runs a pod with runc and leaves nothing", |lab| {
            pod_with_runc(lab)
        }),
    ]
}

fn pod_with_runc(lab: &mut Alone<'_>) -> Result<()> {
    ensure!(lab.cri.ready()?, "containerd says that it is not ready");
    // The first pod makes the bridge and the chains of the port translation, which stay.
    one_pod(lab)?;
    let before = Snapshot::take(&lab.node)?;
    one_pod(lab)?;
    expect_nothing_left(&lab.node, &before, Duration::from_secs(20))
}

fn one_pod(lab: &Alone<'_>) -> Result<()> {
    let bound = Duration::from_secs(20);
    let pod = Pod::new(lab.node.place(), "plain").host_port(8080, 17080);
    let own = OwnPod::run(lab.cri, pod, RUNC)?;
    let web = Container::new("web", WEB);
    let web_id = lab.cri.run(&own.id, &web, &own.pod)?;
    let talks = Container::script("talks", "echo out; echo err >&2; exit 3");
    let talks_id = lab.cri.run(&own.id, &talks, &own.pod)?;

    let exit = lab.cri.wait_exited(&talks_id, bound)?;
    ensure!(exit.exit_code == 3, "exit code {} instead of 3", exit.exit_code);
    wait_for_log(&talks.log(&own.pod), bound, |line| {
        line.stream == "stderr" && line.text == "err"
    })?;
    let said = lab.cri.exec(&web_id, &["sh", "-c", "echo $((6 * 7)); exit 5"])?;
    ensure!(
        (said.stdout.as_str(), said.exit_code) == ("42\n", 5),
        "the exec said {said:?}"
    );

    let url = lab.cri.exec_url(&web_id, &["sh"], true)?;
    let mut session = Session::open(&lab.node, &url)?;
    session.send("echo $((40 + 2)); exit 7\n")?;
    session.read_until("42", bound)?;
    let code = session.wait(bound)?;
    ensure!(code == 7, "the interactive exec ended with {code}");

    let address: IpAddr = lab.cri.pod_address(&own.id)?.parse()?;
    let loopback = IpAddr::from([127, 0, 0, 1]);
    let gateway = IpAddr::from([10, 88, 0, 1]);
    for address in [
        SocketAddr::new(address, 8080),
        SocketAddr::new(loopback, 17080),
        SocketAddr::new(gateway, 17080),
    ] {
        let page = eventually(bound, || http::get(&lab.node, address))?;
        ensure!(page == WEB_PAGE, "{address} answered {page:?}");
    }
    own.remove()
}
