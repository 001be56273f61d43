//! What makes a guest this pod's: its name, its clock, its settings; and what it says of itself.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Write},
    net::Ipv6Addr,
    os::{fd::AsRawFd, unix::fs::FileExt as _},
    path::{Component, Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use coreos_kvm_proto::{SEED_LENGTH, agent::Awakening};
use nix::{
    sys::time::{TimeSpec, TimeValLike},
    time::{ClockId, clock_gettime, clock_settime},
};

use crate::{error::AgentError, quiet};

/// `uname -r`.
pub(crate) fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// PRETTY_NAME of os-release(5).
pub(crate) fn os_name() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches(['"', '\'']).to_owned()
}

/// Sets the wall clock, in nanoseconds since the epoch.
fn set_clock(wall_ns: i64) -> Result<(), AgentError> {
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::nanoseconds(wall_ns))
        .map_err(AgentError::failed("setting the clock failed"))
}

/// Has the clock run faster or slower until it has made up for that: adjtimex(2), `ADJ_OFFSET_SINGLESHOT`.
fn slew_clock(by_ns: i64) -> Result<(), AgentError> {
    // SAFETY: a structure of integers.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = by_ns / 1000;
    // SAFETY: the kernel reads and writes the structure, which lives longer than the call.
    let result = nix::Error::result(unsafe { libc::adjtimex(&raw mut change) });
    result
        .map(drop)
        .map_err(AgentError::failed("adjusting the clock failed"))
}

/// Adds so many nanoseconds to the wall clock, at once or bit by bit, and answers what it then is.
pub(crate) fn adjust_clock(by_ns: i64, slowly: bool) -> Result<i64, AgentError> {
    if by_ns != 0 && slowly {
        slew_clock(by_ns)?;
    } else if by_ns != 0 {
        let wanted = clock_ns()?.checked_add(by_ns).filter(|wanted| *wanted >= 0);
        set_clock(wanted.ok_or_else(|| AgentError::InvalidArgument(format!("{by_ns} ns lead out of time")))?)?;
    }
    clock_ns()
}

/// The wall clock, in nanoseconds since the epoch.
fn clock_ns() -> Result<i64, AgentError> {
    clock_gettime(ClockId::CLOCK_REALTIME)
        .map(|now| now.num_nanoseconds())
        .map_err(AgentError::failed("reading the clock failed"))
}

/// Sets the guest's name; an empty one leaves it.
pub(crate) fn set_hostname(name: &str) -> Result<(), AgentError> {
    if name.is_empty() {
        return Ok(());
    }
    nix::unistd::sethostname(name).map_err(AgentError::failed("setting the hostname failed"))
}

/// Sets the pod's sysctls, named with dots or slashes as by sysctl(8).
pub(crate) fn set_sysctls(sysctls: &HashMap<String, String>) -> Result<(), AgentError> {
    for (name, value) in sysctls {
        let path = sysctl_path(name).ok_or_else(|| AgentError::InvalidArgument(format!("{name:?} is no sysctl")))?;
        std::fs::write(&path, value).map_err(AgentError::failed(format!("setting the sysctl {name} failed")))?;
    }
    Ok(())
}

fn sysctl_path(name: &str) -> Option<PathBuf> {
    // With a slash first, dots are part of the names.
    let separator = name.find(['.', '/']).map(|at| name.as_bytes()[at]);
    let relative = if separator == Some(b'.') {
        name.replace('.', "/")
    } else {
        name.to_owned()
    };
    let relative = Path::new(&relative);
    let inside = relative.components().all(|part| matches!(part, Component::Normal(_)));
    (inside && relative.components().count() > 1).then(|| Path::new("/proc/sys").join(relative))
}

/// Ends the guest in order: systemd stops what runs and unmounts.
pub(crate) fn power_off() -> Result<(), AgentError> {
    Command::new("systemctl")
        .args(["--no-block", "poweroff"])
        .spawn()
        .map(drop)
        .map_err(AgentError::failed("asking systemd to power off failed"))
}

/// What tells one boot of one machine from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ids {
    pub boot_id: [u8; 16],
    pub machine_id: [u8; 16],
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const MACHINE_ID: &str = "/etc/machine-id";

/// A machine id as text. In a clone the host has replaced the template's ids, wherever they were as bytes.
pub(crate) struct MachineName(String);

impl Ids {
    /// The machine's id as text.
    pub(crate) fn machine_name(&self) -> MachineName {
        MachineName(id_text(self.machine_id))
    }

    /// Those of the machine now.
    pub(crate) fn read() -> Result<Self> {
        Ok(Self {
            boot_id: read_id(BOOT_ID)?,
            machine_id: read_id(MACHINE_ID)?,
        })
    }
}

fn read_id(path: &str) -> Result<[u8; 16]> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    parse_id(text.trim()).with_context(|| format!("{path} has no id of 128 bits"))
}

/// Hexadecimal, with or without the dashes of RFC 4122.
fn parse_id(text: &str) -> Option<[u8; 16]> {
    let text = text.replace('-', "");
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&text, 16).ok().map(u128::to_be_bytes)
}

/// The text of machine-id(5), without a newline.
fn id_text(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}

