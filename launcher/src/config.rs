//! What the admin of a node decides: `config.toml`. Every key has a default; a wrong one is refused with its place in the
//! file and what would have been right.

use std::{
    fmt::Display,
    ops::{Range, RangeInclusive},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use toml::Spanned;

use crate::{
    accel::AccelerationChoice,
    machine::{MEMORY_MIB_MAX, VCPUS_MAX},
    share_server,
};

/// Where the file is looked for when nobody names another.
pub const DEFAULT_PATH: &str = "/etc/coreos-kvm/config.toml";

/// The annotations of a pod that exist, without their prefix `coreos-kvm.io/`.
pub const ANNOTATIONS: [&str; 7] = [
    "config",
    "config-inline",
    "guest",
    "kernel-args",
    "memory",
    "template",
    "vcpus",
];

/// Processors that one machine may be given at most, whatever the file says (QEMU's q35 takes 288).
const VCPUS: RangeInclusive<u64> = 1..=VCPUS_MAX as u64;
/// MiB of memory that can be said, 64 MiB to 16 TiB.
const MEMORY_MIB: RangeInclusive<u64> = 64..=MEMORY_MIB_MAX;
/// A host does not give its own low uids to machines; the upper end keeps uids and gids inside 31 bits.
const UIDS: RangeInclusive<u64> = 1000..=0x7fff_0000;

/// The configuration, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Directory with one folder per guest.
    pub guests_dir: PathBuf,
    /// Guest of a machine that names none.
    pub guest: String,
    /// Image of the read-only disk with the agent.
    pub agent_disk: PathBuf,
    /// Directory in which each running machine has its folder.
    pub state_dir: PathBuf,
    /// The kubelet's own directory, where the volumes of pods are.
    pub kubelet_dir: PathBuf,
    /// QEMU, as a path or a name on PATH. The same holds for the other programs.
    pub qemu: PathBuf,
    pub virtiofsd: PathBuf,
    pub vhost_device_vsock: PathBuf,
    pub share_server: PathBuf,
    pub acceleration: AccelerationChoice,
    /// Processors of a machine that asks for none.
    pub vcpus: u32,
    /// Memory of a machine that asks for none, in MiB.
    pub memory_mib: u64,
    /// What a machine may ask for at most.
    pub max_vcpus: u32,
    pub max_memory_mib: u64,
    /// Memory that the guest itself needs beside its containers, in MiB; added to what these ask for.
    pub guest_memory_overhead_mib: u64,
    /// As [`Machine::boot_timeout`](crate::machine::Machine::boot_timeout).
    pub boot_timeout: Duration,
    /// Annotations that a pod may carry, without their prefix; each one of [`ANNOTATIONS`].
    pub annotations: Vec<String>,
    /// Whether machines are clones of templates.
    pub templates: Templates,
    /// How clones come to their memory.
    pub clone_mode: CloneModeChoice,
    /// Directory of the templates.
    pub template_dir: PathBuf,
    /// What all templates may take together, in MiB.
    pub template_space_mib: u64,
    /// uids (and gids of the same numbers) of which each running machine has one of its own.
    pub vm_uids: Range<u32>,
    pub log_level: LogLevel,
}

/// What a machine does that could be a clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Templates {
    /// It makes its template if there is none, and waits for one that another process makes.
    Wait,
    /// It makes its template if there is none, and boots while another process makes it.
    Boot,
    /// It boots.
    Off,
}

/// How clones come to their memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloneModeChoice {
    /// Copy-on-write where the node has what that needs, else by copy.
    Auto,
    CopyOnWrite,
    Copy,
}

