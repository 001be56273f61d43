//! `coreos-kvm template`: the templates of this node, made ahead, listed, verified and removed.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use coreos_kvm_launcher::{
    config::Config,
    guest::Guest,
    machine::{Configuration, Growth, Machine, Network},
    sentence,
    size::Size,
    template::{Entry, Key, Lock, Store},
    vm,
};
use serde_json::json;
use tokio::{signal::ctrl_c, time::sleep};

use crate::{input, table::table};

/// Between two lines that say that something is still under way.
const NEWS: Duration = Duration::from_secs(5);
/// Between two looks at whether another process has finished.
const LOOK: Duration = Duration::from_millis(50);
/// Of a key, what people need to see to tell it from others; what they may write is any beginning that is one template's alone.
const SHORT: usize = 12;
const DAY: u64 = 24 * 3600;

const EXAMPLES: &str = "\
A template is a guest that was booted once on this node and saved; pods of the same guest, size and configuration are clones
of it. A pod makes its template itself where there is none: to make it ahead only saves the first pod that time.

Examples:
  For pods that ask for nothing:
    coreos-kvm template build
  For pods with 2 processors and 1 GiB of memory:
    coreos-kvm template build --vcpus 2 --memory 1G
  What there is, and how it is used:
    coreos-kvm template ls
  After a disk has failed:
    coreos-kvm template verify
  What nobody has used for a week:
    coreos-kvm template prune --unused-for 7";

#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Template {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes the template of a machine, so that the first one finds it.
    Build(Build),
    /// Lists the templates of this node, the last used first.
    Ls(Ls),
    /// Compares templates with what was saved. Exit code 1: one is not whole.
    Verify(Verify),
    /// Removes templates. Clones that run do not need theirs any more.
    Rm(Rm),
    /// Removes what is of no use any more: what is left of attempts, templates that cannot be used, those of an older guest or
    /// program once they are not used any more.
    Prune(Prune),
}

#[derive(Args)]
struct Build {
    /// The guest's name, as of a folder in `guests_dir`.
    #[arg(long)]
    guest: Option<String>,
    /// Number of processors.
    #[arg(long, value_name = "NUMBER")]
    vcpus: Option<u32>,
    /// Memory of the machine.
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// A further argument of the guest's kernel.
    #[arg(long = "kernel-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    kernel_args: Vec<String>,
    /// The configuration of pods that say coreos-kvm.io/template: "true", in any language that a pod's can have.
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// Make it anew, whether there is one or not.
    #[arg(long)]
    force: bool,
}

#[derive(Args)]
struct Ls {
    /// As one JSON array.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Verify {
    /// Keys, or what they begin with; left out: all templates.
    keys: Vec<String>,
}

#[derive(Args)]
struct Rm {
    /// Keys, or what they begin with.
    #[arg(required = true)]
    keys: Vec<String>,
}

#[derive(Args)]
struct Prune {
    /// All templates.
    #[arg(long, conflicts_with = "unused_for")]
    all: bool,
    /// Days after which a template goes that no machine has used.
    #[arg(long, value_name = "DAYS", default_value_t = 30)]
    unused_for: u64,
}

