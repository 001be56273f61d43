//! The tree that the real `ignition` writes for a configuration, in a folder of its own.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;

use crate::tools;

/// A root as a first boot leaves it.
pub(crate) struct Tree {
    folder: TempDir,
    /// What was there before Ignition ran, as paths in the tree.
    pub(crate) before: BTreeSet<PathBuf>,
    pub(crate) users_before: BTreeSet<String>,
    /// The configuration as Ignition merged it, in its own newest version.
    pub(crate) merged: Value,
}

impl Tree {
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("root")
    }

    /// Where a path of the configuration is on this machine: links on the way stay in the tree, the last one is not followed.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        let root = self.root();
        // Ends: a link leads to at most as many more parts as its target has, and no trial has links in a circle.
        let mut ahead: Vec<_> = Path::new(path)
            .components()
            .rev()
            .map(|part| part.as_os_str().to_owned())
            .collect();
        let mut here = root.clone();
        while let Some(part) = ahead.pop() {
            match Path::new(&part).components().next() {
                Some(Component::Normal(name)) => {
                    let next = here.join(name);
                    match fs::read_link(&next) {
                        Ok(target) if !ahead.is_empty() => {
                            ahead.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
                        }
                        _ => here = next,
                    }
                }
                Some(Component::RootDir) => here.clone_from(&root),
                Some(Component::ParentDir) if here != root => {
                    here.pop();
                }
                _ => {}
            }
        }
        here
    }

    /// All paths in the tree, each as the booted machine would call it.
    pub(crate) fn paths(&self) -> BTreeSet<PathBuf> {
        paths(&self.root())
    }
}

/// Runs `ignition`'s stages `fetch` and `files` over a configuration of 3.0 to 3.3.
///
/// What needs a network or a disk is taken out before ([`offline`]); the rest is Ignition's own work.
///
/// # Errors
/// What Ignition's log says of a failure.
pub(crate) fn write_tree(config: &str) -> Result<Tree, String> {
    let we = fs::metadata("/proc/self").expect("/proc is mounted").uid();
    assert_eq!(
        we, 0,
        "ignition gives files to their owners, so these tests have to be root; do: sudo ./devtool test"
    );
    let config: Value = serde_json::from_str(config).map_err(|error| error.to_string())?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let place = folder.path();
    fs::write(place.join("config.ign"), offline(config).to_string()).expect("a file");
    let root = place.join("root");
    lay_root(&root);
    let before = paths(&root);
    let users_before = fs::read_to_string(root.join("etc/passwd")).expect("it was just written");
    let users_before = users_before
        .lines()
        .filter_map(|line| line.split(':').next())
        .map(str::to_owned)
        .collect();

    // It labels files by what SELinux says even where SELinux is off; nothing here has labels.
    let programs = place.join("programs");
    fs::create_dir(&programs).expect("a folder");
    fs::write(programs.join("setfiles"), "#!/bin/sh\n").expect("a file");
    fs::set_permissions(programs.join("setfiles"), fs::Permissions::from_mode(0o755)).expect("a mode");

    for stage in ["fetch", "files"] {
        run_stage(place, &programs, stage)?;
    }
    let merged = fs::read(place.join("cache.json")).expect("the fetch stage leaves what it merged");
    let merged = serde_json::from_slice(&merged).expect("it is JSON");
    Ok(Tree {
        folder,
        before,
        users_before,
        merged,
    })
}

fn run_stage(place: &Path, programs: &Path, stage: &str) -> Result<(), String> {
    let option = |name: &str, file: &str| format!("--{name}={}", place.join(file).display());
    // Through a shell for the umask, which is a system's default at a first boot.
    let output = Command::new("/bin/sh")
        .args(["-c", "umask 022; exec \"$@\"", "sh"])
        .arg(tools::ignition())
        .args(["--platform=file", "--log-to-stdout", &format!("--stage={stage}")])
        .args([option("root", "root"), option("config-cache", "cache.json")])
        .args([option("neednet", "neednet"), option("state-file", "state.json")])
        .env("IGNITION_CONFIG_FILE", place.join("config.ign"))
        // A machine's own base configuration is not the trial's.
        .env("IGNITION_SYSTEM_CONFIG_DIR", place.join("none"))
        .env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", programs.display()))
        .output()
        .expect("ignition starts");
    let log = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    // Having written everything, it asks the running systemd for its version if a unit has instances. That this machine
    // has no systemd is not the configuration's fault.
    let only_no_systemd = log.contains("failed to create units: dial unix /run/systemd/private: connect:");
    if output.status.success() || only_no_systemd {
        return Ok(());
    }
    let told: Vec<_> = log.lines().filter(|line| line.starts_with("CRITICAL")).collect();
    Err(if told.is_empty() { log } else { told.join("\n") })
}

