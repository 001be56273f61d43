//! Machines on the reference guest that take another size while they run.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::time::{Duration, Instant};

use common::{Place, container::Bed, run};
use coreos_kvm_launcher::{
    machine::{Growth, Machine},
    state::{Origin, StateDir},
    vm::{MachineSize, ResizeError, Vm},
};
use coreos_kvm_proto::{SHARED_TAG, agent::ConfigureSandboxRequest};

const START: MachineSize = size(1, 512);
const MOST: Growth = Growth {
    vcpus: 4,
    memory_mib: 4096,
};

const fn size(vcpus: u32, memory_mib: u64) -> MachineSize {
    MachineSize { vcpus, memory_mib }
}

async fn start(place: &Place, name: &str, growth: Option<Growth>, cloneable: bool) -> (Vm, Machine) {
    let sandbox = ConfigureSandboxRequest {
        sandbox_id: name.to_owned(),
        shared_tag: SHARED_TAG.to_owned(),
        ..Default::default()
    };
    let machine = Machine {
        growth,
        sandbox: Some(sandbox),
        cloneable,
        ..place.machine(name)
    };
    let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
    let origin = vm.info().record.origin;
    assert_eq!(matches!(origin, Some(Origin::Clone { .. })), cloneable, "{origin:?}");
    (vm, machine)
}

async fn text(vm: &Vm, script: &str) -> String {
    let (text, status) = run(vm.agent(), &["sh", "-c", script]).await;
    assert_eq!(status, 0, "{script}: {text}");
    text.trim().to_owned()
}

/// Processors, and memory in MiB, from the output of `nproc` and the line of `MemTotal`.
fn parsed(said: &str) -> MachineSize {
    let words: Vec<_> = said.split_ascii_whitespace().collect();
    let [processors, "MemTotal:", kib, "kB"] = words.as_slice() else {
        panic!("{said}");
    };
    size(processors.parse().unwrap(), kib.parse::<u64>().unwrap() >> 10)
}

/// As programs in the guest see it.
async fn seen(vm: &Vm) -> MachineSize {
    parsed(&text(vm, "nproc; grep MemTotal: /proc/meminfo").await)
}

/// What `coreos-kvm ps` says.
fn recorded(place: &Place, machine: &Machine) -> MachineSize {
    let state = StateDir::of(&place.config.state_dir, &machine.id);
    let record = state.read().unwrap().unwrap();
    size(record.vcpus, record.memory_mib)
}

/// How long a change takes, for those who look (`--nocapture`).
async fn timed<T>(what: &str, work: impl Future<Output = T>) -> T {
    let begin = Instant::now();
    let done = work.await;
    println!("{what}: {:.2} s", begin.elapsed().as_secs_f64());
    done
}

