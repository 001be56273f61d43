//! `coreos-kvm run`, a machine without Kubernetes, in a network namespace of its own: by ssh through a forward, with a disk
//! that stays, with a long configuration; and all that is refused before QEMU starts. Six boots in all.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use common::Place;
use coreos_kvm_launcher::state::StateDir;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rstest::rstest;
use serde_json::json;

/// What a boot may take, on a busy machine without KVM.
const READY: Duration = Duration::from_secs(120);
/// What an order to end may take: the grace time, and a moment to tidy up.
const END: Duration = Duration::from_secs(35);
/// What a description that cannot be may take to be refused.
const REFUSAL: Duration = Duration::from_secs(10);

const VARIABLES: [&str; 7] = [
    "VM_NAME",
    "VM_MEMORY",
    "VM_DISK_SIZE",
    "CONFIG_FILE",
    "IGNITION_CONFIG_FILE",
    "CLOUD_CONFIG_FILE",
    "HOSTFWD",
];

/// A place with the files that the command reads.
struct Desk {
    place: Place,
    folder: tempfile::TempDir,
}

impl Desk {
    async fn new() -> Self {
        let place = Place::new().await;
        let folder = tempfile::tempdir().unwrap();
        let desk = Self { place, folder };
        desk.configure("");
        desk
    }

