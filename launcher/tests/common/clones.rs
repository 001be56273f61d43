//! Machines that are clones.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use coreos_kvm_launcher::{
    config::{CloneModeChoice, Config},
    machine::Machine,
    state::{CloneMode, Origin},
    template::Store,
    vm::{self, Vm},
};
use tokio::sync::Mutex;

use super::{Place, run};

/// What a guest's service may take to start that waits for the clone's containers.
pub const LATER: Duration = Duration::from_secs(30);

pub fn cloneable(place: &Place, name: &str) -> Machine {
    Machine {
        cloneable: true,
        ..place.machine(name)
    }
}

pub fn store(config: &Config) -> Store {
    Store::open(&config.template_dir, config.template_space_mib << 20).unwrap()
}

/// One test makes the template that others want too.
static MAKING: Mutex<()> = Mutex::const_new(());

/// A template of the machine in the place's own folder, made once for all runs.
pub async fn with_template(place: &Place, machine: &Machine) -> PathBuf {
    let common = Config {
        template_dir: Path::new(env!("CARGO_TARGET_TMPDIR")).join("templates"),
        ..place.config.clone()
    };
    let key = vm::template_key(&common, machine).await.unwrap();
    let all = store(&common);
    let making = MAKING.lock().await;
    if all.find(&key).ok().flatten().is_none() {
        let right = all.try_lock(&key).unwrap().unwrap();
        let never = std::future::pending();
        vm::make_template(&common, machine, &right, never).await.unwrap();
    }
    drop(making);
    store(&place.config);
    let copied = Command::new("cp")
        .arg("-a")
        .arg(common.template_dir.join(key.as_str()))
        .arg(&place.config.template_dir)
        .status();
    assert!(copied.unwrap().success());
    place.config.template_dir.join(key.as_str())
}

pub async fn end(place: &Place, vms: Vec<Vm>, machines: &[Machine]) {
    for vm in vms {
        vm.shutdown(Duration::ZERO).await.unwrap();
    }
    for machine in machines {
        place.assert_nothing_is_left(machine);
    }
}

pub fn assert_clone(place: &Place, vm: &Vm) {
    let origin = vm.info().record.origin;
    let Some(Origin::Clone { mode, .. }) = origin else {
        panic!("the machine is no clone: {origin:?}");
    };
    let wanted = match place.config.clone_mode {
        CloneModeChoice::Copy => CloneMode::Copy,
        CloneModeChoice::CopyOnWrite | CloneModeChoice::Auto => CloneMode::CopyOnWrite,
    };
    assert_eq!(mode, wanted);
}

pub async fn text(vm: &Vm, script: &str) -> String {
    let (text, status) = run(vm.agent(), &["sh", "-c", script]).await;
    assert_eq!(status, 0, "{script}: {text}");
    text.trim().to_owned()
}

/// Tries again until the script says something.
pub async fn eventually(vm: &Vm, script: &str) -> String {
    let deadline = Instant::now() + LATER;
    loop {
        let (text, status) = run(vm.agent(), &["sh", "-c", script]).await;
        if status == 0 && !text.trim().is_empty() {
            return text.trim().to_owned();
        }
        assert!(Instant::now() < deadline, "{script}: {text}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