/// How much is logged, as in the `tracing` crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// The level as the file has it; also a filter of `tracing-subscriber`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the configuration {} cannot be read", path.display())]
    Unreadable {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}:{line}: {problem}", path.display())]
    Wrong {
        path: PathBuf,
        line: usize,
        problem: String,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            guests_dir: "/var/lib/coreos-kvm/guests".into(),
            guest: "reference".to_owned(),
            agent_disk: "/var/lib/coreos-kvm/agent.erofs".into(),
            state_dir: "/run/coreos-kvm".into(),
            kubelet_dir: "/var/lib/kubelet".into(),
            qemu: "qemu-system-x86_64".into(),
            virtiofsd: "virtiofsd".into(),
            vhost_device_vsock: "vhost-device-vsock".into(),
            share_server: share_server::PROGRAM.into(),
            acceleration: AccelerationChoice::Auto,
            vcpus: 1,
            memory_mib: 512,
            max_vcpus: 32,
            max_memory_mib: 65536,
            guest_memory_overhead_mib: 256,
            boot_timeout: Duration::from_secs(120),
            templates: Templates::Wait,
            clone_mode: CloneModeChoice::Auto,
            template_dir: "/var/lib/coreos-kvm/templates".into(),
            template_space_mib: 8192,
            annotations: ["config", "config-inline", "guest", "memory", "template", "vcpus"]
                .map(str::to_owned)
                .to_vec(),
            vm_uids: 2_000_000..2_004_096,
            log_level: LogLevel::Info,
        }
    }
}

impl Config {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// When it cannot be read, is no TOML, has an unknown key or a value that is not allowed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text).map_err(|Problem { at, problem }| ConfigError::Wrong {
            path: path.to_owned(),
            line: line_of(&text, at),
            problem,
        })
    }

    /// Reads the file that the caller names, or, where none is named, that of [`DEFAULT_PATH`] if there is one.
    ///
    /// # Errors
    /// As [`Config::load`]; a named file has to exist.
    pub fn load_or_default(path: Option<&Path>) -> Result<Self, ConfigError> {
        match path {
            Some(path) => Self::load(path),
            None => match Self::load(Path::new(DEFAULT_PATH)) {
                Err(ConfigError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                    Ok(Self::default())
                }
                result => result,
            },
        }
    }

    /// Whether a pod may carry the annotation `coreos-kvm.io/<name>`.
    pub fn allows_annotation(&self, name: &str) -> bool {
        self.annotations.iter().any(|allowed| allowed == name)
    }

    fn parse(text: &str) -> Result<Self, Problem> {
        let keys: Keys = toml::from_str(text).map_err(|error| Problem {
            at: error.span().map_or(0, |span| span.start),
            problem: error.message().replace('\n', " "),
        })?;
        keys.checked()
    }
}

/// What is wrong, and at which byte of the text.
struct Problem {
    at: usize,
    problem: String,
}

impl Problem {
    fn new<T>(value: &Spanned<T>, problem: impl Into<String>) -> Self {
        Self {
            at: value.span().start,
            problem: problem.into(),
        }
    }
}

/// Lines count from 1.
fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
}

/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Keys {
    guests_dir: Option<Spanned<PathBuf>>,
    guest: Option<Spanned<String>>,
    agent_disk: Option<Spanned<PathBuf>>,
    state_dir: Option<Spanned<PathBuf>>,
    kubelet_dir: Option<Spanned<PathBuf>>,
    qemu: Option<Spanned<PathBuf>>,
    virtiofsd: Option<Spanned<PathBuf>>,
    vhost_device_vsock: Option<Spanned<PathBuf>>,
    share_server: Option<Spanned<PathBuf>>,
    acceleration: Option<AccelerationChoice>,
    vcpus: Option<Spanned<i64>>,
    memory_mib: Option<Spanned<i64>>,
    max_vcpus: Option<Spanned<i64>>,
    max_memory_mib: Option<Spanned<i64>>,
    guest_memory_overhead_mib: Option<Spanned<i64>>,
    boot_timeout_s: Option<Spanned<i64>>,
    templates: Option<Templates>,
    clone_mode: Option<CloneModeChoice>,
    template_dir: Option<Spanned<PathBuf>>,
    template_space_mib: Option<Spanned<i64>>,
    annotations: Option<Vec<Spanned<String>>>,
    vm_uid_first: Option<Spanned<i64>>,
    vm_uid_count: Option<Spanned<i64>>,
    log_level: Option<LogLevel>,
}

