//! What the translation of configurations costs: in a process that does it again and again, as whole processes, and against
//! Butane and the Container Linux Config Transpiler.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use kubeception_tests::artifacts;
use nix::libc;

use crate::table::{Samples, Table};

const MIB: usize = 1 << 20;

/// Puts the figures into the table.
pub(crate) fn measure(table: &mut Table, runs: u32) -> Result<()> {
    eprintln!("the translation of configurations");
    let folder = tempfile::tempdir()?;
    let put = |name: &str, text: String| -> Result<PathBuf> {
        let path = folder.path().join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        Ok(path)
    };
    let units = put("units.bu", format!("{BUTANE}{}", units(100)))?;
    let units_of_ct = put("units.yaml", self::units(100))?;
    let large = put("large.bu", files(4, MIB / 4))?;
    let small = put("small.bu", files(1500, MIB / 1500 - 90))?;
    let program = artifacts::program("coreos-kvm")?;

    let (ms, what) = ("ms", "transpile and merge, in a running process");
    table.samples(
        "transpile_100_units_ms",
        &format!("100 units: {what}"),
        ms,
        &in_process(&units, runs)?,
        Some(5.0),
    );
    let (of_large, of_small) = (in_process(&large, runs)?, in_process(&small, runs)?);
    let worse = if of_large.median() > of_small.median() {
        &of_large
    } else {
        &of_small
    };
    table.samples(
        "transpile_1mib_ms",
        "1 MiB, the slower of the next two",
        ms,
        worse,
        Some(50.0),
    );
    table.samples("transpile_1mib_large_ms", "4 files of 256 KiB", ms, &of_large, None);
    table.samples("transpile_1mib_small_ms", "1500 small files", ms, &of_small, None);

    let mut peaks = [Samples::default(), Samples::default()];
    for (peak, path) in peaks.iter_mut().zip([&large, &small]) {
        for _ in 0..runs.min(5) {
            peak.add(process(&program, &["transpile"], path)?.peak_mb);
        }
    }
    let [of_large, of_small] = peaks;
    table.figure(
        "transpile_1mib_rss_mb",
        "1 MiB: most memory of `coreos-kvm transpile` (RSS)",
        "MB",
        of_large.max().max(of_small.max()),
        Some(32.0),
    );

    for (key, name, path) in [
        ("transpile_over_butane", "butane", &units),
        ("transpile_over_ct", "ct", &units_of_ct),
    ] {
        let other = artifacts::go_program(name)?;
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        // One after the other, so that both see the same machine.
        for _ in 0..runs {
            ours.add(process(&program, &["transpile"], path)?.ms);
            let arguments: &[&str] = if name == "ct" { &["-in-file"] } else { &[] };
            theirs.add(process(&other, arguments, path)?.ms);
        }
        table.ratio(
            key,
            &format!("100 units: whole process, over {name}"),
            &ours,
            &theirs,
            0.2,
        );
        table.samples(
            &format!("{name}_process_ms"),
            &format!("{name}, whole process"),
            ms,
            &theirs,
            None,
        );
        table.samples(
            &format!("transpile_process_of_{name}_ms"),
            "coreos-kvm transpile, whole process",
            ms,
            &ours,
            None,
        );
    }
    Ok(())
}

/// As a running shim has it: the released library, again and again; the first runs, which find everything cold, count as well.
fn in_process(path: &Path, runs: u32) -> Result<Samples> {
    let output = Command::new(artifacts::example("stopwatch")?)
        .arg(runs.to_string())
        .arg(path)
        .output()?;
    ensure!(
        output.status.success(),
        "stopwatch failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let mut samples = Samples::default();
    for line in String::from_utf8(output.stdout)?.lines() {
        samples.add(line.parse()?);
    }
    Ok(samples)
}

struct Process {
    ms: f64,
    /// Most memory that it held, in megabytes.
    peak_mb: f64,
}

/// From its start to its end.
fn process(program: &Path, arguments: &[&str], path: &Path) -> Result<Process> {
    let begun = Instant::now();
    let child = Command::new(program)
        .args(arguments)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let peak_mb = wait(&child).with_context(|| format!("{} {}", program.display(), path.display()))?;
    let ms = begun.elapsed().as_secs_f64() * 1000.0;
    Ok(Process { ms, peak_mb })
}

/// As `Child::wait`, with the most memory that it held, in megabytes.
fn wait(child: &Child) -> Result<f64> {
    let pid = libc::pid_t::try_from(child.id())?;
    let mut status = 0;
    // SAFETY: all of it is numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the child is ours, and nobody else waits for it; both pointers are to what they should be.
    let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
    ensure!(waited == pid, "waiting: {}", std::io::Error::last_os_error());
    ensure!(status == 0, "it failed");
    // The kernel counts in units of 1024 bytes.
    let kilobytes = i32::try_from(usage.ru_maxrss)?;
    Ok(f64::from(kilobytes) * 1024.0 / 1_000_000.0)
}

const BUTANE: &str = "variant: flatcar\nversion: 1.0.0\n";

/// Units as they are written, the same in Butane and in a Container Linux Config; every fourth has a drop-in.
fn units(count: usize) -> String {
    let mut text = String::from("systemd:\n  units:\n");
    for number in 0..count {
        let _ = write!(
            text,
            "    - name: worker-{number}.service
      enabled: true
      contents: |
        [Unit]
        Description=Worker {number} of the queue, and what it keeps
        Documentation=https://docs.example.com/workers/{number}
        After=network-online.target docker.service
        Requires=docker.service
        [Service]
        EnvironmentFile=-/etc/worker/{number}.env
        ExecStartPre=-/usr/bin/docker rm --force worker-{number}
        ExecStart=/usr/bin/docker run --rm --name worker-{number} --publish {port}:8080 \\
          --volume /var/lib/worker/{number}:/data registry.example.com/worker:1.{number} --queue=jobs-{number} --log-level=info
        ExecStop=/usr/bin/docker stop --time 20 worker-{number}
        Restart=always
        RestartSec=5s
        LimitNOFILE=65536
        [Install]
        WantedBy=multi-user.target
",
            port = 20_000 + number,
        );
        if number % 4 == 0 {
            let _ = write!(
                text,
                "      dropins:
        - name: 10-limits.conf
          contents: |
            [Service]
            MemoryMax={}M
            CPUWeight=50
",
                256 + number,
            );
        }
    }
    text
}

/// Files with lines of settings, some `length` bytes each.
fn files(count: usize, length: usize) -> String {
    let mut text = format!("{BUTANE}storage:\n  files:\n");
    let mut number: u32 = 1;
    for file in 0..count {
        let _ = write!(
            text,
            "    - path: /etc/service/{file}.conf\n      mode: 0644\n      contents:\n        inline: |\n"
        );
        let end = text.len() + length;
        while text.len() < end {
            // Numbers that do not repeat: what is alike compresses better than settings do.
            number = number.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let _ = writeln!(
                text,
                "          option.{}.limit = {}  # of {}, until told otherwise",
                number >> 22,
                number >> 8,
                ["requests", "connections", "minutes"][(number >> 16) as usize % 3]
            );
        }
    }
    text
}
