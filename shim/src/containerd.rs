//! What the shim asks containerd for: what stands in no annotation, and in no specification.
//!
//! The CRI plugin keeps the configurations of pods and containers as extensions of containerd's containers, JSON, since before their
//! tasks are created (`metadata.go` in `internal/cri/store/sandbox` and `internal/cri/store/container` of containerd's tree).

use std::{collections::BTreeMap, fmt, net::IpAddr, time::Duration};

use containerd_client::{
    Client,
    services::v1::{Container, GetContainerRequest, UpdateContainerRequest},
    tonic::Request,
};
use oci_spec::runtime::Spec;
use prost_types::FieldMask;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::time::timeout;

use crate::error::ShimError;

/// Keys of the extensions.
const SANDBOX_METADATA: &str = "io.cri-containerd.sandbox.metadata";
const CONTAINER_METADATA: &str = "io.cri-containerd.container.metadata";
/// Longest time for an answer.
const BOUND: Duration = Duration::from_secs(5);

/// containerd's gRPC socket, and the namespace in it.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    pub(crate) address: String,
    pub(crate) namespace: String,
}

/// A port of the pod, as `PortMapping` of the CRI has it; what is zero is left out there.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Port {
    /// 0: TCP, 1: UDP, 2: SCTP.
    #[serde(default)]
    pub(crate) protocol: u32,
    #[serde(default)]
    pub(crate) container_port: u16,
    /// 0: no port of the node.
    #[serde(default)]
    pub(crate) host_port: u16,
    /// Empty: every address of the node.
    #[serde(default)]
    pub(crate) host_ip: String,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let protocol = match self.protocol {
            0 => "tcp",
            1 => "udp",
            2 => "sctp",
            _ => "?",
        };
        if self.host_port != 0 {
            match self.host_ip.parse::<IpAddr>() {
                Ok(address @ IpAddr::V6(_)) => write!(f, "[{address}]:")?,
                Ok(address @ IpAddr::V4(_)) => write!(f, "{address}:")?,
                Err(_) => {}
            }
            write!(f, "{}->", self.host_port)?;
        }
        write!(f, "{}/{protocol}", self.container_port)
    }
}

/// Ports as they are shown: `18080->8080/tcp, 53/udp`.
pub(crate) fn list(ports: &[Port]) -> String {
    ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ")
}

impl Containerd {
    /// The ports of the pod whose sandbox is `id`; none of a container that is no CRI sandbox.
    ///
    /// # Errors
    /// When containerd does not answer within 5 s, or what it says cannot be read.
    pub(crate) async fn ports(&self, id: &str) -> Result<Vec<Port>, ShimError> {
        const ASKING: &str = "asking containerd for the pod's ports";
        let metadata = self.extension(id, SANDBOX_METADATA, ASKING).await?;
        metadata.map_or_else(|| Ok(Vec::new()), |metadata| ports_of(&metadata))
    }

    /// In whose process namespace the container `id` is to be, which has none of its own.
    ///
    /// # Errors
    /// When containerd does not answer within 5 s, or what it says cannot be read.
    pub(crate) async fn shared_processes(&self, id: &str) -> Result<SharedProcesses, ShimError> {
        const ASKING: &str = "asking containerd whose processes the container is to see";
        let metadata = self.extension(id, CONTAINER_METADATA, ASKING).await?;
        metadata.map_or(Ok(SharedProcesses::Pod), |metadata| shared_processes(&metadata))
    }

    /// The specification that containerd has of a container now: it may have changed since its bundle was made.
    ///
    /// # Errors
    /// When containerd does not answer within 5 s, or what it says cannot be read.
    pub(crate) async fn spec(&self, id: &str) -> Result<Spec, ShimError> {
        const ASKING: &str = "asking containerd for the sandbox's specification";
        let asked = async {
            let client = self.client(ASKING).await?;
            let container = self.container(&client, id, ASKING).await?;
            let spec = container.spec.unwrap_or_default().value;
            serde_json::from_slice(&spec).map_err(ShimError::while_doing("reading the sandbox's specification"))
        };
        in_time(ASKING, asked).await
    }

