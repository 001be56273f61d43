//! The demonstration: a pod that is a Container Linux machine, step by step, on a node of its own.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::cri::{COREOS_KVM, Cri, message, wait_for_log};
use kubeception_tests::http;
use kubeception_tests::image::WEB;
use kubeception_tests::node::{Handler, Node, Place, init};
use kubeception_tests::pod::{Container, Pod};

const NODE: &str = "demo";
const HOST_PORT: u16 = 18080;

/// What the pod brings: a file and a unit, in Ignition's words.
const IGNITION: &str = r#"{
  "ignition": { "version": "3.3.0" },
  "storage": { "files": [{
    "path": "/etc/motd", "overwrite": true, "mode": 420,
    "contents": { "source": "data:,This%20file%20was%20written%20by%20Ignition.%0A" }
  }] },
  "systemd": { "units": [{
    "name": "hello.service", "enabled": true,
    "contents": "[Unit]\nDescription=A unit that Ignition put there\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n"
  }] }
}"#;

/// Runs a pod with the runtime handler coreos-kvm on a private containerd, shows what it is, and removes everything.
#[derive(Debug, Parser)]
#[command(name = "devtool demo")]
struct Arguments {
    /// Leave everything running, and print the commands to look around
    #[arg(long)]
    keep: bool,
    /// End what an earlier --keep left running
    #[arg(long, conflicts_with = "keep")]
    end: bool,
    /// 1.6, 1.7 or 2.1
    #[arg(long, default_value = "2.1")]
    containerd: Containerd,
}

fn main() -> ExitCode {
    init::become_init_if_asked();
    let arguments = Arguments::parse();
    let outcome = if arguments.end { end() } else { demonstrate(&arguments) };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error:#}");
            eprintln!("  logs: {}", kubeception_tests::artifacts::logs().display());
            ExitCode::FAILURE
        }
    }
}

fn end() -> Result<()> {
    if Node::end(NODE)? {
        println!("The demonstration's node is ended and removed.");
    } else {
        println!("There is no demonstration to end.");
    }
    Ok(())
}

fn demonstrate(arguments: &Arguments) -> Result<()> {
    let steps = Steps { begun: Instant::now() };
    let node = steps.step(
        "a private containerd, with its own root, socket, network and CNI",
        || Node::start(NODE, arguments.containerd, &[Handler::standard()]),
    )?;
    steps.show(&format!(
        "containerd {}, root {}",
        node.version().version(),
        node.place().root().display()
    ));
    let cri = Cri::connect(&node)?;

    let pod = Pod::new(node.place(), "demo")
        .host_port(8080, HOST_PORT)
        .annotation("coreos-kvm.io/config-inline", IGNITION);
    let sandbox = steps.step("a pod with the runtime handler coreos-kvm: a machine boots", || {
        cri.run_pod(&pod, COREOS_KVM)
            .map_err(|error| anyhow::anyhow!("{}", message(&error)))
    })?;
    steps.show(&format!("sandbox {sandbox}"));

    show_machine(&steps, &node, &sandbox)?;
    let container = show_container(&steps, &node, &cri, &pod, &sandbox)?;

    if arguments.keep {
        print_commands(&node, &sandbox, &container);
        return node.keep();
    }
    steps.step("the pod is stopped and removed", || {
        cri.stop_pod(&sandbox)?;
        cri.remove_pod(&sandbox)
    })?;
    let base = node.place().base().to_owned();
    steps.step("the node is removed", || {
        drop(node);
        ensure!(!base.exists(), "{} is still there", base.display());
        Ok(())
    })?;
    println!("\nThat was a pod with a kernel and a Container Linux of its own. --keep leaves it running.");
    Ok(())
}

