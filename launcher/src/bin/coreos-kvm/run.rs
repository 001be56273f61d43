//! `coreos-kvm run`: one machine without Kubernetes, described by flags or by the environment of a container.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::{Args, Command, builder::Resettable};
use coreos_kvm_ignition::Kind;
use coreos_kvm_launcher::{
    config::Config,
    disk::{Disk, Storage},
    forward,
    guest::Guest,
    machine::{Configuration, Machine, MachineId, Network},
    size::Size,
    vm::{Vm, VmError},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot},
    time::timeout,
};

use crate::{input, output::Output};

/// Pieces of what the guest prints, of up to 16 KiB, that wait for a slow reader of stdout.
const PIECES: usize = 256;
/// What such a reader is given for the rest when the machine has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

const EXAMPLES: &str = "\
What the guest prints on its serial console goes to stdout, how the machine is to stderr. SIGTERM and SIGINT power the guest
off in order, a second one at once. Exit code 0: the guest has powered off; 1: anything else, said in one sentence.

Examples:
  A machine with a user that logs in by its key:
    coreos-kvm run --config-file core.yaml --hostfwd hostfwd=tcp::2222-:22
    ssh -p 2222 core@127.0.0.1
  The same by environment, as in a container:
    CONFIG_FILE=/config/core.yaml VM_NAME=kube-0 VM_MEMORY=8G VM_DISK_SIZE=20G \\
      HOSTFWD=hostfwd=tcp::2222-:22,hostfwd=tcp:127.0.0.1:1443-:443 coreos-kvm run
  One whose disk stays, and with it everything that was changed:
    coreos-kvm run --disk /var/lib/kube-0.img --disk-size 20G
  The shortest boot, for a measurement:
    coreos-kvm run --no-network --no-disk --memory 512M --until-ready";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Run {
    /// Name of the machine; left out, it is made of the process id.
    #[arg(long, env = "VM_NAME")]
    name: Option<MachineId>,
    /// The guest's name, as of a folder in `guests_dir`.
    #[arg(long)]
    guest: Option<String>,
    /// A Container Linux Config or a Butane configuration.
    #[arg(long, env = "CONFIG_FILE", value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// An Ignition configuration.
    #[arg(long, alias = "ignition", env = "IGNITION_CONFIG_FILE", value_name = "FILE")]
    ignition_config_file: Option<PathBuf>,
    /// A cloud-config, or a script.
    #[arg(long, env = "CLOUD_CONFIG_FILE", value_name = "FILE")]
    cloud_config_file: Option<PathBuf>,
    /// Memory of the machine.
    #[arg(
        long,
        env = "VM_MEMORY",
        value_name = "SIZE",
        default_value = "4G",
        allow_hyphen_values = true
    )]
    memory: Size,
    /// Size of its disk, which takes as much room as the guest has written.
    #[arg(
        long,
        env = "VM_DISK_SIZE",
        value_name = "SIZE",
        default_value = "12G",
        allow_hyphen_values = true
    )]
    disk_size: Size,
    /// A file to keep the disk in, made where it is missing; left out, the disk is gone with the machine.
    #[arg(long, value_name = "FILE")]
    disk: Option<PathBuf>,
    /// No disk: whatever the guest writes is in its memory.
    #[arg(long, conflicts_with = "disk")]
    no_disk: bool,
    /// Ports of the host that lead to ports of the guest, in QEMU's syntax, several by commas.
    #[arg(long, env = "HOSTFWD", value_name = "FORWARDS", allow_hyphen_values = true)]
    hostfwd: Option<String>,
    /// No network but the guest's loopback.
    #[arg(long)]
    no_network: bool,
    /// Number of processors.
    #[arg(long, value_name = "NUMBER")]
    vcpus: Option<u32>,
    /// A further argument of the guest's kernel.
    #[arg(long = "kernel-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    kernel_args: Vec<String>,
    /// Seconds that the guest is given to power off, before it is killed.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
    /// End the machine as soon as its agent answers, and print on stdout how long that took instead of the console.
    #[arg(long)]
    until_ready: bool,
}

