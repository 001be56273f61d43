//! The images that critest pulls, made here under the names it has for them.
//!
//! To the suite an image is its name, its user, a shell with its tools, and a web server. So all of them are Debian's busybox,
//! and the servers are [stand-ins](../stand-in.rs).

use std::fs;

use anyhow::{Context as _, Result};
use kubeception_tests::artifacts;
use kubeception_tests::image::busybox_layer;
use kubeception_tests::layout::{Archive, Layout};
use serde_json::{Value, json};

/// Of Kubernetes' own tests.
const E2E: &str = "registry.k8s.io/e2e-test-images";
/// Of critest; named in its `pkg/validate/consts.go`.
const CRITEST: &str = "gcr.io/k8s-staging-cri-tools";

pub(crate) fn make() -> Result<Layout> {
    let mut layout = Layout::default();
    let busybox = layout.add(busybox_layer()?);
    let groups = layout.add(groups_layer()?);
    let stand_ins = layout.add(stand_ins_layer()?);

    let tools = layout.add(tools_layer()?);
    let name = format!("{E2E}/busybox:1.29-2");
    layout.add_image(&name, json!({ "Cmd": ["sh"] }), &[&busybox, &tools])?;
    let programs: [(String, Value); 4] = [
        (format!("{E2E}/nginx:1.14-2"), web("nginx", "80")),
        (format!("{E2E}/httpd:2.4.39-4"), web("httpd", "80")),
        (format!("{CRITEST}/hostnet-nginx-amd64"), web("nginx", "12003")),
        (
            format!("{E2E}/nonewprivs:1.3"),
            json!({ "Entrypoint": ["/usr/sbin/nnp"] }),
        ),
    ];
    for (name, config) in programs {
        layout.add_image(&name, config, &[&busybox, &stand_ins])?;
    }

    for (image, user) in [
        ("uid", "1002"),
        ("username", "www-data"),
        ("uid-group", "1003:1004"),
        ("username-group", "www-data:1004"),
    ] {
        let name = format!("{CRITEST}/test-image-user-{image}");
        layout.add_image(&name, json!({ "Cmd": ["sh"], "User": user }), &[&busybox])?;
    }
    layout.add_image(
        &format!("{CRITEST}/test-image-predefined-group"),
        json!({ "Cmd": ["sh"], "User": "1000" }),
        &[&busybox, &groups],
    )?;

    // Images that are only pulled, listed and removed, which goes by the digest of the configuration.
    for image in ["latest", "tag:test", "tag:all", "1", "2", "3"] {
        let name = format!("{CRITEST}/test-image-{image}");
        let config = json!({ "Cmd": ["sh"], "Labels": { "name": image } });
        layout.add_image(&name, config, &[&busybox])?;
    }
    // Pulled under the names of two registries, and run. With the label it is another image than that of the node's sandboxes, which
    // would else be removed with it.
    let pause = json!({ "Cmd": ["tail", "-f", "/dev/null"], "Labels": { "name": "pause" } });
    layout.add_image("registry.k8s.io/pause:3.9", pause, &[&busybox])?;
    for tag in ["1", "2", "3"] {
        let name = format!("{CRITEST}/test-image-tags:{tag}");
        layout.add_image(
            &name,
            json!({ "Cmd": ["sh"], "Labels": { "name": "tags" } }),
            &[&busybox],
        )?;
    }
    Ok(layout)
}

/// A server's second argument is what it is found by in `/proc/1/cmdline`.
fn web(program: &str, port: &str) -> Value {
    json!({ "Entrypoint": [format!("/usr/sbin/{program}"), "master process", port] })
}

/// What Debian's busybox lacks of the original.
fn tools_layer() -> Result<Vec<u8>> {
    let mut layer = Archive::new(Vec::new());
    layer.file("usr/bin/ipcs", 0o755, b"#!/bin/sh\nexec cat /proc/sysvipc/shm\n")?;
    layer.file("usr/bin/pgrep", 0o755, b"#!/bin/sh\nexec pidof \"$1\"\n")?;
    layer.finish()
}

fn stand_ins_layer() -> Result<Vec<u8>> {
    let path = artifacts::stand_in()?;
    let program = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let mut layer = Archive::new(Vec::new());
    layer.folder("var/run", 0o755)?;
    layer.file("usr/sbin/nginx", 0o755, &program)?;
    layer.hard_link("usr/sbin/httpd", "usr/sbin/nginx")?;
    layer.file("usr/sbin/nnp", 0o4755, &program)?;
    layer.finish()
}

/// A user who is in a further group by the image's own files.
fn groups_layer() -> Result<Vec<u8>> {
    let mut layer = Archive::new(Vec::new());
    layer.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home:/bin/sh\n",
    )?;
    layer.file(
        "etc/group",
        0o644,
        b"root:x:0:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n",
    )?;
    layer.finish()
}
