//! Containers of Debian's busybox in a guest, by the agent's client alone.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use coreos_kvm_launcher::{
    agent::{AgentClient, AgentError, ProcessExit, ProcessName, Processes, StreamReader},
    vm::Vm,
};
use coreos_kvm_proto::{SHARED_MOUNT, agent::Streams};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;

use super::{cache, present, spec};

/// Longer than anything takes that works.
pub const BOUND: Duration = Duration::from_secs(60);

#[allow(clippy::declare_interior_mutable_const)] // copied wherever it is used
pub const OUTPUT: Streams = streams(false, true, true, false);
#[allow(clippy::declare_interior_mutable_const)] // copied wherever it is used
pub const PIPES: Streams = streams(true, true, true, false);
#[allow(clippy::declare_interior_mutable_const)] // copied wherever it is used
pub const TERMINAL: Streams = streams(true, true, false, true);

const fn streams(stdin: bool, stdout: bool, stderr: bool, terminal: bool) -> Streams {
    Streams {
        stdin,
        stdout,
        stderr,
        terminal,
        special_fields: protobuf::SpecialFields::new(),
    }
}

/// What a process printed and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: String,
    pub stderr: String,
    pub status: u32,
}

impl Outcome {
    /// The outcome of a command that does what it should, and says so on stdout alone.
    pub fn good(self) -> String {
        assert!(self.status == 0 && self.stderr.is_empty(), "{self:?}");
        self.stdout
    }
}

/// The guest, seen as a place for containers.
#[derive(Clone, Copy)]
pub struct Bed<'a> {
    pub vm: &'a Vm,
}