    /// Writes the configuration, in which `more` comes first.
    fn configure(&self, more: &str) {
        let config = &self.place.config;
        let keys = [
            ("guests_dir", &config.guests_dir),
            ("agent_disk", &config.agent_disk),
            ("state_dir", &config.state_dir),
            ("virtiofsd", &config.virtiofsd),
            ("vhost_device_vsock", &config.vhost_device_vsock),
        ];
        let mut text = more.to_owned();
        for (key, path) in keys {
            if !more.starts_with(key) {
                text += &format!("{key} = {path:?}\n");
            }
        }
        self.file("config.toml", &text);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// `coreos-kvm` alone in a network namespace that ends with it, and in no environment but the one that is given.
    fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"])
            .arg(env!("CARGO_BIN_EXE_coreos-kvm"))
            .arg("--config")
            .arg(self.path("config.toml"))
            .arg(subcommand);
        for variable in VARIABLES {
            command.env_remove(variable);
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs a command in the guest and answers what it printed.
    fn exec(&self, machine: &str, script: &str) -> String {
        let mut command = self.command("exec");
        let output = command.args([machine, "--", "sh", "-c", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn assert_nothing_is_left(&self, machine: &str) {
        self.place.assert_nothing_is_left(&self.place.machine(machine));
    }
}

/// A running `coreos-kvm run`. Dropped in a test that failed, it is ended, and QEMU with it.
struct Running {
    child: Child,
    ready: Duration,
    console: Receiver<Vec<u8>>,
}

impl Running {
    /// Starts it and waits until it says that the guest is up.
    fn start(mut command: Command) -> Self {
        let begin = Instant::now();
        let mut child = command.spawn().unwrap();
        let (mut stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (printed, console) = channel();
        std::thread::spawn(move || {
            let mut text = Vec::new();
            stdout.read_to_end(&mut text).unwrap();
            printed.send(text)
        });
        let (say, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // Nobody listens any more once the machine is up.
                let _ = say.send(line);
            }
        });
        let mut running = Self {
            child,
            ready: Duration::ZERO,
            console,
        };
        let mut before = Vec::new();
        loop {
            let Ok(line) = said.recv_timeout(READY.saturating_sub(begin.elapsed())) else {
                panic!("it does not come up: {before:?}");
            };
            if line.starts_with('{') {
                let line: serde_json::Value = serde_json::from_str(&line).unwrap();
                running.ready = Duration::from_secs_f64(line["ready_s"].as_f64().unwrap());
                return running;
            }
            before.push(line);
        }
    }

    /// Ends it by SIGTERM. Answers how it ended, and what the guest printed.
    fn end(mut self) -> (ExitStatus, String) {
        kill(self.pid(), Signal::SIGTERM).unwrap();
        let status = wait(&mut self.child, END);
        let console = self.console.recv_timeout(REFUSAL).unwrap();
        (status, String::from_utf8_lossy(&console).into_owned())
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}

fn wait(child: &mut Child, at_most: Duration) -> ExitStatus {
    let deadline = Instant::now() + at_most;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "it has not ended within {at_most:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

#[tokio::test]
async fn a_user_logs_in_by_ssh_through_a_forward_and_sigterm_powers_the_machine_off() {
    let desk = Desk::new().await;
    let key = desk.path("key");
    run(Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-f"])
        .arg(&key));
    let public = fs::read_to_string(key.with_extension("pub")).unwrap();
    // A Container Linux Config.
    let config = format!(
        "passwd:\n  users:\n    - name: core\n      ssh_authorized_keys:\n        - {}\n",
        public.trim()
    );
    let mut command = desk.command("run");
    command
        .env("VM_NAME", "ssh")
        .env("VM_MEMORY", "1G")
        .env("VM_DISK_SIZE", "3G")
        .env("HOSTFWD", "hostfwd=tcp::2222-:22")
        .env("CONFIG_FILE", desk.file("core.yaml", &config));
    let machine = Running::start(command);
    assert_eq!(desk.exec("ssh", "systemctl is-system-running --wait"), "running\n");

    let script = "id -un; df -B1G --output=target,size / /var; cat /etc/resolv.conf; ip -4 -o addr show eth0; ip route";
    let output = run(Command::new("nsenter")
        .arg(format!("--net=/proc/{}/ns/net", machine.pid()))
        .args([
            "ssh",
            "-p",
            "2222",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "BatchMode=yes",
        ])
        .args(["-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=30", "-i"])
        .arg(&key)
        .args(["core@127.0.0.1", script]));
    let said = String::from_utf8(output.stdout).unwrap();
    let words: Vec<&str> = said.split_whitespace().collect();
    let said = words.join(" ");
    for expected in [
        "core Mounted on 1G-blocks / 3 /var 3 ",
        "nameserver 10.0.2.3",
        "10.0.2.15/24",
        "default via 10.0.2.2 dev eth0",
    ] {
        assert!(said.contains(expected), "{expected} is not in: {said}");
    }

    let (status, console) = machine.end();
    assert_eq!(status.code(), Some(0), "{console}");
    assert!(console.contains("agent serves"), "{console}");
    desk.assert_nothing_is_left("ssh");
}

#[tokio::test]
async fn a_disk_that_stays_is_configured_once_and_keeps_what_was_written() {
    let desk = Desk::new().await;
    let file = |text: &str| {
        let file = json!({ "path": "/etc/configured", "contents": { "source": format!("data:,{text}") } });
        json!({ "ignition": { "version": "3.3.0" }, "storage": { "files": [file] } }).to_string()
    };
    let command = |config: &str| {
        let mut command = desk.command("run");
        command
            .args([
                "--name",
                "kept",
                "--memory",
                "512M",
                "--disk-size",
                "256M",
                "--no-network",
                "--disk",
            ])
            .arg(desk.path("disk.img"))
            .arg("--ignition-config-file")
            .arg(desk.file("config.ign", config));
        command
    };
    let look = "cat /etc/configured /etc/machine-id; test ! -e /run/ignition.json || echo first boot";

    // A first boot that fails has configured nothing, and the next one is the first.
    let group = json!({ "name": "core", "groups": ["nonexistent"] });
    let wrong = json!({ "ignition": { "version": "3.3.0" }, "passwd": { "users": [group] } });
    let output = command(&wrong.to_string()).output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("Ignition's stage files failed"), "{error}");

    let machine = Running::start(command(&file("once")));
    let first = desk.exec("kept", look);
    assert!(first.starts_with("once") && first.ends_with("first boot\n"), "{first}");
    desk.exec("kept", "echo here >/etc/written && echo there >/var/lib/written");
    assert_eq!(machine.end().0.code(), Some(0));

    let machine = Running::start(command(&file("twice")));
    let second = desk.exec("kept", look);
    assert_eq!(format!("{second}first boot\n"), first, "the same machine as before");
    assert_eq!(desk.exec("kept", "cat /etc/written /var/lib/written"), "here\nthere\n");
    assert_eq!(desk.exec("kept", "systemctl is-system-running --wait"), "running\n");
    let (status, console) = machine.end();
    assert_eq!(status.code(), Some(0), "{console}");
    assert!(
        console.contains("the disk was configured at its first boot"),
        "{console}"
    );
    desk.assert_nothing_is_left("kept");
}

#[tokio::test]
async fn a_disk_of_somebody_else_is_left_alone() {
    let desk = Desk::new().await;
    let image = desk.path("mine.img");
    fs::File::create(&image).unwrap().set_len(256 << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-L", "photographs"]).arg(&image));
    let before = fs::read(&image).unwrap();
    let mut command = desk.command("run");
    command
        .args(["--name", "mine", "--memory", "512M", "--no-network", "--disk"])
        .arg(&image);
    let output = command.output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{error}");
    assert!(
        error.contains("neither blank nor one of this guest (blkid finds: photographs ext4)"),
        "{error}"
    );
    assert!(fs::read(&image).unwrap() == before, "it was written to");
    desk.assert_nothing_is_left("mine");
}

#[tokio::test]
async fn a_configuration_of_a_mebibyte_arrives_and_is_not_left_lying_about() {
    let desk = Desk::new().await;
    let line = "0123456789abcde\n";
    let content = line.repeat((1024 * 1024 - 4096) / (line.len() + 2));
    let source = format!("data:,{}", content.replace('\n', "%0A"));
    let file = json!({ "path": "/etc/long", "mode": 0o600, "contents": { "source": source } });
    let config = json!({ "ignition": { "version": "3.3.0" }, "storage": { "files": [file] } });
    let mut command = desk.command("run");
    command
        .args([
            "--name",
            "long",
            "--memory",
            "512M",
            "--no-disk",
            "--no-network",
            "--ignition",
        ])
        .arg(desk.file("long.ign", &config.to_string()));
    let machine = Running::start(command);

    let sum = desk.exec("long", "wc -c </etc/long; tail -n 1 /etc/long");
    assert_eq!(sum, format!("{}\n{line}", content.len()));
    let disks = desk.exec(
        "long",
        "cat /sys/block/vd*/serial; ls /sys/firmware/qemu_fw_cfg/by_name/opt 2>/dev/null || true",
    );
    assert_eq!(disks, "coreos-kvm-agent");
    // Compared with the machine of the other tests: a second at most on an idle host, told here for whoever looks.
    eprintln!("ready after {:?}", machine.ready);
    assert_eq!(machine.end().0.code(), Some(0));
    desk.assert_nothing_is_left("long");
}

#[rstest]
#[case::no_memory(&[("VM_MEMORY", "0")], "more than nothing")]
#[case::negative_memory(&[("VM_MEMORY", "-1")], "\"-1\" is no size")]
#[case::endless_memory(&[("VM_MEMORY", "1e99")], "\"1e99\" is no size")]
#[case::little_memory(&[("VM_MEMORY", "64M")], "64 MiB of memory are too little: the guest \"reference\" needs at least 192 MiB")]
#[case::huge_memory(&[("VM_MEMORY", "999T")], "1047527424 MiB of memory are too much: at most 16777216 MiB (16 TiB)")]
#[case::no_disk(&[("VM_DISK_SIZE", "0")], "more than nothing")]
#[case::negative_disk(&[("VM_DISK_SIZE", "-1")], "\"-1\" is no size")]
#[case::endless_disk(&[("VM_DISK_SIZE", "1e99")], "\"1e99\" is no size")]
#[case::small_disk(&[("VM_DISK_SIZE", "10M")], "a disk of 10M is too small: the guest \"reference\" needs at least ")]
#[case::huge_disk(&[("VM_DISK_SIZE", "17T")], "a disk of 17T is too large")]
#[case::no_forward(&[("HOSTFWD", "2222:22")], "\"2222:22\" is no forward")]
#[case::a_forward_of_none(&[("HOSTFWD", "hostfwd=tcp::2222-:22,hostfwd=tcp::x-:80")], "\"hostfwd=tcp::x-:80\" is no forward")]
#[case::the_same_port(&[("HOSTFWD", "tcp::2222-:22,tcp::2222-:80")], "port 2222 of the host is to be forwarded twice")]
#[case::a_port_of_root(&[("HOSTFWD", "tcp::22-:22")], "net.ipv4.ip_unprivileged_port_start")]
#[case::a_strange_address(&[("HOSTFWD", "tcp:192.0.2.1:2222-:22")], "the host has no address 192.0.2.1")]
#[case::two_configurations(&[("CONFIG_FILE", "/a.yaml"), ("IGNITION_CONFIG_FILE", "/b.ign")], "two are given: CONFIG_FILE (--config-file) is /a.yaml")]
#[case::no_configuration(&[("CONFIG_FILE", "/nonexistent.yaml")], "the configuration of CONFIG_FILE (--config-file): reading /nonexistent.yaml: ")]
#[case::an_endless_configuration(&[("CONFIG_FILE", "/dev/zero")], "/dev/zero has more than 16777216 bytes")]
#[case::no_name(&[("VM_NAME", "a b")], "cannot name a machine")]
#[tokio::test]
async fn what_cannot_be_is_refused_in_a_sentence_before_qemu_starts(
    #[case] environment: &[(&str, &str)],
    #[case] expected: &str,
) {
    let desk = Desk::new().await;
    let mut command = desk.command("run");
    command.envs(environment.iter().copied());
    refused(&desk, command, expected);
}

#[rstest]
#[case(
    "CONFIG_FILE",
    "#cloud-config\nhostname: x\n",
    "which reads as cloud-config: give it as CLOUD_CONFIG_FILE (--cloud-config-file)"
)]
#[case(
    "CONFIG_FILE",
    "{\"ignition\":{\"version\":\"3.3.0\"}}",
    "which reads as ignition: give it as IGNITION_CONFIG_FILE (--ignition-config-file)"
)]
#[case(
    "IGNITION_CONFIG_FILE",
    "variant: fcos\nversion: 1.5.0\n",
    "which reads as butane: give it as CONFIG_FILE (--config-file)"
)]
#[case(
    "IGNITION_CONFIG_FILE",
    "#!/bin/sh\n",
    "which reads as script: give it as CLOUD_CONFIG_FILE (--cloud-config-file)"
)]
#[case(
    "CLOUD_CONFIG_FILE",
    "passwd: {}\n",
    "which reads as container-linux-config: give it as CONFIG_FILE (--config-file)"
)]
#[tokio::test]
async fn a_configuration_in_another_language_than_its_variable_says_is_refused(
    #[case] variable: &str,
    #[case] text: &str,
    #[case] expected: &str,
) {
    let desk = Desk::new().await;
    let mut command = desk.command("run");
    command.env(variable, desk.file("config", text));
    refused(&desk, command, expected);
}