impl Keys {
    fn checked(self) -> Result<Config, Problem> {
        let mut config = Config::default();
        set(&mut config.guests_dir, "guests_dir", self.guests_dir, absolute)?;
        set(&mut config.guest, "guest", self.guest, |name| folder_name(name))?;
        set(&mut config.agent_disk, "agent_disk", self.agent_disk, absolute)?;
        set(&mut config.state_dir, "state_dir", self.state_dir, absolute)?;
        set(&mut config.kubelet_dir, "kubelet_dir", self.kubelet_dir, absolute)?;
        set(&mut config.qemu, "qemu", self.qemu, program)?;
        set(&mut config.virtiofsd, "virtiofsd", self.virtiofsd, program)?;
        set(
            &mut config.vhost_device_vsock,
            "vhost_device_vsock",
            self.vhost_device_vsock,
            program,
        )?;
        set(&mut config.share_server, "share_server", self.share_server, program)?;
        config.acceleration = self.acceleration.unwrap_or(config.acceleration);
        config.log_level = self.log_level.unwrap_or(config.log_level);

        // A bound follows the one it bounds, so that an error names the key that the admin has to look at.
        set(&mut config.max_vcpus, "max_vcpus", self.max_vcpus, number(VCPUS))?;
        set(
            &mut config.max_memory_mib,
            "max_memory_mib",
            self.max_memory_mib,
            number(MEMORY_MIB),
        )?;
        let (most_vcpus, most_memory) = (u64::from(config.max_vcpus), config.max_memory_mib);
        config.vcpus = config.vcpus.min(config.max_vcpus);
        config.memory_mib = config.memory_mib.min(config.max_memory_mib);
        set(&mut config.vcpus, "vcpus", self.vcpus, number(1..=most_vcpus))?;
        set(
            &mut config.memory_mib,
            "memory_mib",
            self.memory_mib,
            number(*MEMORY_MIB.start()..=most_memory),
        )?;
        set(
            &mut config.guest_memory_overhead_mib,
            "guest_memory_overhead_mib",
            self.guest_memory_overhead_mib,
            number(0..=most_memory),
        )?;

        let mut seconds = config.boot_timeout.as_secs();
        set(&mut seconds, "boot_timeout_s", self.boot_timeout_s, number(1..=3600))?;
        config.boot_timeout = Duration::from_secs(seconds);

        config.templates = self.templates.unwrap_or(config.templates);
        config.clone_mode = self.clone_mode.unwrap_or(config.clone_mode);
        set(&mut config.template_dir, "template_dir", self.template_dir, absolute)?;
        set(
            &mut config.template_space_mib,
            "template_space_mib",
            self.template_space_mib,
            number(MEMORY_MIB),
        )?;

        if let Some(names) = self.annotations {
            config.annotations = names.into_iter().map(annotation).collect::<Result<_, _>>()?;
        }

        let (mut first, mut count) = (config.vm_uids.start, config.vm_uids.end - config.vm_uids.start);
        set(&mut first, "vm_uid_first", self.vm_uid_first, number(UIDS))?;
        set(&mut count, "vm_uid_count", self.vm_uid_count, number(1..=65536))?;
        config.vm_uids = first..first + count;
        Ok(config)
    }
}

/// Replaces a default by what the file says, if it says something, and it is right.
fn set<T, V>(
    place: &mut T,
    key: &str,
    value: Option<Spanned<V>>,
    check: impl Fn(&V) -> Result<T, String>,
) -> Result<(), Problem> {
    if let Some(value) = value {
        *place = check(value.get_ref()).map_err(|problem| Problem::new(&value, format!("{key} {problem}")))?;
    }
    Ok(())
}

fn absolute(path: &PathBuf) -> Result<PathBuf, String> {
    if path.is_absolute() {
        Ok(path.clone())
    } else {
        Err(format!("is {path:?}; an absolute path is needed"))
    }
}

fn program(path: &PathBuf) -> Result<PathBuf, String> {
    if path.is_absolute() || path.components().count() == 1 {
        Ok(path.clone())
    } else {
        Err(format!(
            "is {path:?}; an absolute path or a plain name, looked for on PATH, is needed"
        ))
    }
}

fn folder_name(name: &str) -> Result<String, String> {
    crate::guest::check_name(name).map_err(|error| error.to_string())?;
    Ok(name.to_owned())
}

