//! The nodes that the trials run on, and the pods that trials share.

use std::fs;
use std::ops::Deref;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use kubeception_tests::artifacts::Containerd;
use kubeception_tests::cri::{COREOS_KVM, Cri, message};
use kubeception_tests::image;
use kubeception_tests::leftovers::Snapshot;
use kubeception_tests::node::{Handler, Node, Place, Sandboxer};
use kubeception_tests::pod::{Container, Pod};
use libtest_mimic::{Failed, Trial};

/// Annotation with an Ignition configuration.
pub(crate) const CONFIG_INLINE: &str = "coreos-kvm.io/config-inline";
/// Annotation of a pod whose configuration may be cloned.
pub(crate) const TEMPLATE: &str = "coreos-kvm.io/template";
/// Annotation that names a configuration in a volume.
const CONFIG_FROM: &str = "coreos-kvm.io/config";
/// The file that the shared pod's configuration writes, and its content.
pub(crate) const IGNITED_FILE: (&str, &str) = ("/etc/ignited", "written by Ignition");
/// The user that it makes, and the user's groups.
pub(crate) const IGNITED_USER: (&str, &str) = ("ignited", "ignited docker");
/// The unit that it adds; it writes to [`IGNITED_UNIT_FILE`] once it runs: the machine's name and address, as the launcher knew
/// them before the machine was.
pub(crate) const IGNITED_UNIT: &str = "ignited.service";
pub(crate) const IGNITED_UNIT_FILE: &str = "/run/ignited";
/// A Container Linux Config, as somebody puts it into a ConfigMap.
const CONFIG: &str = r#"
passwd:
  users:
    - name: ignited
      groups: [docker]
storage:
  files:
    - path: /etc/ignited
      filesystem: root
      mode: 0644
      contents: {inline: written by Ignition}
systemd:
  units:
    - name: ignited.service
      enabled: true
      contents: |
        [Unit]
        Requires=coreos-metadata.service
        After=coreos-metadata.service
        [Service]
        Type=oneshot
        RemainAfterExit=yes
        EnvironmentFile=/run/metadata/coreos
        ExecStart=/bin/sh -c 'echo $COREOS_CUSTOM_HOSTNAME $COREOS_CUSTOM_PRIVATE_IPV4 > /run/ignited'
        [Install]
        WantedBy=multi-user.target
"#;

/// The same for a pod that is a clone: what it asks for is the same in each of them.
const CLONED_UNIT: &str = r#"
        [Service]
        Type=oneshot
        RemainAfterExit=yes
        ExecStart=/bin/sh -c 'echo template > /run/ignited'
        [Install]
        WantedBy=multi-user.target
"#;

/// How the machines of pods come to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// As clones of templates, as everywhere.
    Clone,
    /// By booting, as with `templates = "off"`.
    Boot,
}

impl Start {
    /// The runtime's handler, and what its pods are by it.
    pub(crate) fn handler(self) -> Handler {
        self.applied(Handler::standard())
    }

    /// A handler whose pods are such machines.
    pub(crate) fn applied(self, handler: Handler) -> Handler {
        match self {
            Self::Clone => handler,
            Self::Boot => handler.set("templates", "\"off\""),
        }
    }

    /// The configuration of the pod that trials share.
    fn configuration(self) -> String {
        match self {
            Self::Boot => CONFIG.to_owned(),
            Self::Clone => {
                let unit = CONFIG.find("\n        [Unit]").unwrap_or(CONFIG.len());
                format!("{}{CLONED_UNIT}", &CONFIG[..unit])
            }
        }
    }
}

/// One node, started when the first trial needs it.
pub(crate) struct Lab {
    name: String,
    pub(crate) start: Start,
    pub(crate) version: Containerd,
    sandboxer: Sandboxer,
    handlers: Vec<Handler>,
    started: OnceLock<Result<Started, String>>,
}

struct Started {
    start: Start,
    sandboxer: Sandboxer,
    /// Held for writing by a trial that needs the node for itself.
    node: RwLock<Node>,
    cri: Cri,
    shared: Mutex<Option<Result<Arc<SharedPod>, String>>>,
}

/// A pod that several trials use, each with containers of its own.
#[derive(Debug)]
pub(crate) struct SharedPod {
    pub(crate) pod: Pod,
    pub(crate) id: String,
}

/// A node in the hands of a trial, together with others.
pub(crate) struct Together<'a> {
    pub(crate) node: RwLockReadGuard<'a, Node>,
    started: &'a Started,
}

/// A node in the hands of one trial.
pub(crate) struct Alone<'a> {
    pub(crate) node: RwLockWriteGuard<'a, Node>,
    pub(crate) cri: &'a Cri,
    started: &'a Started,
}