impl Template {
    pub(crate) async fn run(self, config: &Config) -> anyhow::Result<ExitCode> {
        let store = Store::open(&config.template_dir, config.template_space_mib << 20)?;
        match self.command {
            Command::Build(build) => build.run(config, &store).await?,
            Command::Ls(ls) => ls.run(&store)?,
            Command::Verify(verify) => return verify.run(&store),
            Command::Rm(rm) => rm.run(&store)?,
            Command::Prune(prune) => prune.run(&store)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Build {
    async fn run(self, config: &Config, store: &Store) -> anyhow::Result<()> {
        let machine = self.machine(config)?;
        let key = vm::template_key(config, &machine).await?;
        let begin = Instant::now();
        let right = telling("another process makes the template", right(store, &key)).await?;
        // Whoever had the right may just have made it.
        let there = match store.find(&key) {
            Ok(there) => there,
            Err(error) => {
                eprintln!("{}; it is made anew", sentence(&error));
                None
            }
        };
        if let (Some(template), false) = (there, self.force) {
            println!("{key}: is there already, {}", mib(template.manifest.bytes()));
            return Ok(());
        }
        let interruption = async {
            let _ = ctrl_c().await;
        };
        let made = vm::make_template(config, &machine, &right, interruption);
        let template = telling("the template is made", made).await?;
        let seconds = begin.elapsed().as_secs_f64();
        println!("{key}: made in {seconds:.1} s, {}", mib(template.manifest.bytes()));
        Ok(())
    }

    fn machine(&self, config: &Config) -> anyhow::Result<Machine> {
        let vcpus = self.vcpus.unwrap_or(config.vcpus);
        Ok(Machine {
            id: format!("template-{}", std::process::id()).parse()?,
            guest: Guest::load(&config.guests_dir, self.guest.as_deref().unwrap_or(&config.guest))?,
            vcpus,
            memory_mib: self.memory.map_or(config.memory_mib, Size::mib),
            growth: Some(Growth::within(vcpus, config.max_vcpus, config.max_memory_mib)),
            acceleration: config.acceleration,
            configuration: self.config_file.as_deref().map(configuration).transpose()?,
            hostname: None,
            kernel_args: self.kernel_args.clone(),
            network: Network::None,
            sandbox: None,
            disk: None,
            cgroup: None,
            boot_timeout: config.boot_timeout,
            cloneable: true,
        })
    }
}

fn configuration(path: &Path) -> anyhow::Result<Configuration> {
    let text = input::read(Some(path)).with_context(|| format!("the configuration {}", path.display()))?;
    let origin = path.display().to_string();
    Ok(Configuration { origin, text })
}

async fn right(store: &Store, key: &Key) -> anyhow::Result<Lock> {
    loop {
        if let Some(right) = store.try_lock(key)? {
            return Ok(right);
        }
        sleep(LOOK).await;
    }
}

/// Waits for `work`, and says that it is under way.
async fn telling<T, E: Into<anyhow::Error>>(what: &str, work: impl Future<Output = Result<T, E>>) -> anyhow::Result<T> {
    let begin = Instant::now();
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done.map_err(Into::into),
            () = sleep(NEWS) => eprintln!("{what}: {} s so far", begin.elapsed().as_secs()),
        }
    }
}

const HEAD: [&str; 9] = [
    "TEMPLATE",
    "GUEST",
    "VCPUS",
    "MEMORY",
    "KIND",
    "SIZE",
    "LAST USED",
    "CLONES",
    "FAILURES",
];

impl Ls {
    fn run(self, store: &Store) -> anyhow::Result<()> {
        let entries = store.entries()?;
        if self.json {
            let entries: Vec<_> = entries.iter().map(as_json).collect();
            println!("{}", serde_json::to_string_pretty(&entries)?);
            return Ok(());
        }
        let rows = entries.iter().map(row);
        let head = std::iter::once(HEAD.map(str::to_owned));
        print!("{}", table(&head.chain(rows).collect::<Vec<_>>()));
        for entry in &entries {
            if let Err(error) = &entry.manifest {
                println!("{}: {}", short(&entry.key), sentence(error));
            } else if let Some(failure) = &entry.uses.last_failure {
                println!("{}: the last failure: {failure}", short(&entry.key));
            }
        }
        Ok(())
    }
}

fn row(entry: &Entry) -> [String; 9] {
    let dash = || "-".to_owned();
    let used = age(entry.last_used);
    let counts = [entry.uses.clones.to_string(), entry.uses.failures.to_string()];
    let [clones, failures] = counts;
    match &entry.manifest {
        Ok(manifest) => [
            short(&entry.key),
            manifest.guest.clone(),
            manifest.vcpus.to_string(),
            format!("{} MiB", manifest.memory_mib),
            if manifest.own { "own" } else { "plain" }.to_owned(),
            mib(manifest.bytes()),
            used,
            clones,
            failures,
        ],
        Err(_) => [
            short(&entry.key),
            dash(),
            dash(),
            dash(),
            "unusable".to_owned(),
            dash(),
            used,
            clones,
            failures,
        ],
    }
}

fn as_json(entry: &Entry) -> serde_json::Value {
    let last_used = entry
        .last_used
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    json!({
        "key": entry.key,
        "manifest": entry.manifest.as_ref().ok(),
        "problem": entry.manifest.as_ref().err().map(|error| sentence(error)),
        "last_used": last_used.as_secs(),
        "uses": entry.uses,
    })
}

impl Verify {
    fn run(self, store: &Store) -> anyhow::Result<ExitCode> {
        let keys = if self.keys.is_empty() {
            store.entries()?.into_iter().map(|entry| entry.key).collect()
        } else {
            named(store, &self.keys)?
        };
        let mut wrong = 0;
        for key in &keys {
            let verified = store.open_named(key).and_then(|template| template.verify());
            match verified {
                Ok(()) => println!("ok     {key}"),
                Err(error) => {
                    wrong += 1;
                    println!(
                        "WRONG  {key}: {}; `coreos-kvm template rm {}` removes it",
                        sentence(&error),
                        short(key)
                    );
                }
            }
        }
        println!("{} templates, {wrong} of them not whole", keys.len());
        Ok(if wrong == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        })
    }
}