/// A root with what `ignition` and the programs that it calls need, and the users of a Container Linux.
fn lay_root(root: &Path) {
    let users = [
        ("root", 0, "/root", "/bin/bash"),
        ("core", 500, "/home/core", "/bin/bash"),
    ];
    let services = [
        ("etcd", 232),
        ("docker", 233),
        ("systemd-network", 244),
        ("nobody", 65534),
    ];
    let groups = [
        ("sudo", 150),
        ("wheel", 10),
        ("adm", 4),
        ("users", 100),
        ("rkt", 251),
        ("systemd-journal", 248),
        ("portage", 252),
    ];
    let [mut passwd, mut shadow, mut group, mut gshadow] = [const { String::new() }; 4];
    for (name, id, home, shell) in users
        .into_iter()
        .chain(services.map(|(name, id)| (name, id, "/dev/null", "/sbin/nologin")))
    {
        passwd += &format!("{name}:x:{id}:{id}::{home}:{shell}\n");
        shadow += &format!("{name}:*:15887:0:99999:7:::\n");
    }
    let own = users.iter().map(|&(name, id, ..)| (name, id));
    for (name, id) in own.chain(services).chain(groups) {
        group += &format!("{name}:x:{id}:\n");
        gshadow += &format!("{name}:*::\n");
    }
    for (path, text) in [
        ("etc/passwd", passwd.as_str()),
        ("etc/shadow", &shadow),
        ("etc/group", &group),
        ("etc/gshadow", &gshadow),
        ("etc/login.defs", LOGIN_DEFS),
        ("etc/default/useradd", "SHELL=/bin/bash\nCREATE_MAIL_SPOOL=no\n"),
        ("etc/selinux/config", "SELINUXTYPE=none\n"),
    ] {
        let path = root.join(path);
        fs::create_dir_all(path.parent().expect("it is in a folder")).expect("a folder");
        fs::write(path, text).expect("a file");
    }
    for (_, id, home, _) in users {
        let home = root.join(home.trim_start_matches('/'));
        fs::create_dir_all(&home).expect("a folder");
        chown(&home, Some(id), Some(id)).expect("root may give files away");
    }
}

const LOGIN_DEFS: &str = "\
UID_MIN 1000
UID_MAX 60000
SYS_UID_MIN 201
SYS_UID_MAX 999
GID_MIN 1000
GID_MAX 60000
SYS_GID_MIN 201
SYS_GID_MAX 999
UMASK 022
USERGROUPS_ENAB yes
";

/// The configuration without what takes a network or a disk: remote contents become texts that name where they come from,
/// and what the stages `disks` and `kargs` would do is left out.
pub(crate) fn offline(mut config: Value) -> Value {
    for section in ["disks", "raid", "luks", "filesystems"] {
        if let Some(storage) = config.get_mut("storage").and_then(Value::as_object_mut) {
            storage.remove(section);
        }
    }
    if let Some(ignition) = config.get_mut("ignition").and_then(Value::as_object_mut) {
        ignition.remove("security");
        if let Some(referred) = ignition.get_mut("config").and_then(Value::as_object_mut) {
            if referred.get("replace").is_some_and(is_remote) {
                referred.remove("replace");
            }
            if let Some(merge) = referred.get_mut("merge").and_then(Value::as_array_mut) {
                merge.retain(|reference| !is_remote(reference));
            }
        }
    }
    let files = config.pointer_mut("/storage/files").and_then(Value::as_array_mut);
    for file in files.into_iter().flatten() {
        if let Some(contents) = file.get_mut("contents") {
            bring_home(contents);
        }
        for appended in file
            .get_mut("append")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            bring_home(appended);
        }
    }
    config
}

fn is_remote(resource: &Value) -> bool {
    resource
        .get("source")
        .and_then(Value::as_str)
        .is_some_and(|source| !source.starts_with("data:") && !source.is_empty())
}

fn bring_home(resource: &mut Value) {
    if is_remote(resource) {
        let from = resource["source"].as_str().unwrap_or_default().replace('%', "%25");
        *resource = serde_json::json!({ "source": format!("data:,from {from}").replace(' ', "%20") });
    }
}

fn paths(root: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder of the tree") {
            let entry = entry.expect("an entry of the tree");
            if entry.file_type().expect("its type").is_dir() {
                folders.push(entry.path());
            }
            found.insert(Path::new("/").join(entry.path().strip_prefix(root).expect("it is in the tree")));
        }
    }
    found
}
