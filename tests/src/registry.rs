//! A registry inside a node, in the place of every other: images keep the names that they have elsewhere, and are pulled from here.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::artifacts;
use crate::layout::Layout;
use crate::node::Node;

/// On loopback in the node's own network.
const PORT: u16 = 5000;
const BOUND: Duration = Duration::from_secs(30);

/// Serves the images to the node's containerd for as long as the node is there.
pub fn serve(node: &Node, images: &Layout) -> Result<()> {
    let place = node.place();
    let folder = place.base().join("registry");
    images.write_registry(&folder)?;
    let config = place.base().join("registry.yml");
    let text = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {folder:?}}}}}\nhttp: {{addr: '127.0.0.1:{PORT}'}}\n"
    );
    fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;

    let log_path = artifacts::logs().join(format!("registry-{}.log", place.name()));
    let log = File::create(&log_path).with_context(|| format!("making {}", log_path.display()))?;
    // It ends with the node, as every process of it.
    let mut registry = node
        .command(artifacts::registry()?)
        .arg("serve")
        .arg(&config)
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting the registry")?;
    let deadline = Instant::now() + BOUND;
    while !node.in_network(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).is_ok())? {
        if let Some(status) = registry.try_wait().context("waiting for the registry")? {
            bail!("the registry ended at once ({status}); see {}", log_path.display());
        }
        ensure!(
            Instant::now() < deadline,
            "the registry does not answer; see {}",
            log_path.display()
        );
        std::thread::sleep(Duration::from_millis(20));
    }

    // containerd reads it with each pull.
    let any = place.registries().join("_default");
    let hosts = format!("[host.\"http://127.0.0.1:{PORT}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
    fs::create_dir_all(&any)
        .and_then(|()| fs::write(any.join("hosts.toml"), hosts))
        .context("telling containerd of the registry")
}