impl Rm {
    fn run(self, store: &Store) -> anyhow::Result<()> {
        for key in named(store, &self.keys)? {
            store.remove(&key)?;
            println!("{key}: removed");
        }
        Ok(())
    }
}

impl Prune {
    fn run(self, store: &Store) -> anyhow::Result<()> {
        let mut freed = store.sweep()?;
        let unused_for = Duration::from_secs(self.unused_for.saturating_mul(DAY));
        for entry in store.entries()? {
            let unused = SystemTime::now().duration_since(entry.last_used).unwrap_or_default();
            let (why, bytes) = match &entry.manifest {
                // What is somebody else's is not ours to remove.
                Err(error @ coreos_kvm_launcher::template::TemplateError::NotOurs { .. }) => {
                    println!("{}: stays: {}", short(&entry.key), sentence(error));
                    continue;
                }
                Err(error) => (sentence(error), 0),
                Ok(manifest) if self.all => ("all are to go".to_owned(), manifest.bytes()),
                Ok(manifest) if unused > unused_for => {
                    (format!("last used {}", age(entry.last_used)), manifest.bytes())
                }
                Ok(_) => continue,
            };
            store.remove(&entry.key)?;
            freed += bytes;
            println!("{}: removed: {why}", short(&entry.key));
        }
        println!("{} freed", mib(freed));
        Ok(())
    }
}

/// The keys that people mean.
fn named(store: &Store, beginnings: &[String]) -> anyhow::Result<Vec<String>> {
    let all: Vec<String> = store.entries()?.into_iter().map(|entry| entry.key).collect();
    beginnings.iter().map(|beginning| one_of(&all, beginning)).collect()
}

fn one_of(all: &[String], beginning: &str) -> anyhow::Result<String> {
    let mut found = all
        .iter()
        .filter(|key| key.starts_with(beginning) && !beginning.is_empty());
    match (found.next(), found.next()) {
        (Some(key), None) => Ok(key.clone()),
        (Some(one), Some(other)) => {
            bail!("{beginning:?} is the beginning of several templates, {one} and {other}: write more of it")
        }
        (None, _) => bail!("there is no template {beginning:?}; `coreos-kvm template ls` lists them"),
    }
}

fn short(key: &str) -> String {
    key.chars().take(SHORT).collect()
}

pub(crate) fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

fn age(since: SystemTime) -> String {
    let seconds = SystemTime::now().duration_since(since).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..DAY => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / DAY),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_names_one_template_or_none() {
        let all = ["aabb", "aacc", "dd00"].map(str::to_owned);
        assert_eq!(one_of(&all, "d").unwrap(), "dd00");
        assert_eq!(one_of(&all, "aab").unwrap(), "aabb");
        assert!(
            one_of(&all, "aa")
                .unwrap_err()
                .to_string()
                .contains("several templates")
        );
        assert!(one_of(&all, "x").unwrap_err().to_string().contains("template ls"));
        assert!(one_of(&all, "").is_err());
    }

    #[rstest::rstest]
    #[case(5, "5 s ago")]
    #[case(3700, "1 h ago")]
    #[case(3 * DAY, "3 days ago")]
    fn ages_are_told_in_the_largest_unit(#[case] seconds: u64, #[case] expected: &str) {
        assert_eq!(age(SystemTime::now() - Duration::from_secs(seconds)), expected);
    }
}
