//! A container's seccomp filter, translated once. libseccomp needs many times as long for that as a process needs for all the rest
//! of its start, so the first further process of a container leaves the translation for those after it.

use std::{
    error::Error,
    fs::File,
    io::{self, Read, Seek},
    path::Path,
};

use libseccomp::{ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall};
use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompArgBuilder, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};
use rustix::fs::{MemfdFlags, memfd_create};

use super::chain;

/// File of a bundle with the translation.
const FILTER: &str = "seccomp.bpf";

/// A translated filter: instructions of `struct sock_filter`, and flags of seccomp(2).
#[derive(Debug)]
pub(super) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: libc::c_ulong,
}

/// The filter of the container whose bundle is at `bundle`.
pub(super) fn filter(bundle: &Path, profile: &LinuxSeccomp) -> Result<Filter, String> {
    let flags = flags(profile)?;
    let path = bundle.join(FILTER);
    let program = match std::fs::read(&path) {
        Ok(program) => program,
        Err(_) => {
            let program =
                translate(profile).map_err(|error| format!("translating the seccomp profile failed: {error}"))?;
            // Whole or not at all; whoever comes at the same time writes the same. Without it the next one takes longer.
            let fresh = bundle.join(format!("{FILTER}.{}", std::process::id()));
            let _ = std::fs::write(&fresh, &program).and_then(|()| std::fs::rename(&fresh, &path));
            program
        }
    };
    let program = program.chunks_exact(8).map(|bytes| libc::sock_filter {
        code: u16::from_ne_bytes([bytes[0], bytes[1]]),
        jt: bytes[2],
        jf: bytes[3],
        k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
    });
    Ok(Filter {
        program: program.collect(),
        flags,
    })
}

impl Filter {
    /// Puts the calling process behind it for ever.
    pub(super) fn apply(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(self.program.len()).map_err(io::Error::other)?,
            filter: self.program.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel copies the program, which it does not change.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const program,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

fn flags(profile: &LinuxSeccomp) -> Result<libc::c_ulong, String> {
    let mut all = 0;
    for flag in profile.flags().iter().flatten() {
        all |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            // There is one thread, and nobody who is notified.
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync
            | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
        };
    }
    let notifies = |action| action == LinuxSeccompAction::ScmpActNotify;
    if notifies(profile.default_action()) || profile.syscalls().iter().flatten().any(|rule| notifies(rule.action())) {
        return Err("a seccomp profile that notifies is not supported".to_owned());
    }
    Ok(all)
}

fn translate(profile: &LinuxSeccomp) -> Result<Vec<u8>, Box<dyn Error>> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default)?;
    for arch in profile.architectures().iter().flatten() {
        let arch: ScmpArch = arch.to_string().parse()?;
        context.add_arch(arch)?;
    }
    for rule in profile.syscalls().iter().flatten() {
        let wanted = action(rule.action(), rule.errno_ret())?;
        if wanted == default {
            continue;
        }
        let conditions = rule
            .args()
            .iter()
            .flatten()
            .map(condition)
            .collect::<Result<Vec<_>, _>>()?;
        let unique = conditions
            .iter()
            .enumerate()
            .all(|(at, one)| conditions[..at].iter().all(|other| other.0 != one.0));
        let conditions: Vec<_> = conditions.into_iter().map(|(_, condition)| condition).collect();
        for name in rule.names() {
            // A call that there is not in this kernel's time need not be allowed, nor forbidden.
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            if unique {
                context.add_rule_conditional(wanted, call, &conditions)?;
            } else {
                // Several conditions on one argument are alternatives, as runc has it.
                for condition in &conditions {
                    context.add_rule_conditional(wanted, call, std::slice::from_ref(condition))?;
                }
            }
        }
    }
    let mut file = File::from(memfd_create("seccomp", MemfdFlags::CLOEXEC)?);
    context.export_bpf(&file)?;
    let mut program = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut program)?;
    Ok(program)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction, Box<dyn Error>> {
    let errno = errno.map_or(Ok(libc::EPERM), i32::try_from)?;
    Ok(ScmpAction::from_str(&action.to_string(), Some(errno))?)
}