impl Deref for Together<'_> {
    type Target = Cri;

    fn deref(&self) -> &Cri {
        &self.started.cri
    }
}

/// The name of a lab's node.
pub(crate) fn node_name(name: &str, sandboxer: Sandboxer) -> String {
    match sandboxer {
        Sandboxer::PodSandbox => name.to_owned(),
        Sandboxer::Shim => format!("{name}-sandbox"),
    }
}

impl Lab {
    /// A lab whose handlers all have this sandboxer.
    pub(crate) fn new(
        name: &str,
        version: Containerd,
        sandboxer: Sandboxer,
        start: Start,
        handlers: Vec<Handler>,
    ) -> Arc<Self> {
        let handlers = handlers.into_iter().map(|handler| handler.sandboxer(sandboxer));
        Arc::new(Self {
            name: node_name(name, sandboxer),
            start,
            version,
            sandboxer,
            handlers: handlers.collect(),
            started: OnceLock::new(),
        })
    }

    /// A trial that shares the node with others.
    pub(crate) fn trial(self: &Arc<Self>, name: &str, run: fn(&Together<'_>) -> Result<()>) -> Trial {
        let lab = Arc::clone(self);
        self.named(name, move || {
            let started = lab.started()?;
            let node = started.node.read().unwrap_or_else(PoisonError::into_inner);
            run(&Together { node, started })
        })
    }

    /// A trial that has the node for itself.
    pub(crate) fn trial_alone(
        self: &Arc<Self>,
        name: &str,
        run: impl Fn(&mut Alone<'_>) -> Result<()> + Send + 'static,
    ) -> Trial {
        let lab = Arc::clone(self);
        self.named(name, move || {
            let started = lab.started()?;
            let node = started.node.write().unwrap_or_else(PoisonError::into_inner);
            run(&mut Alone {
                node,
                cri: &started.cri,
                started,
            })
        })
    }

    fn named(&self, name: &str, run: impl Fn() -> Result<()> + Send + 'static) -> Trial {
        let how = match self.start {
            Start::Clone => "",
            Start::Boot => ", booted",
        };
        let by = match self.sandboxer {
            Sandboxer::PodSandbox => "",
            Sandboxer::Shim => ", sandboxer shim",
        };
        Trial::test(format!("containerd {}{by}{how}: {name}", self.version), move || {
            let begun = Instant::now();
            run().map_err(|error| {
                let seconds = begun.elapsed().as_secs_f32();
                Failed::from(format!("after {seconds:.1} s: {error:#}"))
            })
        })
    }

    fn started(&self) -> Result<&Started> {
        let started = self.started.get_or_init(|| {
            let start = || {
                let node = Node::start(&self.name, self.version, &self.handlers)?;
                let cri = Cri::connect(&node)?;
                if self.sandboxer == Sandboxer::Shim {
                    // The first such pod makes them, and they stay.
                    for folder in [node.place().run().join("containerd"), node.place().root()] {
                        let sandboxes = folder.join("io.containerd.sandbox.controller.v1.shim");
                        fs::create_dir_all(sandboxes.join("k8s.io"))?;
                        fs::create_dir_all(folder.join("io.containerd.runtime.v2.task/k8s.io"))?;
                    }
                }
                anyhow::Ok(Started {
                    start: self.start,
                    sandboxer: self.sandboxer,
                    node: RwLock::new(node),
                    cri,
                    shared: Mutex::new(None),
                })
            };
            start().map_err(|error| format!("the node did not start: {error:#}"))
        });
        started.as_ref().map_err(|error| anyhow!(error.clone()))
    }

    /// Removes the shared pod, if there is one.
    pub(crate) fn tidy(&self) -> Result<()> {
        let Some(Ok(started)) = self.started.get() else {
            return Ok(());
        };
        match started.shared.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(Ok(shared)) => {
                started.cri.stop_pod(&shared.id)?;
                started.cri.remove_pod(&shared.id)
            }
            _ => Ok(()),
        }
    }
}

impl Started {
    fn shared(&self, place: &Place) -> Result<Arc<SharedPod>> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = shared.get_or_insert_with(|| {
            let start = || {
                let pod = Pod::new(place, "shared")
                    .host_port(8080, 18080)
                    .annotation(CONFIG_FROM, "configmap/os/config.yaml")
                    .annotation(TEMPLATE, "true");
                pod.config_map(place, "os", "config.yaml", &self.start.configuration())?;
                let id = self.cri.run_pod(&pod, COREOS_KVM)?;
                expect_start(place, &id, self.start)?;
                anyhow::Ok(Arc::new(SharedPod { pod, id }))
            };
            start().map_err(|error| format!("the shared pod did not start: {}", message(&error)))
        });
        outcome.clone().map_err(|error| anyhow!(error))
    }
}