fn show_machine(steps: &Steps, node: &Node, sandbox: &str) -> Result<()> {
    let guest = |command: &[&str]| in_guest(node, sandbox, command);
    let (kernel, system) = steps.step("the guest's kernel and operating system", || {
        Ok((
            guest(&["uname", "-sr"])?,
            guest(&["sh", "-c", ". /etc/os-release; echo $PRETTY_NAME"])?,
        ))
    })?;
    steps.show(&format!("guest: {kernel}, {system}"));
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("this machine's kernel")?;
    steps.show(&format!("host:  Linux {}, {}", release.trim(), host_system()));

    let file = steps.step("a file that Ignition wrote: /etc/motd", || guest(&["cat", "/etc/motd"]))?;
    steps.show(&file);
    ensure!(file.contains("Ignition"), "Ignition's file is not in the guest");
    // The pod is ready as soon as containers can be run in it; systemd starts its other units meanwhile.
    let unit = steps.step("a systemd unit that Ignition added: hello.service", || {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let unit = guest(&[
                "systemctl",
                "show",
                "--property=Description,ActiveState",
                "hello.service",
            ])?;
            if unit.contains("ActiveState=active") {
                return Ok(unit);
            }
            ensure!(
                Instant::now() < deadline,
                "the unit that Ignition added does not start: {unit}"
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    })?;
    steps.show(&unit);
    Ok(())
}

/// Runs a web server in the pod, and answers its id.
fn show_container(steps: &Steps, node: &Node, cri: &Cri, pod: &Pod, sandbox: &str) -> Result<String> {
    let script = "echo hello from a container on $(uname -sr); exec httpd -f -p 8080 -h /www";
    let web = Container::new("web", WEB).command(&["sh", "-c", script]);
    let container = steps.step("a container in it, with a web server", || cri.run(sandbox, &web, pod))?;
    let bound = Duration::from_secs(20);
    let log = steps.step("the container's log", || {
        wait_for_log(&web.log(pod), bound, |line| line.text.starts_with("hello"))
    })?;
    steps.show(&log.text);
    let said = steps.step("an exec: ps", || cri.exec(&container, &["ps", "-o", "pid,args"]))?;
    steps.show(&said.stdout);
    ensure!(
        said.exit_code == 0,
        "the exec ended with {}: {}",
        said.exit_code,
        said.stderr
    );

    let address: IpAddr = cri.pod_address(sandbox)?.parse().context("the pod's address")?;
    let node_address = IpAddr::from([10, 88, 0, 1]);
    for (name, address) in [
        (
            "an HTTP reply through the pod's address",
            SocketAddr::new(address, 8080),
        ),
        (
            "an HTTP reply through a hostPort",
            SocketAddr::new(node_address, HOST_PORT),
        ),
    ] {
        let page = steps.step(name, || retry(bound, || http::get(node, address)))?;
        steps.show(&format!("http://{address}/ answers: {page}"));
    }
    Ok(container)
}

fn in_guest(node: &Node, sandbox: &str, command: &[&str]) -> Result<String> {
    let output = node
        .command("coreos-kvm")
        .arg("--config")
        .arg(Handler::standard().config_path(node.place()))
        .args(["exec", sandbox, "--"])
        .args(command)
        .output()
        .context("running coreos-kvm exec")?;
    ensure!(
        output.status.success(),
        "'{}' in the guest: {}: {}",
        command.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn host_system() -> String {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("an unnamed system").trim_matches('"').to_owned()
}

fn retry<T>(bound: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(100)),
            outcome => return outcome,
        }
    }
}

fn print_commands(node: &Node, sandbox: &str, container: &str) {
    let program = std::env::current_exe().unwrap_or_default();
    let shell = program.with_file_name("kubeception-node");
    let place: &Place = node.place();
    println!(
        "
It keeps running. To look around, a shell on the node:
  sudo {shell} shell {NODE}
and in it:
  ctr containers ls
  ctr task exec -t --exec-id look {container} sh
  coreos-kvm --config {config} exec {sandbox} -- systemctl status
  crictl pods                                        (where crictl is installed)
  curl http://10.88.0.1:{HOST_PORT}/
containerd's socket, as seen from outside: {socket}
To end it:
  sudo ./devtool demo --end",
        shell = shell.display(),
        config = Handler::standard().config_path(place).display(),
        socket = place.socket().display(),
    );
}

/// Steps with a line each: when it began, what it is, how long it took.
struct Steps {
    begun: Instant,
}

impl Steps {
    fn step<T>(&self, name: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        print!("[{:6.1} s] {name} ... ", self.begun.elapsed().as_secs_f32());
        // A line that cannot be shown is no reason to stop.
        let _ = std::io::stdout().flush();
        let begun = Instant::now();
        let outcome = run();
        let took = begun.elapsed().as_secs_f32();
        match outcome {
            Ok(value) => {
                println!("{took:.1} s");
                Ok(value)
            }
            Err(error) => {
                println!("failed after {took:.1} s");
                Err(error.context(format!("the step \"{name}\" failed")))
            }
        }
    }

    fn show(&self, evidence: &str) {
        for line in evidence.trim_end().lines() {
            println!("             {line}");
        }
    }
}
