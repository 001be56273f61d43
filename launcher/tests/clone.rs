//! Clones of a template of the reference guest: that they are machines of their own, and what happens when they cannot be.

#![allow(clippy::unwrap_used)] // a test that cannot go on fails

mod common;

use std::time::Duration;

use common::{Place, run};
use coreos_kvm_launcher::{machine::Machine, state::Origin, vm::Vm};

#[tokio::test]
async fn a_clone_is_a_machine_of_its_own() {
    let _ = tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_test_writer().try_init();
    let place = Place::new().await;
    let mut said = Vec::new();
    for name in ["first", "second"] {
        let machine = Machine {
            cloneable: true,
            ..place.machine(name)
        };
        let begin = std::time::Instant::now();
        let vm = Vm::start(&place.config, machine.clone()).await.unwrap();
        eprintln!("{name} is up after {:.3} s", begin.elapsed().as_secs_f64());
        assert!(
            matches!(vm.info().record.origin, Some(Origin::Clone { .. })),
            "{:?}",
            vm.info().record.origin
        );
        let ids = "cat /proc/sys/kernel/random/boot_id /etc/machine-id; head -c 16 /dev/urandom | od -An -tx1";
        let begin = std::time::Instant::now();
        let (ids, status) = run(vm.agent(), &["sh", "-c", ids]).await;
        eprintln!("{name}: exec {:.3} s\n{ids}", begin.elapsed().as_secs_f64());
        assert_eq!(status, 0);
        let ids: Vec<_> = ids.lines().map(str::to_owned).collect();
        assert_eq!(ids.len(), 3);
        said.push(ids);
        tokio::time::sleep(Duration::from_secs(4)).await;
        let (text, _) = run(vm.agent(), &["sh", "-c", "systemctl --failed --no-legend; ls -R /run/log/journal; journalctl --no-pager -n 30 | tail -40; free -m; date +%s.%N"]).await;
        eprintln!("{text}\nhost {:?}", std::time::SystemTime::now());
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", vm.pid())).unwrap();
        eprintln!("{rollup}");
        vm.shutdown(Duration::from_secs(30)).await.unwrap();
        place.assert_nothing_is_left(&machine);
    }
    for (first, second) in said[0].iter().zip(&said[1]) {
        assert_ne!(first, second);
    }
}