/// How the pod's machine has come to run, as its record has it.
pub(crate) fn origin(place: &Place, id: &str) -> Result<serde_json::Value> {
    let path = place.pods().join(id).join("machine.json");
    let record = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut record: serde_json::Value = serde_json::from_slice(&record)?;
    Ok(record["origin"].take())
}

/// Fails where the pod's machine has come to run in another way.
pub(crate) fn expect_start(place: &Place, id: &str, expected: Start) -> Result<()> {
    let origin = origin(place, id)?;
    let from = match expected {
        Start::Clone => "clone",
        Start::Boot => "boot",
    };
    ensure!(
        origin["from"] == from,
        "a {from} was expected, and the machine's origin is {origin}"
    );
    Ok(())
}

impl Alone<'_> {
    /// What there is before a pod of a trial's own. A node's first pod and first container make what stays, such as the bridge.
    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        let shared = self.shared()?;
        let idle = Container::new("idle", image::BUSYBOX).command(&["sleep", "2147483647"]);
        let container = self.cri.create(&shared.id, &idle, &shared.pod)?;
        self.cri.remove(&container)?;
        Snapshot::take(&self.node)
    }

    pub(crate) fn machine_start(&self) -> Start {
        self.started.start
    }

    /// The pod that trials share, started by the first.
    pub(crate) fn shared(&self) -> Result<Arc<SharedPod>> {
        self.started.shared(self.node.place())
    }
}

impl Together<'_> {
    pub(crate) fn machine_start(&self) -> Start {
        self.started.start
    }

    pub(crate) fn sandboxer(&self) -> Sandboxer {
        self.started.sandboxer
    }

    /// The pod that trials share, started by the first.
    pub(crate) fn shared(&self) -> Result<Arc<SharedPod>> {
        self.started.shared(self.node.place())
    }

    /// Runs a command in the guest's own namespaces, as who debugs the node does.
    pub(crate) fn in_guest(&self, sandbox: &str, command: &[&str]) -> Result<String> {
        in_guest(&self.node, sandbox, command)
    }

    /// A container in the shared pod that just stays, and is removed when dropped.
    pub(crate) fn idle(&self, name: &str) -> Result<Running<'_>> {
        self.running(&Container::new(name, image::BUSYBOX).command(&["sleep", "2147483647"]))
    }

    /// A container in the shared pod, removed when dropped.
    pub(crate) fn running(&self, container: &Container) -> Result<Running<'_>> {
        let shared = self.shared()?;
        let id = self.run(&shared.id, container, &shared.pod)?;
        Ok(Running {
            cri: &self.started.cri,
            id,
            log: container.log(&shared.pod),
        })
    }
}

pub(crate) fn in_guest(node: &Node, sandbox: &str, command: &[&str]) -> Result<String> {
    let output = node
        .command("coreos-kvm")
        .arg("--config")
        .arg(Handler::standard().config_path(node.place()))
        .args(["exec", sandbox, "--"])
        .args(command)
        .output()
        .context("running coreos-kvm exec")?;
    ensure!(
        output.status.success(),
        "coreos-kvm exec {}: {}: {}",
        command.join(" "),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A started container.
pub(crate) struct Running<'a> {
    cri: &'a Cri,
    pub(crate) id: String,
    pub(crate) log: std::path::PathBuf,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.cri.remove(&self.id) {
            // Some trials remove theirs.
            if !message(&error).contains("not found") {
                eprintln!("container {} cannot be removed: {error:#}", self.id);
            }
        }
    }
}

/// A pod of one trial, removed when dropped.
pub(crate) struct OwnPod<'a> {
    cri: &'a Cri,
    pub(crate) pod: Pod,
    pub(crate) id: String,
    removed: bool,
}

impl<'a> OwnPod<'a> {
    pub(crate) fn run(cri: &'a Cri, pod: Pod, handler: &str) -> Result<Self> {
        let id = cri.run_pod(&pod, handler)?;
        Ok(Self {
            cri,
            pod,
            id,
            removed: false,
        })
    }

    pub(crate) fn remove(mut self) -> Result<()> {
        self.removed = true;
        self.cri.stop_pod(&self.id)?;
        self.cri.remove_pod(&self.id)
    }
}

impl Drop for OwnPod<'_> {
    fn drop(&mut self) {
        if !self.removed {
            let outcome = self.cri.stop_pod(&self.id).and_then(|()| self.cri.remove_pod(&self.id));
            if let Err(error) = outcome {
                eprintln!("pod {} cannot be removed: {error:#}", self.id);
            }
        }
    }
}

/// Tries again until it works or the bound is over.
pub(crate) fn eventually<T>(bound: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(100)),
            outcome => return outcome,
        }
    }
}
