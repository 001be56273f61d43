//! What the shim asks containerd for: the ports of the pod, which stand in no annotation.
//!
//! The CRI plugin keeps the pod's configuration as an extension of the sandbox's container, JSON, since before the sandbox's
//! task is created (`internal/cri/store/sandbox/metadata.go` in containerd's tree).

use std::{fmt, net::IpAddr, time::Duration};

use containerd_client::{Client, services::v1::GetContainerRequest, tonic::Request};
use serde::Deserialize;
use tokio::time::timeout;

use crate::error::ShimError;

/// Key of the extension.
const METADATA: &str = "io.cri-containerd.sandbox.metadata";
/// Longest time for the answer: the pod does not depend on it.
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
    protocol: u32,
    #[serde(default)]
    container_port: u16,
    /// 0: no port of the node.
    #[serde(default)]
    host_port: u16,
    /// Empty: every address of the node.
    #[serde(default)]
    host_ip: String,
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
        let asked = async {
            let asking = || "asking containerd for the pod's ports";
            let path = self.address.strip_prefix("unix://").unwrap_or(&self.address);
            let client = Client::from_path(path)
                .await
                .map_err(ShimError::while_doing(asking()))?;
            let mut request = Request::new(GetContainerRequest { id: id.to_owned() });
            let namespace = self.namespace.parse().map_err(ShimError::while_doing(asking()))?;
            request.metadata_mut().insert("containerd-namespace", namespace);
            let answer = client.containers().get(request).await;
            let container = answer.map_err(ShimError::while_doing(asking()))?.into_inner().container;
            match container.and_then(|mut container| container.extensions.remove(METADATA)) {
                Some(extension) => ports_of(&extension.value),
                None => Ok(Vec::new()),
            }
        };
        timeout(BOUND, asked).await.unwrap_or_else(|_| {
            Err(ShimError::Internal(
                "containerd does not tell the pod's ports in time".to_owned(),
            ))
        })
    }
}

fn ports_of(metadata: &[u8]) -> Result<Vec<Port>, ShimError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Extension {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Metadata {
        config: PodSandboxConfig,
    }
    #[derive(Deserialize)]
    struct PodSandboxConfig {
        #[serde(default)]
        port_mappings: Vec<Port>,
    }
    let extension: Extension =
        serde_json::from_slice(metadata).map_err(ShimError::while_doing("reading the pod's ports"))?;
    Ok(extension.metadata.config.port_mappings)
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
    fn a_pod_may_have_none() {
        assert_eq!(ports_of(br#"{"Metadata": {"Config": {}}}"#).unwrap(), []);
        assert!(ports_of(b"{}").is_err());
    }
}