fn number<T: TryFrom<u64>>(allowed: RangeInclusive<u64>) -> impl Fn(&i64) -> Result<T, String> {
    move |value| {
        u64::try_from(*value)
            .ok()
            .filter(|value| allowed.contains(value))
            .and_then(|value| T::try_from(value).ok())
            .ok_or_else(|| format!("is {value}; allowed are {} to {}", allowed.start(), allowed.end()))
    }
}

fn annotation(name: Spanned<String>) -> Result<String, Problem> {
    if ANNOTATIONS.contains(&name.get_ref().as_str()) {
        Ok(name.into_inner())
    } else {
        let problem = format!(
            "annotations has {:?}; allowed are {}",
            name.get_ref(),
            quoted(ANNOTATIONS)
        );
        Err(Problem::new(&name, problem))
    }
}

fn quoted(names: impl IntoIterator<Item = impl Display>) -> String {
    names
        .into_iter()
        .map(|name| format!("\"{name}\""))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error_of(text: &str) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let error = Config::load(file.path()).unwrap_err().to_string();
        error.replace(&file.path().display().to_string(), "config.toml")
    }

    #[test]
    fn an_empty_file_means_the_defaults() {
        assert_eq!(Config::parse("").ok(), Some(Config::default()));
    }

    #[test]
    fn the_shipped_file_documents_every_key_with_its_default() {
        let shipped = include_str!("../../runtimeclass/config.toml");
        assert_eq!(Config::parse(shipped).ok(), Some(Config::default()), "as shipped");
        // With the comment signs of the keys taken away nothing may change.
        let spoken: String = shipped
            .lines()
            .map(|line| match line.strip_prefix("#") {
                Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) && key.contains(" = ") => key,
                _ => line,
            })
            .fold(String::new(), |text, line| text + line + "\n");
        let table: toml::Table = toml::from_str(&spoken).unwrap();
        assert_eq!(table.len(), 24, "{table:?}");
        assert_eq!(
            Config::parse(&spoken).map_err(|problem| problem.problem).ok(),
            Some(Config::default())
        );
    }

    #[rstest::rstest]
    #[case::unknown_key(
        "guest = \"a\"\n\nmemry = 3\n",
        "config.toml:3: unknown field `memry`, expected one of `guests_dir`, "
    )]
    #[case::unknown_word(
        "acceleration = \"xen\"",
        "config.toml:1: unknown variant `xen`, expected one of `auto`, `kvm`, `tcg`"
    )]
    #[case::wrong_type("\nvcpus = \"2\"", "config.toml:2: invalid type: string \"2\", expected i64")]
    #[case::too_small("memory_mib = 12", "config.toml:1: memory_mib is 12; allowed are 64 to 65536")]
    #[case::negative("vcpus = -1", "config.toml:1: vcpus is -1; allowed are 1 to 32")]
    #[case::above_own_maximum("max_vcpus = 2\nvcpus = 3", "config.toml:2: vcpus is 3; allowed are 1 to 2")]
    #[case::relative_path(
        "state_dir = \"run\"",
        "config.toml:1: state_dir is \"run\"; an absolute path is needed"
    )]
    #[case::unknown_annotation(
        "annotations = [\n \"guest\",\n \"root\"]",
        "config.toml:3: annotations has \"root\"; allowed are \"config\", \"config-inline\", \"guest\", \"kernel-args\", \"memory\", \"template\", \"vcpus\""
    )]
    #[case::guest_outside_its_directory("guest = \"../x\"", "config.toml:1: guest \"../x\" cannot name a guest")]
    #[case::no_toml("guest = ", "config.toml:1: ")]
    fn a_wrong_value_is_named_with_its_line(#[case] text: &str, #[case] expected: &str) {
        let error = error_of(text);
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn a_lower_maximum_lowers_the_default() {
        let config = Config::parse("max_memory_mib = 300").ok().unwrap();
        assert_eq!(config.memory_mib, 300);
    }

    #[test]
    fn a_named_file_has_to_exist() {
        let error = Config::load_or_default(Some(Path::new("/nonexistent/config.toml"))).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the configuration /nonexistent/config.toml cannot be read"
        );
    }
}
