//! Machines on the reference guest that take another size while they run.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::time::{Duration, Instant};

use common::{Place, run};
use coreos_kvm_launcher::{
    machine::{Growth, Machine},
    state::{Origin, StateDir},
    vm::{MachineSize, ResizeError, Vm},
};

const START: MachineSize = MachineSize {
    vcpus: 1,
    memory_mib: 512,
};
const MOST: Growth = Growth {
    vcpus: 4,
    memory_mib: 4096,
};

fn size(vcpus: u32, memory_mib: u64) -> MachineSize {
    MachineSize { vcpus, memory_mib }
}

async fn start(place: &Place, name: &str, cloneable: bool) -> (Vm, Machine) {
    let machine = Machine {
        growth: Some(MOST),
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

/// Processors, and memory in MiB, as programs in the guest see them.
async fn seen(vm: &Vm) -> (u32, u64) {
    let said = text(vm, "nproc; sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await;
    let (processors, memory) = said.split_once('\n').unwrap();
    (processors.parse().unwrap(), memory.parse::<u64>().unwrap() >> 10)
}

/// What `coreos-kvm ps` says.
fn recorded(place: &Place, machine: &Machine) -> MachineSize {
    let state = StateDir::of(&place.config.state_dir, &machine.id);
    let record = state.read().unwrap().unwrap();
    size(record.vcpus, record.memory_mib)
}

async fn timed<T>(what: &str, work: impl Future<Output = T>) -> T {
    let begin = Instant::now();
    let done = work.await;
    println!("{what}: {:.2} s", begin.elapsed().as_secs_f64());
    done
}

async fn grows_and_shrinks(cloneable: bool) {
    let place = Place::new().await;
    let (vm, machine) = start(&place, if cloneable { "clone" } else { "boot" }, cloneable).await;
    let (processors, before) = seen(&vm).await;
    assert_eq!(processors, 1);

    // What it has is enough.
    assert_eq!(vm.grow(size(1, 300)).await.unwrap(), START);
    let grown = timed("256 MiB", vm.grow(size(0, 700))).await.unwrap();
    assert_eq!(grown, size(1, 768));
    let (processors, memory) = seen(&vm).await;
    assert!(
        processors == 1 && memory == before + 256,
        "{processors} {memory}, before {before}"
    );

    assert_eq!(timed("2 processors", vm.grow(size(3, 0))).await.unwrap(), size(3, 768));
    assert_eq!(seen(&vm).await, (3, before + 256));
    assert_eq!(recorded(&place, &machine), size(3, 768));
    let grown = timed("1 GiB", vm.grow(size(3, 1792))).await.unwrap();
    assert_eq!(grown, size(3, 1792));
    assert_eq!(seen(&vm).await, (3, before + 1280));
    // Both are used.
    let script = "dd if=/dev/zero of=/dev/shm/large bs=1M count=900 2>&1 && sha256sum /dev/shm/large & \
                  dd if=/dev/zero bs=1M count=16 | sha256sum; wait; rm /dev/shm/large; dmesg | grep -ci 'call trace' || true";
    let said = text(&vm, script).await;
    assert!(said.ends_with("\n0"), "{said}");

    let refused = vm.grow(size(5, 512)).await.unwrap_err();
    assert!(
        matches!(refused, ResizeError::Processors { vcpus: 5, most: 4 }),
        "{refused}"
    );
    let refused = vm.grow(size(1, 4097)).await.unwrap_err();
    let said = refused.to_string();
    assert_eq!(
        said,
        "a machine with 4097 MiB is too large: `max_memory_mib` in config.toml allows 4096"
    );
    assert_eq!(vm.size().await, size(3, 1792));

    let shrunk = timed("back", vm.shrink(size(2, 768))).await.unwrap();
    println!("{shrunk:?} {:?}", seen(&vm).await);
    assert_eq!(shrunk.vcpus, 2);
    let shrunk = timed("all back", vm.shrink(size(0, 0))).await.unwrap();
    println!("{shrunk:?} {:?}", seen(&vm).await);
    println!("{}", text(&vm, "dmesg | tail -n 40; cat /sys/devices/system/memory/auto_online_blocks; grep . /sys/devices/system/memory/memory*/valid_zones").await);
    assert_eq!(shrunk, START);
    assert_eq!(seen(&vm).await, (1, before));
    assert_eq!(recorded(&place, &machine), START);

    // And again, in what was given back.
    let grown = timed("again", vm.grow(size(2, 640))).await.unwrap();
    assert_eq!(grown, size(2, 640));
    assert_eq!(seen(&vm).await, (2, before + 128));
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