#[tokio::test]
async fn a_variable_that_is_set_to_nothing_means_the_default() {
    let desk = Desk::new().await;
    let mut command = desk.command("run");
    // Everything is right but the last, which is looked at after all the others.
    command.envs(VARIABLES.map(|variable| (variable, "")));
    command.arg("--disk").arg(desk.path(""));
    refused(&desk, command, "is no disk image");
}

#[tokio::test]
async fn a_file_that_is_too_small_for_the_guest_is_refused_as_its_disk() {
    let desk = Desk::new().await;
    let mut command = desk.command("run");
    command.args(["--no-network", "--disk"]);
    command.arg(desk.file("disk.img", &"\0".repeat(512)));
    refused(
        &desk,
        command,
        "disk.img has 512 bytes, too small for the guest, which needs at least ",
    );
}

/// The second time it is opened as it is; what comes after the disk is broken here.
#[tokio::test]
async fn a_disk_of_odd_size_is_made_of_whole_sectors() {
    let desk = Desk::new().await;
    desk.configure("agent_disk = \"/nonexistent\"\n");
    for _ in 0..2 {
        let mut command = desk.command("run");
        command.args(["--no-network", "--disk-size", "1000000001", "--disk"]);
        command.arg(desk.path("disk.img"));
        refused(&desk, command, "the agent's disk /nonexistent is missing");
        assert_eq!(fs::metadata(desk.path("disk.img")).unwrap().len(), 1_000_000_512);
    }
}

