//! Clones of a template of the reference guest: that each is a machine of its own, and what happens when one cannot be.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{FileExt, PermissionsExt},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use common::{
    Place,
    clones::{LATER, assert_clone, cloneable, end, eventually, store, text, with_template},
};
use coreos_kvm_launcher::{
    config::{CloneModeChoice, Config, Templates},
    machine::{Growth, Machine},
    state::Origin,
    vm::{self, Vm, VmError},
};
use coreos_kvm_proto::{
    SHARED_TAG,
    agent::{ConfigureSandboxRequest, IdMapping, UserNamespace},
};
use futures::future::join_all;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Clones that come up at the same time in the tests that start many.
const AT_ONCE: usize = 4;

/// Why the machine is no clone.
fn why(vm: &Vm) -> String {
    match vm.info().record.origin {
        Some(Origin::Boot { why }) => why,
        other => panic!("the machine did not boot: {other:?}"),
    }
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

/// What must not be the same in two clones.
async fn identity(vm: &Vm) -> Vec<String> {
    // Before anything else, for whatever a guest makes of random bytes would be the same with them.
    let random = text(vm, "head -c 16 /dev/urandom | od -An -tx1").await;
    let before = now();
    let clock: f64 = text(vm, "date +%s.%N").await.parse().unwrap();
    let after = now();
    let slack = Duration::from_millis(50);
    let clock = Duration::from_secs_f64(clock);
    assert!(
        before - slack < clock && clock < after + slack,
        "the clone's clock is {clock:?}, the host's between {before:?} and {after:?}"
    );

    let boot_id = text(vm, "cat /proc/sys/kernel/random/boot_id").await;
    let machine_id = text(vm, "cat /etc/machine-id").await;
    let journal = format!("/run/log/journal/{machine_id}/system.journal");
    let header = format!("journalctl --header --file {journal} | grep -E '^(File|Machine|Boot|Sequential).* ID:'");
    let header = eventually(vm, &header).await;
    assert!(header.contains(&machine_id), "{header}");
    assert!(header.contains(&boot_id.replace('-', "")), "{header}");
    let file_id = header
        .lines()
        .find(|line| line.starts_with("File ID:"))
        .unwrap()
        .to_owned();
    let sequence_id = header
        .lines()
        .find(|line| line.starts_with("Sequential"))
        .unwrap()
        .to_owned();
    // What PID 1 was told when the template booted.
    let unit = "[Service]\nType=oneshot\nExecStart=/bin/sh -c \"echo %b %m >/run/seen\"";
    let start = format!("echo '{unit}' >/run/systemd/system/seen.service; systemctl start seen; cat /run/seen");
    let seen = text(vm, &start).await;
    assert_eq!(seen, format!("{} {machine_id}", boot_id.replace('-', "")));
    vec![random, boot_id, machine_id, file_id, sequence_id]
}

#[rstest::rstest]
#[case::copy_on_write(CloneModeChoice::CopyOnWrite)]
#[case::copy(CloneModeChoice::Copy)]
#[tokio::test]
async fn no_two_of_twenty_clones_share_an_identity_and_all_know_the_time(#[case] mode: CloneModeChoice) {
    let place = Place::alone(mode).await;
    let folder = with_template(&place, &cloneable(&place, "any")).await;
    let age = fs::metadata(&folder).unwrap().modified().unwrap().elapsed().unwrap();
    // A clone whose clock was not set would be behind by that.
    assert!(age > Duration::from_millis(200), "{age:?}");
    let mut all = HashSet::new();
    for round in 0..20 / AT_ONCE {
        let machines: Vec<_> = (0..AT_ONCE)
            .map(|number| cloneable(&place, &format!("clone-{round}-{number}")))
            .collect();
        let starts = machines.iter().map(|machine| Vm::start(&place.config, machine.clone()));
        let vms: Vec<_> = join_all(starts).await.into_iter().map(Result::unwrap).collect();
        for vm in &vms {
            assert_clone(&place, vm);
            for id in identity(vm).await {
                assert!(all.insert(id.clone()), "{id} is not one clone's alone");
            }
            assert_eq!(text(vm, "ls /sys/class/net").await, "lo");
            let state = eventually(vm, "systemctl is-system-running").await;
            assert_eq!(state, "running");
        }
        end(&place, vms, &machines).await;
    }
    assert_eq!(all.len(), 100);
}

#[rstest::rstest]
#[case::copy_on_write(CloneModeChoice::CopyOnWrite)]
#[case::copy(CloneModeChoice::Copy)]
#[tokio::test]
async fn a_clone_goes_on_when_its_template_is_removed_and_ends_in_order(#[case] mode: CloneModeChoice) {
    let place = Place::of(mode).await;
    let machine = cloneable(&place, "orphan");
    let folder = with_template(&place, &machine).await;
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    assert_clone(&place, &vm);
    store(&place.config)
        .remove(folder.file_name().unwrap().to_str().unwrap())
        .unwrap();
    assert!(!folder.exists());
    assert_eq!(text(&vm, "echo alive").await, "alive");
    // What waited for the clone waits once.
    eventually(&vm, "systemctl is-active systemd-journald systemd-udevd").await;
    let restarted = text(
        &vm,
        "systemctl restart systemd-journald systemd-udevd && echo restarted",
    )
    .await;
    assert_eq!(restarted, "restarted");
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    vm.shutdown(Duration::from_secs(30)).await.unwrap();
    let exit = vm.exited().await;
    assert_eq!((exit.reason.as_str(), exit.orderly), ("the guest powered off", true));
    place.assert_nothing_is_left(&machine);
}

#[rstest::rstest]
#[case::copy_on_write(CloneModeChoice::CopyOnWrite)]
#[case::copy(CloneModeChoice::Copy)]
#[tokio::test]
async fn one_bit_of_a_templates_memory_that_is_wrong_has_the_machine_boot(#[case] mode: CloneModeChoice) {
    let place = Place::of(mode).await;
    let machine = cloneable(&place, "damaged");
    let folder = with_template(&place, &machine).await;
    let memory = fs::File::options()
        .read(true)
        .write(true)
        .open(folder.join("memory"))
        .unwrap();
    let (mut byte, place_of_it) = ([0], memory.metadata().unwrap().len() - 12345);
    memory.read_exact_at(&mut byte, place_of_it).unwrap();
    memory.write_all_at(&[byte[0] ^ 0x10], place_of_it).unwrap();

    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let why = why(&vm);
    assert!(
        why.contains("is damaged: its memory is not the one that was saved"),
        "{why}"
    );
    assert!(!folder.exists(), "the damaged template is kept");
    assert_eq!(text(&vm, "echo alive").await, "alive");
    let key = folder.file_name().unwrap().to_str().unwrap();
    assert_eq!(store(&place.config).uses(key).failures, 1);
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_template_that_others_could_change_is_neither_used_nor_removed() {
    let place = Place::new().await;
    let machine = cloneable(&place, "open");
    let folder = with_template(&place, &machine).await;
    fs::set_permissions(folder.join("state"), fs::Permissions::from_mode(0o620)).unwrap();
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let why = why(&vm);
    assert!(why.contains("is not this user's alone (owner 0, mode 620)"), "{why}");
    assert!(folder.join("state").exists());
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_qemu_that_refuses_a_template_is_asked_three_times_and_then_left_alone() {
    let mut place = Place::new().await;
    let wrapper = place.config.state_dir.with_file_name("qemu");
    let script = "#!/bin/sh\ncase \"$*\" in *-incoming*) echo 'no such state' >&2; exit 1;; esac\nexec qemu-system-x86_64 \"$@\"\n";
    common::script(&wrapper, script);
    let root = wrapper.parent().unwrap();
    fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
    place.config.qemu = wrapper;
    let machine = Machine {
        // The boot that follows need not come up.
        boot_timeout: Duration::from_secs(60),
        ..cloneable(&place, "refused")
    };
    let folder = {
        let key = vm::template_key(&place.config, &machine).await.unwrap();
        let all = store(&place.config);
        let right = all.try_lock(&key).unwrap().unwrap();
        vm::make_template(&place.config, &machine, &right, std::future::pending())
            .await
            .unwrap();
        place.config.template_dir.join(key.as_str())
    };
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let first = why(&vm);
    assert!(
        first.contains("QEMU failed with exit code 1; it said: no such state"),
        "{first}"
    );
    vm.shutdown(Duration::ZERO).await.unwrap();

    let impatient = Machine {
        boot_timeout: Duration::from_secs(1),
        ..machine.clone()
    };
    for _ in 0..2 {
        assert!(Vm::start(&place.config, impatient.clone()).await.is_err());
    }
    let key = folder.file_name().unwrap().to_str().unwrap();
    let uses = store(&place.config).uses(key);
    assert_eq!((uses.clones, uses.failures, uses.failures_in_a_row), (0, 3, 3));
    assert!(folder.exists());
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let fourth = why(&vm);
    assert!(
        fourth.starts_with("the last 3 attempts with its template failed"),
        "{fourth}"
    );
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_template_that_finds_no_room_has_the_machine_boot() {
    let place = Place::new().await;
    let machine = cloneable(&place, "roomless");
    let folder = &place.config.template_dir;
    fs::create_dir(folder).unwrap();
    mount(
        Some("tmpfs"),
        folder,
        Some("tmpfs"),
        MsFlags::empty(),
        // So much that it is begun.
        Some("size=48m,mode=700"),
    )
    .unwrap();
    let vm = Vm::start(&place.config, machine.clone()).await;
    let left: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    umount2(folder, MntFlags::MNT_DETACH).unwrap();
    let vm = vm.unwrap();
    let why = why(&vm);
    assert!(
        why.contains("its template cannot be made") && why.contains("No space left"),
        "{why}"
    );
    let partial = left.iter().any(|name| name.to_string_lossy().contains("partial"));
    assert!(!partial, "{left:?}");
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn machines_that_start_at_once_make_one_template_and_are_its_clones() {
    let place = Place::alone(CloneModeChoice::CopyOnWrite).await;
    let machines: Vec<_> = (0..AT_ONCE)
        .map(|number| cloneable(&place, &format!("at-once-{number}")))
        .collect();
    let begin = Instant::now();
    let starts = machines.iter().map(|machine| Vm::start(&place.config, machine.clone()));
    let vms: Vec<_> = join_all(starts).await.into_iter().map(Result::unwrap).collect();
    vms.iter().for_each(|vm| assert_clone(&place, vm));
    end(&place, vms, &machines).await;
    let entries = store(&place.config).entries().unwrap();
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].uses.clones, AT_ONCE as u64, "{:?}", begin.elapsed());

    // Another size has no room beside it.
    let key = &entries[0].key;
    let config = Config {
        template_space_mib: 120,
        templates: Templates::Boot,
        ..place.config.clone()
    };
    let other = Machine {
        memory_mib: 640,
        ..cloneable(&place, "larger")
    };
    let held = vm::template_key(&config, &other).await.unwrap();
    let right = store(&config).try_lock(&held).unwrap().unwrap();
    let impatient = Machine {
        boot_timeout: Duration::from_secs(1),
        ..other.clone()
    };
    // Somebody else makes it, and with "boot" nobody waits: the boot begins at once, and is not given the time here.
    let begin = Instant::now();
    assert!(Vm::start(&config, impatient).await.is_err());
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
    vm::make_template(&config, &other, &right, std::future::pending())
        .await
        .unwrap();
    let entries = store(&config).entries().unwrap();
    assert_eq!(entries.len(), 1);
    assert_ne!(&entries[0].key, key, "the one that was used before makes room");
}

fn sandbox(sysctl: &str) -> ConfigureSandboxRequest {
    let ids = IdMapping {
        outside: 65536,
        length: 65536,
        ..Default::default()
    };
    let users = UserNamespace {
        uids: Some(ids.clone()).into(),
        gids: Some(ids).into(),
        ..Default::default()
    };
    ConfigureSandboxRequest {
        sandbox_id: "pod".to_owned(),
        hostname: "pod-0".to_owned(),
        shared_tag: SHARED_TAG.to_owned(),
        sysctls: [(sysctl.to_owned(), "1".to_owned())].into(),
        users: Some(users).into(),
        ..Default::default()
    }
}

#[rstest::rstest]
#[case::copy_on_write(true, CloneModeChoice::CopyOnWrite)]
#[case::copy(true, CloneModeChoice::Copy)]
#[case::boot(false, CloneModeChoice::Auto)]
#[tokio::test]
async fn a_pod_that_wants_what_cannot_be_hears_it_and_no_template_is_to_blame(
    #[case] cloneable: bool,
    #[case] mode: CloneModeChoice,
) {
    let place = Place::of(mode).await;
    let mut machine = Machine {
        sandbox: Some(sandbox("kernel.nothing_such")),
        cloneable,
        ..place.machine("wishful")
    };
    let folder = with_template(&place, &machine).await;
    let error = Vm::start(&place.config, machine.clone()).await.err().unwrap();
    assert!(matches!(error, VmError::Sandbox(_)), "{error:?}");
    assert!(error.to_string().contains("kernel.nothing_such"), "{error}");
    let key = folder.file_name().unwrap().to_str().unwrap();
    assert_eq!(store(&place.config).uses(key).failures, 0);
    place.assert_nothing_is_left(&machine);
    if !cloneable {
        return;
    }
    machine.sandbox = Some(sandbox("kernel.shm_rmid_forced"));
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    assert_clone(&place, &vm);
    let seen = text(&vm, "hostname; cat /proc/sys/kernel/shm_rmid_forced").await;
    assert_eq!(seen, "pod-0\n1");
    end(&place, vec![vm], &[machine.clone()]).await;

    // More than a clone can be told when it is woken.
    let mut much = sandbox("kernel.shm_rmid_forced");
    let names = [
        "ip_forward",
        "tcp_syncookies",
        "ip_dynaddr",
        "tcp_mtu_probing",
        "tcp_fwmark_accept",
    ];
    let number = format!("1{}", " ".repeat(4000));
    much.sysctls
        .extend(names.map(|name| (format!("net.ipv4.{name}"), number.clone())));
    machine.sandbox = Some(much);
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    assert_clone(&place, &vm);
    let files = names.map(|name| format!("/proc/sys/net/ipv4/{name}"));
    let seen = text(&vm, &format!("hostname; cat {} | tr -d '\\n'", files.join(" "))).await;
    assert_eq!(seen, "pod-0\n11111");
    end(&place, vec![vm], &[machine]).await;
}

#[tokio::test]
async fn a_template_whose_maker_is_killed_is_made_by_the_next() {
    let place = Place::new().await;
    let config = place.config.state_dir.with_file_name("config.toml");
    let text = |path: &Path| format!("{:?}", path.display().to_string());
    let keys = [
        ("guests_dir", &place.config.guests_dir),
        ("agent_disk", &place.config.agent_disk),
        ("state_dir", &place.config.state_dir),
        ("template_dir", &place.config.template_dir),
        ("virtiofsd", &place.config.virtiofsd),
        ("vhost_device_vsock", &place.config.vhost_device_vsock),
    ];
    let lines: String = keys
        .iter()
        .map(|(key, path)| format!("{key} = {}\n", text(path)))
        .collect();
    fs::write(&config, lines).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_coreos-kvm"));
    command.arg("--config").arg(&config).args(["template", "build"]);
    let mut maker = command.stderr(Stdio::null()).spawn().unwrap();

    let same = Machine {
        growth: Some(Growth::within(1, place.config.max_vcpus, place.config.max_memory_mib)),
        ..place.machine("any")
    };
    let key = vm::template_key(&place.config, &same).await.unwrap();
    let machine = place.config.state_dir.join(format!("template-{key}"));
    let deadline = Instant::now() + LATER;
    let qemu = loop {
        let record: Option<serde_json::Value> = fs::read(machine.join("machine.json"))
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(pid) = record.and_then(|record| record["qemu"]["pid"].as_u64()) {
            break pid;
        }
        assert!(Instant::now() < deadline, "QEMU does not start");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    maker.kill().unwrap();
    maker.wait().unwrap();
    let running = || fs::read_to_string(format!("/proc/{qemu}/cmdline")).is_ok_and(|line| !line.is_empty());
    while running() {
        assert!(Instant::now() < deadline, "QEMU outlives its launcher");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(machine.exists() && place.config.template_dir.join(format!("{key}.partial")).exists());
    assert!(store(&place.config).entries().unwrap().is_empty());

    let made = command.output().unwrap();
    assert!(made.status.success(), "{made:?}");
    assert!(!machine.exists());
    let entries = store(&place.config).entries().unwrap();
    assert_eq!(entries[0].key, key.as_str());
    store(&place.config).open_named(key.as_str()).unwrap().verify().unwrap();
}

#[tokio::test]
async fn a_template_that_nobody_waits_for_any_more_leaves_nothing() {
    let place = Place::new().await;
    let machine = cloneable(&place, "given-up");
    let start = Vm::start(&place.config, machine.clone());
    assert!(tokio::time::timeout(Duration::from_secs(2), start).await.is_err());
    let deadline = Instant::now() + LATER;
    loop {
        let left = |folder: &Path, what: &str| {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .any(|name| name.contains(what))
        };
        if !left(&place.config.state_dir, "template-") && !left(&place.config.template_dir, "partial") {
            break;
        }
        assert!(Instant::now() < deadline, "something is left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    place.assert_nothing_is_left(&machine);
}

/// What QEMU has for itself of the memory that it shares, in MiB: proc_pid_smaps(5).
fn private_mib(vm: &Vm) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let (_, memory) = maps.split_once("/memfd:template").unwrap();
    let anonymous = memory.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    anonymous.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
}

/// The file that QEMU has mapped.
fn shared_inode(vm: &Vm) -> String {
    let maps = fs::read_to_string(format!("/proc/{}/maps", vm.pid())).unwrap();
    let line = maps.lines().find(|line| line.contains("/memfd:template")).unwrap();
    line.split_ascii_whitespace().nth(4).unwrap().to_owned()
}

#[tokio::test]
async fn clones_that_share_memory_have_one_file_of_it_and_only_what_they_write_for_themselves() {
    let place = Place::new().await;
    let machines = ["sharing", "with-it"].map(|name| cloneable(&place, name));
    let folder = with_template(&place, &machines[0]).await;
    let kept = fs::metadata(folder.join("memory")).unwrap().len() >> 20;
    let mut vms = Vec::new();
    for machine in &machines {
        let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
        assert_clone(&place, &vm);
        vms.push(vm);
    }
    assert_eq!(shared_inode(&vms[0]), shared_inode(&vms[1]));
    let at_first = private_mib(&vms[0]);
    eventually(&vms[0], "systemctl is-active systemd-journald systemd-udevd").await;
    let later = private_mib(&vms[0]);
    eprintln!("{kept} MiB are shared, {at_first} MiB are the clone's at first, {later} MiB when all of it is awake");
    assert!(at_first < kept / 2 && later < kept, "{at_first} and {later} MiB");
    // The file stays when the machine is gone for which it was filled.
    vms.remove(0).shutdown(Duration::ZERO).await.unwrap();
    assert_eq!(text(&vms[0], "echo alive").await, "alive");
    end(&place, vms, &machines).await;
}
