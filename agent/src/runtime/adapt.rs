//! What the host's specifications become in this guest.

use std::{
    os::fd::{AsRawFd as _, BorrowedFd},
    path::Path,
};

use oci_spec::runtime::{LinuxNamespaceType, Process, Spec};

use super::seccomp;
use crate::passwd;

/// What holds for a container in this guest, whatever the host says: its cgroup is below the agent's, hooks are the host's affair,
/// a name that is shared with the guest is the guest's, and there is no AppArmor or SELinux.
pub(super) fn adapt(spec: &mut Spec, cgroup: &Path, terminal: bool) -> Result<(), String> {
    spec.set_hooks(None);
    let root = spec.root().as_ref().map(|root| root.path().clone());
    if let Some(mut linux) = spec.linux().clone() {
        linux.set_cgroups_path(Some(cgroup.to_owned()));
        linux.set_mount_label(None);
        // libcontainer knows the words without r alone, and takes them for the whole tree.
        let propagation = linux.rootfs_propagation().as_deref();
        let word = propagation.map(|word| word.strip_prefix('r').unwrap_or(word).to_owned());
        linux.set_rootfs_propagation(word);
        if let Some(mut profile) = linux.seccomp().clone() {
            seccomp::for_libcontainer(&mut profile)?;
            linux.set_seccomp(Some(profile));
        }
        let mut namespaces = linux.namespaces().iter().flatten();
        if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::Uts) {
            spec.set_hostname(None).set_domainname(None);
        }
        spec.set_linux(Some(linux));
    }
    if let Some(mut process) = spec.process().clone() {
        adapt_process(&mut process, terminal);
        let mut environment = process.env().clone().unwrap_or_default();
        if let (Some(root), false) = (root, has_variable(&environment, "HOME=")) {
            environment.push(format!("HOME={}", passwd::home(&root, process.user().uid())));
        }
        process.set_env(Some(environment));
        spec.set_process(Some(process));
    }
    Ok(())
}

/// Has the container enter a process namespace instead of making one. The descriptor has to stay open until it has.
pub(super) fn enter_processes(spec: &mut Spec, namespace: BorrowedFd<'_>) {
    let Some(mut linux) = spec.linux().clone() else { return };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    for own in &mut namespaces {
        if own.typ() == LinuxNamespaceType::Pid {
            own.set_path(Some(format!("/proc/self/fd/{}", namespace.as_raw_fd()).into()));
        }
    }
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
}

pub(super) fn adapt_process(process: &mut Process, terminal: bool) {
    process
        .set_apparmor_profile(None)
        .set_selinux_label(None)
        .set_terminal(Some(terminal));
    if process.no_new_privileges() == Some(false) {
        // The same, but libcontainer would apply the seccomp filter when it no longer may.
        process.set_no_new_privileges(None);
    }
    let mut environment = process.env().clone().unwrap_or_default();
    if !has_variable(&environment, "PATH=") {
        environment.push(DEFAULT_PATH.to_owned());
        process.set_env(Some(environment));
    }
}

/// Where programs are looked for if nobody says otherwise, as container engines have it.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

fn has_variable(environment: &[String], name: &str) -> bool {
    environment.iter().any(|variable| variable.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hooks_and_labels_of_the_host_do_not_reach_the_guest() {
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.0.2",
            "hooks": {"prestart": [{"path": "/bin/evil"}]},
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/", "apparmorProfile": "cri"},
            "linux": {"cgroupsPath": "/k8s.io/abc", "rootfsPropagation": "rslave"},
        }))
        .unwrap();
        adapt(&mut spec, Path::new("/system.slice/agent/abc"), true).unwrap();
        let propagation = spec.linux().as_ref().unwrap().rootfs_propagation().clone();
        assert_eq!(propagation.as_deref(), Some("slave"));
        assert!(spec.hooks().is_none());
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.apparmor_profile(), process.terminal()), (&None, Some(true)));
        let path = spec.linux().as_ref().unwrap().cgroups_path().clone();
        assert_eq!(path.unwrap(), Path::new("/system.slice/agent/abc"));
    }
}
