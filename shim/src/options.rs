//! What containerd's configuration says of this runtime: `runtimeoptions.v1.Options`, which every runtime type gets that is
//! not runc's.

use std::path::PathBuf;

use prost::Message;
use protobuf::well_known_types::any::Any;

use crate::error::ShimError;

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

#[cfg(test)]
mod tests {
    use super::*;

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