impl<'a> Bed<'a> {
    pub fn agent(self) -> &'a AgentClient {
        self.vm.agent()
    }

    /// Makes a root file system for `id`; answers its path in the guest.
    pub fn root(self, id: &str) -> String {
        let root = self.vm.mount_points_dir().join(id).join("rootfs");
        let in_guest = format!("{SHARED_MOUNT}/{id}/rootfs");
        // Its programs may be running.
        if root.exists() {
            return in_guest;
        }
        let debian = present("COREOS_KVM_BUSYBOX", cache().join("busybox"), "`devtool setup`");
        for folder in [
            "bin",
            "dev",
            "etc",
            "lib/x86_64-linux-gnu",
            "lib64",
            "proc",
            "sys",
            "tmp",
        ] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        let libraries = Path::new("lib/x86_64-linux-gnu");
        let loader = libraries.join("ld-linux-x86-64.so.2");
        std::fs::copy(debian.join(&loader), root.join("lib64/ld-linux-x86-64.so.2")).unwrap();
        for library in ["libc.so.6", "libresolv.so.2"] {
            std::fs::copy(debian.join(libraries).join(library), root.join(libraries).join(library)).unwrap();
        }
        std::fs::copy(debian.join("bin/busybox"), root.join("bin/busybox")).unwrap();
        for applet in [
            "cat", "chroot", "dd", "echo", "env", "false", "grep", "head", "hostname", "id", "ls", "mkdir", "mount",
            "ps", "seq", "sh", "sleep", "stty", "sync", "tail", "touch", "tr", "true", "tty", "wc", "yes",
        ] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        std::fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\n").unwrap();
        // What is not mounted, the guest cannot write to.
        let shown = self.vm.shared_dir().join(id).join("rootfs");
        mount(Some(&root), &shown, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        in_guest
    }

    /// Removes what [`Self::root`] has made.
    pub fn remove_root(self, id: &str) {
        umount2(&self.vm.shared_dir().join(id).join("rootfs"), MntFlags::MNT_DETACH).unwrap();
        std::fs::remove_dir_all(self.vm.mount_points_dir().join(id)).unwrap();
    }

    /// A container that was created, from a specification that `change` may alter, and is deleted by [`Self::remove`].
    pub async fn create(
        self,
        id: &str,
        args: &[&str],
        streams: Streams,
        change: impl FnOnce(&mut Value),
    ) -> Result<u32, AgentError> {
        let mut spec = spec::container(&self.root(id), args);
        change(&mut spec);
        self.agent()
            .create_container(id, spec.to_string().into_bytes(), streams, Processes::Own, 0)
            .await
    }

    /// A container that runs and has nothing to say.
    pub async fn start_idle(self, id: &str) {
        self.create(id, &["sleep", "2147483647"], Streams::default(), |_| ())
            .await
            .unwrap();
        self.agent().start_process(init(id)).await.unwrap();
    }

    /// Ends whatever runs in the container and deletes it.
    pub async fn remove(self, id: &str) {
        // One that has ended by itself cannot be signalled.
        let _ = self.agent().signal_process(init(id), 9, true).await;
        bound(self.agent().wait_process(init(id))).await.unwrap();
        self.agent().delete_process(init(id)).await.unwrap();
        self.remove_root(id);
    }

    /// Runs a container to its end.
    pub async fn run(self, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> (Outcome, ProcessExit) {
        self.create(id, args, OUTPUT, change).await.unwrap();
        let outcome = self.attend(init(id)).await;
        self.agent().delete_process(init(id)).await.unwrap();
        self.remove_root(id);
        outcome
    }

    /// Runs a further process in a container to its end.
    pub async fn exec(self, id: &str, args: &[&str]) -> Outcome {
        self.exec_with(id, spec::process(args)).await.unwrap()
    }

    pub async fn exec_with(self, id: &str, process: Value) -> Result<Outcome, AgentError> {
        let name = exec(id, "exec");
        self.agent()
            .create_exec(name, process.to_string().into_bytes(), OUTPUT)
            .await?;
        let outcome = self.try_attend(name).await;
        self.agent().delete_process(name).await.unwrap();
        Ok(outcome?.0)
    }

    /// Starts a process and stays until its end.
    pub async fn attend(self, name: ProcessName<'_>) -> (Outcome, ProcessExit) {
        self.try_attend(name).await.unwrap()
    }

    async fn try_attend(self, name: ProcessName<'_>) -> Result<(Outcome, ProcessExit), AgentError> {
        let stdout = self.agent().output(name, false).await.unwrap();
        let stderr = self.agent().output(name, true).await.unwrap();
        self.agent().start_process(name).await?;
        let (stdout, stderr) = tokio::join!(text(stdout), text(stderr));
        let exit = bound(self.agent().wait_process(name)).await.unwrap();
        let status = exit.status;
        Ok((Outcome { stdout, stderr, status }, exit))
    }

    /// Path on the host of what a container sees at `path`.
    pub fn host_path(self, id: &str, path: &str) -> PathBuf {
        self.vm.shared_dir().join(id).join("rootfs").join(path)
    }
}

pub fn init(id: &str) -> ProcessName<'_> {
    exec(id, "")
}

pub fn exec<'a>(container_id: &'a str, exec_id: &'a str) -> ProcessName<'a> {
    ProcessName { container_id, exec_id }
}

/// Everything up to the stream's end.
pub async fn text(mut stream: StreamReader) -> String {
    let mut all = Vec::new();
    while let Some(bytes) = bound(stream.next()).await.unwrap() {
        all.extend_from_slice(bytes);
    }
    String::from_utf8(all).unwrap()
}

/// Reads until `expected` has come; answers all there was.
pub async fn read_until(stream: &mut StreamReader, expected: &str) -> String {
    let mut all = String::new();
    while !all.contains(expected) {
        match bound(stream.next()).await.unwrap() {
            Some(bytes) => all.push_str(std::str::from_utf8(bytes).unwrap()),
            None => panic!("the stream ended before {expected:?}: {all:?}"),
        }
    }
    all
}

pub async fn bound<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(BOUND, future).await.unwrap()
}