    /// Adds annotations to the specification that containerd has of a container, and shows: nothing goes by them.
    ///
    /// # Errors
    /// When containerd does not do it within 5 s.
    pub(crate) async fn annotate(&self, id: &str, annotations: &BTreeMap<String, String>) -> Result<(), ShimError> {
        const ASKING: &str = "telling containerd what the pod's machine is";
        let told = async {
            let client = self.client(ASKING).await?;
            let mut container = self.container(&client, id, ASKING).await?;
            if let Some(spec) = &mut container.spec {
                spec.value = annotated(&spec.value, annotations)?;
            }
            let request = UpdateContainerRequest {
                container: Some(container),
                update_mask: Some(FieldMask {
                    paths: vec!["spec".to_owned()],
                }),
            };
            let answer = client.containers().update(self.request(request, ASKING)?).await;
            answer.map(drop).map_err(ShimError::while_doing(ASKING))
        };
        in_time(ASKING, told).await
    }

    /// What the CRI plugin has written down with a container.
    async fn extension(&self, id: &str, key: &str, asking: &'static str) -> Result<Option<Vec<u8>>, ShimError> {
        let asked = async {
            let client = self.client(asking).await?;
            let mut container = self.container(&client, id, asking).await?;
            Ok(container.extensions.remove(key).map(|extension| extension.value))
        };
        in_time(asking, asked).await
    }

    async fn container(&self, client: &Client, id: &str, asking: &'static str) -> Result<Container, ShimError> {
        let request = self.request(GetContainerRequest { id: id.to_owned() }, asking)?;
        let answer = client.containers().get(request).await;
        let container = answer.map_err(ShimError::while_doing(asking))?.into_inner().container;
        Ok(container.unwrap_or_default())
    }

    async fn client(&self, asking: &'static str) -> Result<Client, ShimError> {
        let path = self.address.strip_prefix("unix://").unwrap_or(&self.address);
        Client::from_path(path).await.map_err(ShimError::while_doing(asking))
    }

    fn request<T>(&self, message: T, asking: &'static str) -> Result<Request<T>, ShimError> {
        let mut request = Request::new(message);
        let namespace = self.namespace.parse().map_err(ShimError::while_doing(asking))?;
        request.metadata_mut().insert("containerd-namespace", namespace);
        Ok(request)
    }
}

async fn in_time<T>(asking: &str, answer: impl Future<Output = Result<T, ShimError>>) -> Result<T, ShimError> {
    timeout(BOUND, answer)
        .await
        .unwrap_or_else(|_| Err(ShimError::Internal(format!("{asking} takes too long"))))
}

/// A specification with more annotations, and all else as it was.
fn annotated(spec: &[u8], annotations: &BTreeMap<String, String>) -> Result<Vec<u8>, ShimError> {
    const ANNOTATIONS: &str = "annotations";
    let reading = ShimError::while_doing("reading the sandbox's specification");
    let mut spec: Map<String, Value> = serde_json::from_slice(spec).map_err(reading)?;
    let mut all = match spec.remove(ANNOTATIONS) {
        Some(Value::Object(there)) => there,
        _ => Map::new(),
    };
    all.extend(
        annotations
            .iter()
            .map(|(name, text)| (name.clone(), text.as_str().into())),
    );
    spec.insert(ANNOTATIONS.to_owned(), all.into());
    serde_json::to_vec(&spec).map_err(ShimError::while_doing("writing the sandbox's specification"))
}

/// Whose processes a container sees beside its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum SharedProcesses {
    Pod,
    Node,
    /// That of this id, which it is to debug.
    Container(String),
}

/// An extension: the plugin's metadata of a sandbox or a container with the configuration that it was made by.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Extension<C> {
    metadata: Metadata<C>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Metadata<C> {
    config: C,
}

