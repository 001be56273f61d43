//! What containerd's configuration says of this runtime: `runtimeoptions.v1.Options`, which every runtime type gets that is
//! not runc's.

use std::{
    io::{self, Read},
    path::PathBuf,
};

use containerd_shim::Flags;
use containerd_shim_protos::bootstrap_api::BootstrapParams;
use prost::Message;
use protobuf::{Message as _, well_known_types::any::Any};

use crate::error::{ShimError, sentence};

/// Variable in the environment that names the configuration file where the runtime's options do not: they cannot with containerd 2.0 to
/// 2.2 and `sandboxer = "shim"`, for these take the options of every such runtime for runc's.
pub(crate) const CONFIG: &str = "COREOS_KVM_CONFIG";

/// They are some hundred bytes; what is longer is none.
const LENGTH_MAX: u64 = 1 << 20;

/// Of `api/types/runtimeoptions/v1/api.proto` in containerd's tree.
#[derive(Clone, PartialEq, Message)]
struct Options {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    config_path: String,
    #[prost(bytes = "vec", tag = "3")]
    config_body: Vec<u8>,
}

const TYPE: &str = "runtimeoptions.v1.Options";

/// The configuration file that containerd's runtime entry names, if it names one.
///
/// # Errors
/// When the entry carries options that this runtime does not have.
pub(crate) fn config_path(options: Option<&Any>) -> Result<Option<PathBuf>, ShimError> {
    let Some(any) = options.filter(|any| !any.value.is_empty()) else {
        return Ok(None);
    };
    let advice = "in containerd's configuration the options of the runtime coreos-kvm may hold ConfigPath alone";
    if !any.type_url.ends_with(TYPE) {
        return Err(ShimError::InvalidArgument(format!(
            "the runtime's options are of the type {}: {advice}",
            any.type_url
        )));
    }
    let options = Options::decode(any.value.as_slice())
        .map_err(|error| ShimError::InvalidArgument(format!("the runtime's options cannot be read: {error}")))?;
    if !options.config_path.is_empty() {
        return Ok(Some(options.config_path.into()));
    }
    if options.config_body.is_empty() {
        return Ok(None);
    }
    Err(ShimError::InvalidArgument(format!(
        "{advice}; everything else belongs into the file that it names"
    )))
}

/// The same, from what containerd writes to the stdin of `start`: nothing, the options, or from 2.3 on `BootstrapParams` that have
/// them as an extension.
///
/// # Errors
/// When it is none of these, or carries options that this runtime does not have.
pub(crate) fn at_start(flags: &Flags) -> Result<Option<PathBuf>, ShimError> {
    let mut input = Vec::new();
    io::stdin()
        .take(LENGTH_MAX)
        .read_to_end(&mut input)
        .map_err(ShimError::while_doing("reading the runtime's options"))?;
    config_path(of_start(&input, flags)?.as_ref())
}

fn of_start(input: &[u8], flags: &Flags) -> Result<Option<Any>, ShimError> {
    // Options can be read as parameters, too: what tells them apart is whose they say they are.
    if let Ok(params) = BootstrapParams::parse_from_bytes(input)
        && (&params.instance_id, &params.namespace) == (&flags.id, &flags.namespace)
    {
        let values = params
            .extensions
            .into_iter()
            .filter_map(|mut extension| extension.value.take());
        return Ok(values.into_iter().find(|value| value.type_url.ends_with(TYPE)));
    }
    Any::parse_from_bytes(input).map(Some).map_err(|error| {
        ShimError::InvalidArgument(format!("the runtime's options cannot be read: {}", sentence(&error)))
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;

    use super::*;

    #[test]
    fn they_come_to_the_start_bare_or_among_other_things() {
        let flags = Flags {
            id: "abc".to_owned(),
            namespace: "k8s.io".to_owned(),
            ..Default::default()
        };
        let path = "/etc/coreos-kvm/other.toml";
        let options = any(&Options {
            config_path: path.to_owned(),
            ..Default::default()
        });
        let read = |input: &[u8]| config_path(of_start(input, &flags)?.as_ref());
        assert_eq!(read(b"").unwrap(), None);
        assert_eq!(read(&options.write_to_bytes().unwrap()).unwrap(), Some(path.into()));
        assert!(read(b"\xff").is_err());

        let extension = |value: Any| Extension {
            value: Some(value).into(),
            ..Default::default()
        };
        let other = Any {
            type_url: "containerd.io/another".to_owned(),
            ..Default::default()
        };
        let mut params = BootstrapParams {
            instance_id: flags.id.clone(),
            namespace: flags.namespace.clone(),
            extensions: vec![extension(other), extension(options)],
            ..Default::default()
        };
        assert_eq!(read(&params.write_to_bytes().unwrap()).unwrap(), Some(path.into()));
        params.extensions.clear();
        assert_eq!(read(&params.write_to_bytes().unwrap()).unwrap(), None);
    }

    fn any(options: &Options) -> Any {
        Any {
            type_url: TYPE.to_owned(),
            value: options.encode_to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn the_file_is_the_one_that_containerd_names() {
        let options = Options {
            config_path: "/etc/coreos-kvm/other.toml".to_owned(),
            ..Default::default()
        };
        let path = config_path(Some(&any(&options))).unwrap();
        assert_eq!(path, Some("/etc/coreos-kvm/other.toml".into()));
        assert_eq!(config_path(None).unwrap(), None);
    }

    #[test]
    fn options_of_another_runtime_are_refused_with_what_is_possible() {
        let of_runc = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: vec![1],
            ..Default::default()
        };
        assert!(
            config_path(Some(&of_runc))
                .unwrap_err()
                .to_string()
                .contains("ConfigPath")
        );
        let body = Options {
            config_body: b"BinaryName = \"/usr/bin/runc\"".to_vec(),
            ..Default::default()
        };
        assert!(config_path(Some(&any(&body))).is_err());
    }
}