async fn grows_and_shrinks(cloneable: bool) {
    let place = Place::new().await;
    let name = if cloneable { "clone" } else { "boot" };
    let (vm, machine) = start(&place, name, Some(MOST), cloneable).await;
    let bed = Bed { vm: &vm };
    bed.start_idle("idle").await;
    let before = seen(&vm).await.memory_mib;
    let with = |more, vcpus| size(vcpus, before + more);
    assert_eq!(seen(&vm).await, with(0, 1));

    // What it has is enough.
    assert_eq!(vm.grow(size(1, 300)).await.unwrap(), START);
    assert_eq!(
        timed("256 MiB more", vm.grow(size(0, 700))).await.unwrap(),
        size(1, 768)
    );
    assert_eq!(seen(&vm).await, with(256, 1));
    assert_eq!(
        timed("2 processors more", vm.grow(size(3, 0))).await.unwrap(),
        size(3, 768)
    );
    assert_eq!(
        timed("1 GiB more", vm.grow(size(3, 1792))).await.unwrap(),
        size(3, 1792)
    );
    assert_eq!(seen(&vm).await, with(1280, 3));
    assert_eq!(recorded(&place, &machine), size(3, 1792));
    let script = "/bin/busybox nproc; grep MemTotal: /proc/meminfo";
    let inside = bed.exec("idle", &["sh", "-c", script]).await.good();
    assert_eq!(parsed(&inside), with(1280, 3));

    let refused = vm.grow(size(5, 2048)).await.unwrap_err().to_string();
    let said = "a machine of 5 processors is too large: this one can grow to 4; one that is started anew can be larger";
    assert_eq!(refused, said);
    let refused = vm.grow(size(4, 4097)).await.unwrap_err().to_string();
    let said = "a machine with 4097 MiB is too large: `max_memory_mib` in config.toml allows 4096";
    assert_eq!(refused, said);
    assert_eq!((vm.size().await, seen(&vm).await), (size(3, 1792), with(1280, 3)));

    // All of it is used.
    let script = "dd if=/dev/zero of=/dev/shm/large bs=1M count=800 2>/dev/null & dd if=/dev/zero bs=1M count=8 2>/dev/null | \
                  sha256sum >/dev/null & wait; stat -c %s /dev/shm/large";
    assert_eq!(text(&vm, "mount -o remount,size=90% /dev/shm").await, "");
    assert_eq!(text(&vm, script).await, (800 << 20).to_string());
    // What is needed stays.
    let kept = timed("a module that stays", vm.shrink(size(2, 512))).await.unwrap();
    assert_eq!(kept.vcpus, 2);
    assert!(kept.memory_mib >= 512 + 512, "{kept:?}");
    assert_eq!(seen(&vm).await, with(kept.memory_mib - 512, 2));
    assert_eq!(text(&vm, "rm /dev/shm/large").await, "");

    assert_eq!(timed("all taken away", vm.shrink(size(0, 0))).await.unwrap(), START);
    assert_eq!(seen(&vm).await, with(0, 1));
    assert_eq!(recorded(&place, &machine), START);
    assert_eq!(timed("again", vm.grow(size(4, 640))).await.unwrap(), size(4, 640));
    assert_eq!(seen(&vm).await, with(128, 4));

    assert_eq!(text(&vm, "dmesg | grep -ci 'call trace' || true").await, "0");
    bed.remove("idle").await;
    vm.shutdown(Duration::from_secs(30)).await.unwrap();
    assert!(vm.exited().await.orderly);
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_machine_that_has_booted_grows_and_shrinks() {
    grows_and_shrinks(false).await;
}

#[tokio::test]
async fn a_clone_grows_and_shrinks() {
    grows_and_shrinks(true).await;
}

#[tokio::test]
async fn memory_grows_some_times_and_not_while_the_machine_is_paused() {
    let place = Place::new().await;
    let (vm, machine) = start(&place, "often", Some(MOST), true).await;
    let before = seen(&vm).await.memory_mib;
    vm.pause().await.unwrap();
    let refused = vm.grow(size(2, 1024)).await.unwrap_err();
    assert!(matches!(refused, ResizeError::Paused), "{refused}");
    // What it has it has.
    assert_eq!(vm.grow(size(1, 512)).await.unwrap(), START);
    vm.resume().await.unwrap();
    for number in 1..=5 {
        let grown = vm.grow(size(1, 512 + number * 128)).await.unwrap();
        assert_eq!(grown, size(1, 512 + number * 128));
    }
    assert_eq!(seen(&vm).await.memory_mib, before + 640);
    let refused = vm.grow(size(1, 2048)).await.unwrap_err();
    assert!(matches!(refused, ResizeError::NoPlace), "{refused}");
    vm.pause().await.unwrap();
    assert_eq!(vm.shrink(START).await.unwrap(), size(1, 1152));
    vm.resume().await.unwrap();
    assert_eq!(timed("5 modules taken away", vm.shrink(START)).await.unwrap(), START);
    assert_eq!(vm.grow(size(1, 1152)).await.unwrap(), size(1, 1152));
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}

#[tokio::test]
async fn a_machine_of_one_size_keeps_it() {
    let place = Place::new().await;
    let (vm, machine) = start(&place, "fixed", None, true).await;
    for wanted in [size(2, 512), size(1, 513)] {
        let refused = vm.grow(wanted).await.unwrap_err();
        assert!(matches!(refused, ResizeError::Fixed), "{refused}");
    }
    assert_eq!(vm.shrink(size(1, 128)).await.unwrap(), START);
    vm.shutdown(Duration::ZERO).await.unwrap();
    place.assert_nothing_is_left(&machine);
}