fn condition(arg: &LinuxSeccompArg) -> Result<(u32, ScmpArgCompare), Box<dyn Error>> {
    let index = u32::try_from(arg.index())?;
    let second = arg.value_two().unwrap_or_default();
    let (operator, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        LinuxSeccompOperator::ScmpCmpMaskedEq => (ScmpCompareOp::MaskedEqual(arg.value()), second),
    };
    Ok((index, ScmpArgCompare::new(index, operator, value)))
}

/// libcontainer reads a masked comparison the wrong way round, and would thereby allow clone(2) with any flag: answers the profile
/// as libcontainer has to be told it.
pub(super) fn for_libcontainer(profile: &mut LinuxSeccomp) -> Result<(), String> {
    let mut rules = profile.syscalls().clone().unwrap_or_default();
    for rule in &mut rules {
        let mut conditions = rule.args().clone().unwrap_or_default();
        for condition in &mut conditions {
            if condition.op() == LinuxSeccompOperator::ScmpCmpMaskedEq {
                *condition = LinuxSeccompArgBuilder::default()
                    .index(condition.index())
                    .op(condition.op())
                    .value(condition.value_two().unwrap_or_default())
                    .value_two(condition.value())
                    .build()
                    .map_err(|error| chain(&error))?;
            }
        }
        if !conditions.is_empty() {
            rule.set_args(Some(conditions));
        }
    }
    profile.set_syscalls(Some(rules));
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};

    use super::*;

    fn profile() -> LinuxSeccomp {
        serde_json::from_value(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [
                { "names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95,
                  "args": [{ "index": 0, "value": libc::CLONE_FILES, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
                { "names": ["getppid", "no_such_call"], "action": "SCMP_ACT_ERRNO" },
            ],
        }))
        .unwrap()
    }

    /// Whether getppid(2) fails, and clone(2) without and with CLONE_FILES, behind a filter.
    fn errors_behind(apply: impl FnOnce() -> bool) -> [i32; 3] {
        let _alone = crate::reaper::tests::CHILDREN.blocking_lock();
        // SAFETY: the child makes system calls and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut told = 0;
            if nix::sys::prctl::set_no_new_privs().is_ok() && apply() {
                let failed = |result: libc::c_long| i32::from(result < 0);
                // SAFETY: a clone without a stack is a fork, and ends at once.
                let clone = |flags: libc::c_int| unsafe {
                    let result = libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0);
                    if result == 0 {
                        libc::_exit(0);
                    }
                    result
                };
                // SAFETY: it has no arguments.
                let parent = failed(unsafe { libc::syscall(libc::SYS_getppid) });
                told = 8 | parent | (failed(clone(0)) << 1) | (failed(clone(libc::CLONE_FILES)) << 2);
            }
            // SAFETY: nothing of the test is to run twice.
            unsafe { libc::_exit(told) };
        }
        match waitpid(nix::unistd::Pid::from_raw(child), None).unwrap() {
            WaitStatus::Exited(_, told) if told & 8 != 0 => [told & 1, (told >> 1) & 1, (told >> 2) & 1],
            status => panic!("the filter was not applied: {status:?}"),
        }
    }

    #[test]
    fn what_a_profile_forbids_fails_and_the_translation_is_kept() {
        let bundle = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let filter = filter(bundle.path(), &profile()).unwrap();
            assert_eq!(errors_behind(|| filter.apply().is_ok()), [1, 1, 0]);
            assert!(bundle.path().join(FILTER).exists());
        }
    }

    #[test]
    fn libcontainer_forbids_the_same() {
        let mut profile = profile();
        for_libcontainer(&mut profile).unwrap();
        let apply = || libcontainer::seccomp::initialize_seccomp(&profile).is_ok();
        assert_eq!(errors_behind(apply), [1, 1, 0]);
    }

    #[test]
    fn a_profile_that_notifies_is_refused() {
        let mut notifying = profile();
        notifying.set_default_action(LinuxSeccompAction::ScmpActNotify);
        assert!(filter(Path::new("/nonexistent"), &notifying).is_err());
    }
}
