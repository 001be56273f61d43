//! What files cost in clones of either mode: one has FUSE over a serial port, the other virtiofs.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::cri::COREOS_KVM;
use kubeception_tests::image::BUSYBOX;
use kubeception_tests::node::Handler;
use kubeception_tests::pod::{Container, Pod};

use super::{Bench, COPIED};
use crate::table::{Samples, Table};

/// MiB that are written and read.
const SIZE: u32 = 64;
/// Files that are made.
const FILES: u32 = 500;
/// Programs that are started.
const PROGRAMS: u32 = 20;
const BOUND: Duration = Duration::from_secs(120);

impl Bench<'_> {
    pub(super) fn files(&self, table: &mut Table) -> Result<()> {
        for (handler, mode, name) in [(COREOS_KVM, "cow", "copy-on-write"), (COPIED, "copy", "copy")] {
            eprintln!("files of a clone by {name}");
            let pod = Pod::new(self.node.place(), &format!("files-{mode}"));
            let id = self.cri.run_pod(&pod, handler)?;
            let idle = Container::new("idle", BUSYBOX).command(&["sleep", "2147483647"]);
            let container = self.cri.run(&id, &idle, &pod)?;
            let [mut written, mut read, mut made, mut started] = [(); 4].map(|()| Samples::default());
            for _ in 0..self.arguments.runs {
                let begun = Instant::now();
                self.shell(
                    &container,
                    &format!("dd if=/dev/zero of=/big bs=1M count={SIZE} conv=fsync"),
                )?;
                written.add(f64::from(SIZE) / begun.elapsed().as_secs_f64());
                self.forget_files(handler, &id)?;
                let begun = Instant::now();
                self.shell(&container, "dd if=/big of=/dev/null bs=1M")?;
                read.add(f64::from(SIZE) / begun.elapsed().as_secs_f64());
                let script = format!("mkdir -p /many; cd /many; for i in $(seq {FILES}); do : >$i; done");
                let begun = Instant::now();
                self.shell(&container, &script)?;
                made.add(begun.elapsed().as_secs_f64() * 1e6 / f64::from(FILES));
                self.shell(&container, "rm -r /many")?;
                let script = format!("for i in $(seq {PROGRAMS}); do /bin/true; done");
                let begun = Instant::now();
                self.shell(&container, &script)?;
                started.add(begun.elapsed().as_secs_f64() * 1e3 / f64::from(PROGRAMS));
            }
            let what = |what: &str| format!("clone by {name}: {what}");
            let key = |part: &str| format!("{mode}_{part}");
            table.samples(
                &key("write_mib_s"),
                &what("64 MiB written to the root, fsync"),
                "MiB/s",
                &written,
                None,
            );
            table.samples(&key("read_mib_s"), &what("the same read"), "MiB/s", &read, None);
            table.samples(&key("create_us"), &what("an empty file made"), "us", &made, None);
            table.samples(
                &key("start_ms"),
                &what("a program started that was started before"),
                "ms",
                &started,
                None,
            );
            self.cri.stop_pod(&id)?;
            self.cri.remove_pod(&id)?;
        }
        Ok(())
    }

    fn shell(&self, container: &str, script: &str) -> Result<()> {
        let said = self.cri.exec_within(container, &["sh", "-c", script], BOUND)?;
        ensure!(said.exit_code == 0, "{script}: {}", said.stderr);
        Ok(())
    }

    /// Has the guest drop what it keeps of files.
    fn forget_files(&self, handler: &str, sandbox: &str) -> Result<()> {
        let mut command = self.node.command("coreos-kvm");
        command
            .arg("--config")
            .arg(Handler::variant(handler).config_path(self.node.place()));
        command.args(["exec", sandbox, "--", "sh", "-c", "echo 3 >/proc/sys/vm/drop_caches"]);
        let status = command.status().context("running coreos-kvm exec")?;
        ensure!(status.success(), "coreos-kvm exec: {status}");
        Ok(())
    }
}