fn ports_of(metadata: &[u8]) -> Result<Vec<Port>, ShimError> {
    #[derive(Deserialize)]
    struct PodSandboxConfig {
        #[serde(default)]
        port_mappings: Vec<Port>,
    }
    let extension: Extension<PodSandboxConfig> =
        serde_json::from_slice(metadata).map_err(ShimError::while_doing("reading the pod's ports"))?;
    Ok(extension.metadata.config.port_mappings)
}

fn shared_processes(metadata: &[u8]) -> Result<SharedProcesses, ShimError> {
    // `NamespaceMode` of the CRI.
    const NODE: u32 = 2;
    const TARGET: u32 = 3;
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct ContainerConfig {
        linux: Linux,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Linux {
        security_context: SecurityContext,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct SecurityContext {
        namespace_options: NamespaceOption,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct NamespaceOption {
        pid: u32,
        target_id: String,
    }
    let extension: Extension<ContainerConfig> =
        serde_json::from_slice(metadata).map_err(ShimError::while_doing("reading the container's configuration"))?;
    let options = extension.metadata.config.linux.security_context.namespace_options;
    Ok(match options.pid {
        NODE => SharedProcesses::Node,
        TARGET => SharedProcesses::Container(options.target_id),
        _ => SharedProcesses::Pod,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_from_the_sandboxs_metadata() {
        let metadata = br#"{"Version": "v1", "Metadata": {"ID": "abc", "Config": {
            "metadata": {"name": "web"},
            "port_mappings": [
                {"container_port": 8080, "host_port": 18080},
                {"protocol": 1, "container_port": 53},
                {"container_port": 443, "host_port": 8443, "host_ip": "fd00::1"}
            ]
        }}}"#;
        let ports = ports_of(metadata).unwrap();
        assert_eq!(list(&ports), "18080->8080/tcp, 53/udp, [fd00::1]:8443->443/tcp");
    }

    #[test]
    fn annotations_are_added_and_all_else_stays() {
        let added = |spec: &str| {
            let annotations = [("machine/pid", "7"), ("machine/guest", "reference")];
            let annotations = annotations.map(|(name, text)| (name.to_owned(), text.to_owned()));
            let spec = annotated(spec.as_bytes(), &annotations.into())?;
            Ok::<_, ShimError>(String::from_utf8(spec).unwrap())
        };
        assert_eq!(
            added(r#"{"annotations":{"a":"b","machine/pid":"8"},"linux":{"limit":18446744073709551615}}"#).unwrap(),
            r#"{"annotations":{"a":"b","machine/guest":"reference","machine/pid":"7"},"linux":{"limit":18446744073709551615}}"#
        );
        let alone = r#"{"annotations":{"machine/guest":"reference","machine/pid":"7"}}"#;
        assert_eq!(added("{}").unwrap(), alone);
        assert_eq!(added(r#"{"annotations":null}"#).unwrap(), alone);
        assert!(added("[]").is_err());
    }

    #[test]
    fn a_pod_may_have_none() {
        assert_eq!(ports_of(br#"{"Metadata": {"Config": {}}}"#).unwrap(), []);
        assert!(ports_of(b"{}").is_err());
    }

    #[test]
    fn whose_processes_a_container_sees_is_read_from_its_metadata() {
        let metadata = |options: &str| {
            let text = format!(
                r#"{{"Version": "v1", "Metadata": {{"ID": "abc", "Config": {{
                    "metadata": {{"name": "debugger"}}, "linux": {{"security_context": {{{options}}}}}
                }}}}}}"#
            );
            shared_processes(text.as_bytes()).unwrap()
        };
        let target = metadata(r#""namespace_options": {"pid": 3, "target_id": "def"}"#);
        assert_eq!(target, SharedProcesses::Container("def".to_owned()));
        assert_eq!(metadata(r#""namespace_options": {"pid": 2}"#), SharedProcesses::Node);
        assert_eq!(metadata(r#""namespace_options": {"network": 2}"#), SharedProcesses::Pod);
        assert_eq!(metadata(""), SharedProcesses::Pod);
        assert_eq!(
            shared_processes(br#"{"Metadata": {"Config": {}}}"#).unwrap(),
            SharedProcesses::Pod
        );
    }
}