impl Run {
    pub(crate) async fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let machine = self.machine(config)?;
        let mut interruption = Interruption::new()?;
        let (console, shown) = if self.until_ready { (None, None) } else { show()? };
        let begin = Instant::now();
        let outcome = match Vm::start_unless(interruption.came(), config, machine, console).await {
            Ok(vm) => self.stay(&vm, begin, &mut interruption).await,
            Err(VmError::Cancelled) => Err(anyhow::anyhow!("interrupted before the machine was up")),
            Err(error) => Err(error.into()),
        };
        if let Some(shown) = shown {
            // Whoever reads that late has gone.
            let _ = timeout(LAST_WORDS, shown).await;
        }
        outcome
    }

    async fn stay(&self, vm: &Vm, begin: Instant, interruption: &mut Interruption) -> anyhow::Result<ExitCode> {
        let ready = serde_json::json!({ "ready_s": begin.elapsed().as_secs_f64(), "machine": vm.info() });
        if self.until_ready {
            println!("{ready}");
            vm.shutdown(Duration::ZERO).await?;
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("{ready}");
        tokio::select! {
            _ = vm.exited() => {}
            () = interruption.came() => {}
        }
        let ended = tokio::select! {
            ended = vm.shutdown(Duration::from_secs(self.grace)) => Some(ended),
            () = interruption.came() => None,
        };
        match ended {
            Some(ended) => ended?,
            None => vm.shutdown(Duration::ZERO).await?,
        }
        let exit = vm.exited().await;
        eprintln!("{}", serde_json::to_string(&exit)?);
        Ok(if exit.orderly {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }

    /// The machine that is asked for. What is wrong with it is said before anything is made.
    fn machine(&self, config: &Config) -> anyhow::Result<Machine> {
        if self.no_network && self.hostfwd.as_deref().is_some_and(|forwards| !forwards.is_empty()) {
            bail!("without a network there is nothing to forward to: leave out --no-network, or HOSTFWD (--hostfwd)");
        }
        Ok(Machine {
            id: match &self.name {
                Some(id) => id.clone(),
                None => format!("run-{}", std::process::id()).parse()?,
            },
            guest: Guest::load(&config.guests_dir, self.guest.as_deref().unwrap_or(&config.guest))?,
            vcpus: self.vcpus.unwrap_or(config.vcpus),
            memory_mib: self.memory.mib(),
            growth: None,
            acceleration: config.acceleration,
            configuration: self.configuration()?,
            hostname: self.name.as_ref().map(ToString::to_string),
            kernel_args: self.kernel_args.clone(),
            network: if self.no_network {
                Network::None
            } else {
                Network::User {
                    forwards: forward::parse_list(self.hostfwd.as_deref().unwrap_or_default())?,
                }
            },
            sandbox: None,
            disk: (!self.no_disk).then(|| Disk {
                size: self.disk_size,
                storage: self.disk.clone().map_or(Storage::Ephemeral, Storage::File),
            }),
            cgroup: None,
            boot_timeout: config.boot_timeout,
            cloneable: false,
        })
    }

    /// The text of the one configuration that is given.
    fn configuration(&self) -> anyhow::Result<Option<Configuration>> {
        let all = [&self.config_file, &self.ignition_config_file, &self.cloud_config_file];
        let mut given = all
            .iter()
            .zip(&SOURCES)
            .filter_map(|(path, source)| Some((path.as_deref()?, source)));
        let Some((path, source)) = given.next() else {
            return Ok(None);
        };
        if let Some((other_path, other)) = given.next() {
            bail!(
                "a machine has one configuration, and two are given: {} is {}, {} is {}; leave one out",
                source.name,
                path.display(),
                other.name,
                other_path.display()
            );
        }
        let text = input::read(Some(path)).with_context(|| format!("the configuration of {}", source.name))?;
        // What is in no language is told when it is translated, with its place.
        if let Ok(kind) = Kind::of(&text) {
            source.check(kind, path)?;
        }
        let origin = path.display().to_string();
        Ok(Some(Configuration { origin, text }))
    }
}

/// A variable, or flag, that names a configuration.
struct Source {
    name: &'static str,
    /// The languages that it takes.
    kinds: [Kind; 2],
}

const SOURCES: [Source; 3] = [
    Source {
        name: "CONFIG_FILE (--config-file)",
        kinds: [Kind::ContainerLinuxConfig, Kind::Butane],
    },
    Source {
        name: "IGNITION_CONFIG_FILE (--ignition-config-file)",
        kinds: [Kind::Ignition, Kind::Ignition],
    },
    Source {
        name: "CLOUD_CONFIG_FILE (--cloud-config-file)",
        kinds: [Kind::CloudConfig, Kind::Script],
    },
];

impl Source {
    fn check(&self, kind: Kind, path: &Path) -> anyhow::Result<()> {
        match SOURCES.iter().find(|source| source.kinds.contains(&kind)) {
            Some(right) if !self.kinds.contains(&kind) => bail!(
                "{} is {}, which reads as {kind}: give it as {}",
                self.name,
                path.display(),
                right.name
            ),
            _ => Ok(()),
        }
    }
}

/// Of a variable that is set to nothing nothing is known: the default counts.
pub(crate) fn without_empty_variables(command: Command) -> Command {
    command.mut_args(|argument| match argument.get_env() {
        Some(name) if std::env::var_os(name).is_some_and(|value| value.is_empty()) => argument.env(Resettable::Reset),
        _ => argument,
    })
}

/// SIGINT and SIGTERM.
struct Interruption {
    interrupt: Signal,
    terminate: Signal,
}

impl Interruption {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn came(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

type Shown = (Option<mpsc::Sender<Vec<u8>>>, Option<oneshot::Receiver<()>>);

/// Shows on stdout what is sent, from a thread: whoever reads stdout may be slow, or stop, and the machine goes on. The receiver
/// hears when everything is shown.
fn show() -> anyhow::Result<Shown> {
    let (sender, mut pieces) = mpsc::channel::<Vec<u8>>(PIECES);
    let (done, shown) = oneshot::channel();
    let work = move || {
        let mut output = Output::new();
        while let Some(piece) = pieces.blocking_recv() {
            // Nobody reads any more.
            if output.print(&piece).is_err() {
                break;
            }
        }
        let _ = done.send(());
    };
    std::thread::Builder::new().name("console".to_owned()).spawn(work)?;
    Ok((Some(sender), Some(shown)))
}