#[tokio::test]
async fn a_start_that_is_interrupted_early_leaves_another_machine_of_that_name_alone() {
    let desk = Desk::new().await;
    // QEMU is asked for its version before anything is made.
    let (asked, qemu) = (desk.path("asked"), desk.path("qemu"));
    let script = format!("#!/bin/sh\n: >'{}'\nexec sleep 60\n", asked.display());
    common::script(&qemu, &script);
    desk.configure(&format!("qemu = {qemu:?}\n"));
    let theirs = StateDir::create(&desk.place.config.state_dir, &"theirs".parse().unwrap()).unwrap();

    let mut child = desk
        .command("run")
        .args(["--name", "theirs", "--no-network"])
        .spawn()
        .unwrap();
    let deadline = Instant::now() + REFUSAL;
    while !asked.exists() {
        assert!(Instant::now() < deadline, "QEMU was not asked");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let status = wait(&mut child, REFUSAL);
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        status.code() == Some(1) && error.contains("interrupted before the machine was up"),
        "{error}"
    );
    assert!(theirs.path().exists(), "it was another's");
}

#[tokio::test]
async fn a_port_that_is_taken_is_refused_before_qemu_starts() {
    let desk = Desk::new().await;
    // In the namespace of the test itself: what listens there is the test's.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_coreos-kvm"));
    command.arg("--config").arg(desk.path("config.toml")).args([
        "run",
        "--hostfwd",
        &format!("tcp:127.0.0.1:{port}-:22"),
    ]);
    refused(&desk, command, &format!("the host's tcp port {port} of "));
}

fn refused(desk: &Desk, mut command: Command, expected: &str) {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = wait(&mut child, REFUSAL);
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!status.success() && error.contains(expected), "{status}: {error}");
    assert_eq!(output.stdout, b"", "nothing has booted");
    let state = fs::read_dir(&desk.place.config.state_dir);
    let machines: Vec<_> = state
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    assert!(
        machines.iter().all(|name| name.to_string_lossy().starts_with('.')),
        "{machines:?}"
    );
}