impl Ids {
    /// Does once what [`renew`] does in each clone, and leaves the machine what it is.
    ///
    /// # Errors
    /// What a clone would fail with.
    pub(crate) fn rehearse(self) -> Result<()> {
        let mut seed = vec![0; SEED_LENGTH];
        std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut seed)?;
        // There, under a name that nobody has, and back.
        let (own, another) = (id_text(self.machine_id), id_text(self.boot_id));
        quiet::rename_journals(&own, &another)?;
        quiet::rename_journals(&another, &own)?;
        let told = Awakening {
            seed,
            boot_id: self.boot_id.to_vec(),
            machine_id: self.machine_id.to_vec(),
            wall_clock_ns: clock_ns()?,
            ..Default::default()
        };
        renew(&self.machine_name(), &told)
    }
}

/// Makes a clone a machine of its own: what its kernel takes for random first, for all else may be made of that.
///
/// # Errors
/// When something of it still is the template's.
pub(crate) fn renew(template: &MachineName, told: &Awakening) -> Result<()> {
    reseed(&told.seed).context("reseeding the kernel's random numbers")?;
    set_clock(told.wall_clock_ns).context("setting the clock")?;
    let id = |bytes: &[u8]| <[u8; 16]>::try_from(bytes).context("an id has 16 bytes");
    let own = Ids {
        boot_id: id(&told.boot_id)?,
        machine_id: id(&told.machine_id)?,
    };
    write_machine_id(own.machine_id).context("writing the machine id")?;
    quiet::rename_journals(&template.0, &id_text(own.machine_id))?;
    // The host has changed the boot's id where the kernel keeps it.
    if Ids::read()? != own {
        bail!("the machine still has the ids of its template");
    }
    renew_stable_secrets()
}

/// In place, for it may be a mount of its own, and over what is there: to empty a file first is about a thousand blocks of the
/// kernel's code that a clone runs for nothing else.
fn write_machine_id(id: [u8; 16]) -> io::Result<()> {
    let text = id_text(id) + "\n";
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(MACHINE_ID)?;
    file.write_all_at(text.as_bytes(), 0)?;
    let length = text.len() as u64;
    if file.metadata()?.len() != length {
        file.set_len(length)?;
    }
    Ok(())
}

/// ioctls of random(4).
mod random {
    nix::ioctl_write_ptr_bad!(
        add_entropy,
        nix::request_code_write!(b'R', 0x03, 8),
        [u8; 8 + super::SEED_LENGTH]
    );
    nix::ioctl_none!(reseed_crng, b'R', 0x07);
}

fn reseed(seed: &[u8]) -> Result<()> {
    ensure!(
        seed.len() == SEED_LENGTH,
        "a seed has {SEED_LENGTH} bytes, not {}",
        seed.len()
    );
    // struct rand_pool_info: the number of random bits, the number of bytes, the bytes.
    let mut info = [0; 8 + SEED_LENGTH];
    let length = i32::try_from(SEED_LENGTH)?;
    info[..4].copy_from_slice(&(8 * length).to_ne_bytes());
    info[4..8].copy_from_slice(&length.to_ne_bytes());
    info[8..].copy_from_slice(seed);
    let device = File::options().write(true).open("/dev/random")?;
    // SAFETY: the structure is whole, and only read.
    unsafe { random::add_entropy(device.as_raw_fd(), &raw const info) }?;
    // SAFETY: takes nothing.
    unsafe { random::reseed_crng(device.as_raw_fd()) }?;
    Ok(())
}

/// New secrets for the IPv6 addresses of interfaces, where the template has any: ip-sysctl, stable_secret.
fn renew_stable_secrets() -> Result<()> {
    for interface in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{interface}/stable_secret");
        // One that is not set cannot be read.
        if std::fs::read(&path).is_ok() {
            let mut secret = [0; 16];
            std::io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut secret)?;
            let mut file = File::options().write(true).open(&path)?;
            file.write_all(Ipv6Addr::from(secret).to_string().as_bytes())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[rstest::rstest]
    #[case("00112233-4455-6677-8899-aabbccddeeff")]
    #[case("00112233445566778899aabbccddeeff")]
    fn ids_are_read_as_kernel_and_systemd_write_them(#[case] text: &str) {
        let id = parse_id(text).unwrap();
        assert_eq!((id[0], id[1], id[15]), (0, 0x11, 0xff));
        assert_eq!(id_text(id), "00112233445566778899aabbccddeeff");
    }

    #[rstest::rstest]
    #[case("")]
    #[case("uninitialized")]
    #[case("0011")]
    #[case("+0112233445566778899aabbccddeeff")]
    fn what_is_no_id_is_none(#[case] text: &str) {
        assert_eq!(parse_id(text), None);
    }

    #[test]
    fn sysctls_are_found_and_stay_in_their_folder() {
        let path = |name| sysctl_path(name).map(|path| path.to_string_lossy().into_owned());
        assert_eq!(
            path("kernel.shm_rmid_forced").unwrap(),
            "/proc/sys/kernel/shm_rmid_forced"
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").unwrap(),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        for name in ["", "kernel", "../../etc/passwd", "/etc/passwd", "net/../../x"] {
            assert_eq!(path(name), None, "{name}");
        }
    }
}
