//! docs/conformance.md.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use kubeception_tests::artifacts;

use crate::exceptions::{Exceptions, OF_CONTAINERD};
use crate::suite::{BY_DIGEST, Outcome};
use crate::table::{Found, Verdict};

pub(crate) fn write(all: &[Found], exceptions: &Exceptions) -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/conformance.md");
    fs::write(&path, text(all, exceptions)?).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

fn text(all: &[Found], exceptions: &Exceptions) -> Result<String> {
    let mut text = format!(
        "# Conformance

critest is the test suite of the Container Runtime Interface. What it finds of this runtime stands beside what it finds of
runc, on the same node in the same run:

```sh
sudo ./devtool conformance --containerd all --write
```

wrote this page. What runc passes is the bar: the command fails where coreos-kvm does not, unless a machine cannot, for a
reason that stands in [exceptions.txt](../tests/critest/exceptions.txt).

{}
The images are stand-ins made of Debian's busybox. One spec is left out for both, \"{BY_DIGEST}\":
the image's digest is a constant of critest.
",
        versions()?
    );
    let (beyond_runc, beyond_machines): (Vec<_>, Vec<_>) =
        exceptions.iter().partition(|(spec, _)| spec.starts_with(OF_CONTAINERD));
    for (title, exceptions) in [
        ("What a machine cannot", beyond_machines),
        ("What no runtime can", beyond_runc),
    ] {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n## {title}\n");
        for (spec, reason) in exceptions {
            let _ = writeln!(text, "- **{spec}**: {reason}");
        }
    }
    for found in all {
        let _ = writeln!(text, "\n## containerd {}\n", found.containerd.version());
        let (passed, failed) = found.counts(exceptions);
        let rows = found.rows(exceptions);
        let excepted = rows.iter().filter(|row| row.verdict() == Verdict::Excepted).count();
        let runc = found
            .runc
            .values()
            .filter(|outcome| **outcome == Outcome::Passed)
            .count();
        let _ = writeln!(
            text,
            "runc passes {runc} specs, coreos-kvm {passed}; {failed} that it should pass it does not, {excepted} are exceptions.\n"
        );
        text += &found.markdown(exceptions);
    }
    Ok(text)
}

/// A table of what was used.
fn versions() -> Result<String> {
    let first_line = |program: &Path| {
        let output = Command::new(program).arg("--version").output();
        let output = output.with_context(|| format!("running {}", program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::Ok(text.lines().next().unwrap_or_default().to_owned())
    };
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    let mut text = String::from("| part | version |\n|---|---|\n");
    for (part, version) in [
        ("critest", critest()?),
        ("runc", first_line(&artifacts::runc()?)?.replace("runc version ", "")),
        (
            "QEMU",
            first_line(Path::new("qemu-system-x86_64"))?.replace("QEMU emulator version ", ""),
        ),
        // What a distribution adds to it says nothing to others.
        (
            "kernel of the node",
            host.split('-').next().unwrap_or_default().trim().to_owned(),
        ),
        ("kernel of the guest", guest_kernel()?),
    ] {
        let _ = writeln!(text, "| {part} | {version} |");
    }
    Ok(text)
}

/// As the module that it is built from is pinned.
fn critest() -> Result<String> {
    let module = include_str!("../../../critest/go.mod");
    let version = module.lines().find_map(|line| {
        let mut words = line
            .split_whitespace()
            .skip_while(|word| *word != "sigs.k8s.io/cri-tools");
        words.nth(1)
    });
    version
        .map(str::to_owned)
        .context("go.mod does not name sigs.k8s.io/cri-tools")
}

/// As its image tells: the header of a bzImage has, at 0x20e, where the version is (Linux, x86/boot.rst, `kernel_version`).
fn guest_kernel() -> Result<String> {
    let image = fs::read(artifacts::guests()?.join("reference/vmlinuz")).context("reading the guest's kernel")?;
    let place = image.get(0x20e..0x210).context("the guest's kernel is no bzImage")?;
    let start = 0x200 + usize::from(u16::from_le_bytes([place[0], place[1]]));
    let version = image.get(start..).context("the guest's kernel has no version")?;
    let version = version.split(|byte| *byte == 0).next().unwrap_or_default();
    let version = String::from_utf8_lossy(version);
    Ok(version.split(' ').next().unwrap_or_default().to_owned())
}
