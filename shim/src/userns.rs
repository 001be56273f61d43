//! User namespaces, as containerd asks for them: which ids inside are which outside (user_namespaces(7)). They decide whose files of
//! the host a container's are, so they are read here, of what containerd wrote, and nowhere else.

use coreos_kvm_proto::agent;
use k8s_cri::v1::{self as cri, NamespaceMode};
use oci_spec::runtime::{LinuxIdMapping, LinuxIdMappingBuilder, LinuxNamespaceType, Mount, Spec};
use protobuf::MessageField;

use crate::error::ShimError;

/// One piece of ids, from the first one inside on: as containerd, one line and no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdMapping {
    outside: u32,
    length: u32,
}

/// Who is who.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UserNamespace {
    uids: IdMapping,
    gids: IdMapping,
}

/// A line of a mapping, in whichever words it comes.
#[derive(Debug, Clone, Copy)]
struct Line {
    inside: u32,
    outside: u32,
    length: u32,
}

impl From<&LinuxIdMapping> for Line {
    fn from(line: &LinuxIdMapping) -> Self {
        Self {
            inside: line.container_id(),
            outside: line.host_id(),
            length: line.size(),
        }
    }
}

impl From<&cri::IdMapping> for Line {
    fn from(line: &cri::IdMapping) -> Self {
        Self {
            inside: line.container_id,
            outside: line.host_id,
            length: line.length,
        }
    }
}

impl IdMapping {
    fn of<L: Into<Line>>(what: &str, lines: impl IntoIterator<Item = L>) -> Result<Self, ShimError> {
        let wrong = |problem: String| {
            ShimError::InvalidArgument(format!("the user namespace's mapping of {what} ids {problem}"))
        };
        let lines: Vec<Line> = lines.into_iter().map(Into::into).collect();
        let [line] = lines.as_slice() else {
            return Err(wrong(format!("has {} lines, and has to have one", lines.len())));
        };
        if line.inside != 0 {
            return Err(wrong(format!(
                "begins with {}, and has to begin with 0: containers begin as it",
                line.inside
            )));
        }
        // The last of all ids is none: it means "as it is", as in chown(2).
        match line.outside.checked_add(line.length) {
            Some(end) if line.length > 0 && end < u32::MAX => Ok(Self {
                outside: line.outside,
                length: line.length,
            }),
            _ => Err(wrong(format!(
                "has {} ids from {} on, which there are not",
                line.length, line.outside
            ))),
        }
    }

    /// As uid_map and gid_map of /proc have it.
    pub(crate) fn line(self) -> String {
        format!("0 {} {}\n", self.outside, self.length)
    }

    /// The same of a mount whose files this node serves as root, who has to be somebody there as well: who is nobody may not link or
    /// rename, whatever rights it has (`may_create` in Linux' `fs/namei.c`). It is one of the ids that are the pod's on the node.
    pub(crate) fn line_served_by_root(self) -> String {
        match self.outside {
            0 => self.line(),
            outside => format!("{}{} 0 1\n", self.line(), outside.max(self.length)),
        }
    }

    fn message(self) -> MessageField<agent::IdMapping> {
        MessageField::some(agent::IdMapping {
            inside: 0,
            outside: self.outside,
            length: self.length,
            ..Default::default()
        })
    }
}

impl UserNamespace {
    /// That of a sandbox or a container; None: the node's, which in a machine is the guest's.
    ///
    /// # Errors
    /// When it has no mapping of its own, or one that cannot be.
    pub(crate) fn of_oci(spec: &Spec) -> Result<Option<Self>, ShimError> {
        let Some(linux) = spec.linux() else { return Ok(None) };
        let mut namespaces = linux.namespaces().iter().flatten();
        // Its path is that of a process that is QEMU to the host, or where containerd keeps it: the mapping says what it is.
        if !namespaces.any(|namespace| namespace.typ() == LinuxNamespaceType::User) {
            return Ok(None);
        }
        Self::of_lists(linux.uid_mappings().as_deref(), linux.gid_mappings().as_deref()).map(Some)
    }

    /// That of a pod; None: the node's.
    ///
    /// # Errors
    /// When it is of a kind that pods do not have, or its mapping cannot be.
    pub(crate) fn of_cri(options: Option<&cri::UserNamespace>) -> Result<Option<Self>, ShimError> {
        let Some(options) = options else { return Ok(None) };
        match options.mode() {
            NamespaceMode::Pod => Ok(Some(Self {
                uids: IdMapping::of("user", &options.uids)?,
                gids: IdMapping::of("group", &options.gids)?,
            })),
            NamespaceMode::Node => Ok(None),
            mode => Err(ShimError::InvalidArgument(format!(
                "a pod cannot have a user namespace of the mode {}",
                mode.as_str_name()
            ))),
        }
    }

    /// Who the owners of a mount's files are to be; None: who they are.
    ///
    /// # Errors
    /// When it is no bind mount, or the mapping cannot be.
    pub(crate) fn of_mount(mount: &Mount, is_bind: bool) -> Result<Option<Self>, ShimError> {
        let lists = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
        match lists {
            (None | Some([]), None | Some([])) => Ok(None),
            _ if !is_bind => Err(ShimError::InvalidArgument(format!(
                "the mount at {} cannot have owners mapped, for it is none of files that are there",
                mount.destination().display()
            ))),
            (uids, gids) => Self::of_lists(uids, gids).map(Some),
        }
    }

    /// That of a root file system, `0:65536:65536` for its users and its groups: what containerd's own `mount` takes
    /// (`core/mount/mount_idmapped_linux.go` in its tree).
    ///
    /// # Errors
    /// When it is none.
    pub(crate) fn of_options(uids: &str, gids: &str) -> Result<Self, ShimError> {
        let lines = |text: &str| {
            let line = |line: &str| {
                let mut numbers = line.split(':').map(str::parse);
                match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
                    (Some(Ok(inside)), Some(Ok(outside)), Some(Ok(length)), None) => Ok(Line {
                        inside,
                        outside,
                        length,
                    }),
                    _ => Err(ShimError::InvalidArgument(format!(
                        "{line:?} is no mapping of ids of a root file system"
                    ))),
                }
            };
            text.split(',').map(line).collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            uids: IdMapping::of("user", lines(uids)?)?,
            gids: IdMapping::of("group", lines(gids)?)?,
        })
    }

    fn of_lists(uids: Option<&[LinuxIdMapping]>, gids: Option<&[LinuxIdMapping]>) -> Result<Self, ShimError> {
        Ok(Self {
            uids: IdMapping::of("user", uids.unwrap_or_default())?,
            gids: IdMapping::of("group", gids.unwrap_or_default())?,
        })
    }

    pub(crate) fn uids(self) -> IdMapping {
        self.uids
    }

    pub(crate) fn gids(self) -> IdMapping {
        self.gids
    }

    /// As the guest is told of it.
    pub(crate) fn message(self) -> agent::UserNamespace {
        agent::UserNamespace {
            uids: self.uids.message(),
            gids: self.gids.message(),
            ..Default::default()
        }
    }

    /// As the OCI specification has it: of users, and of groups.
    pub(crate) fn lists(self) -> [Vec<LinuxIdMapping>; 2] {
        [self.uids, self.gids].map(|mapping| {
            let line = LinuxIdMappingBuilder::default()
                .container_id(0_u32)
                .host_id(mapping.outside)
                .size(mapping.length);
            // Whose builder never fails; one that did would be refused where it is read.
            vec![line.build().unwrap_or_default()]
        })
    }
}

/// A container is in its pod's user namespace, or like its pod in none.
///
/// # Errors
/// When it is to be in another.
pub(crate) fn expect_same(of_pod: Option<UserNamespace>, of_container: Option<UserNamespace>) -> Result<(), ShimError> {
    let told = |users: Option<UserNamespace>| match users {
        None => "none".to_owned(),
        Some(UserNamespace { uids, gids }) => {
            format!(
                "{:?} for users and {:?} for groups",
                uids.line().trim(),
                gids.line().trim()
            )
        }
    };
    if of_pod == of_container {
        return Ok(());
    }
    Err(ShimError::InvalidArgument(format!(
        "all containers of a pod are in its user namespace: the pod's mapping is {}, and the container's {}",
        told(of_pod),
        told(of_container)
    )))
}

/// Where /proc is of the guest's processes it is not for other users than the guest's: user_namespaces(7).
pub(crate) fn among_the_nodes_processes() -> ShimError {
    ShimError::InvalidArgument(
        "a pod in a user namespace cannot be among the node's processes: remove hostPID, or `hostUsers: false`"
            .to_owned(),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use rstest::rstest;
    use serde_json::{Value, json};

    use super::*;

    pub(crate) const USERS: UserNamespace = UserNamespace {
        uids: IdMapping {
            outside: 65536,
            length: 65536,
        },
        gids: IdMapping {
            outside: 131_072,
            length: 65536,
        },
    };

    fn of_oci(linux: Value) -> Result<Option<UserNamespace>, String> {
        let spec = json!({"ociVersion": "1.0.2", "linux": linux});
        UserNamespace::of_oci(&serde_json::from_value(spec).unwrap()).map_err(|error| error.to_string())
    }

    fn line(inside: u32, outside: u32, length: u32) -> Value {
        json!({"containerID": inside, "hostID": outside, "size": length})
    }

    #[test]
    fn it_is_the_same_by_each_door() {
        let linux = json!({
            "namespaces": [{"type": "user", "path": "/proc/4321/ns/user"}],
            "uidMappings": [line(0, 65536, 65536)], "gidMappings": [line(0, 131_072, 65536)],
        });
        assert_eq!(of_oci(linux), Ok(Some(USERS)));
        let line = |host_id| {
            vec![cri::IdMapping {
                host_id,
                container_id: 0,
                length: 65536,
            }]
        };
        let mut options = cri::UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: line(65536),
            gids: line(131_072),
        };
        assert_eq!(UserNamespace::of_cri(Some(&options)).unwrap(), Some(USERS));
        let by_options = UserNamespace::of_options("0:65536:65536", "0:131072:65536");
        assert_eq!(by_options.unwrap(), USERS);
        options.mode = NamespaceMode::Node.into();
        assert_eq!(UserNamespace::of_cri(Some(&options)).unwrap(), None);
        options.mode = NamespaceMode::Target.into();
        assert!(UserNamespace::of_cri(Some(&options)).is_err());
        assert_eq!(UserNamespace::of_cri(None).unwrap(), None);
        assert_eq!(of_oci(json!({"namespaces": [{"type": "pid"}]})), Ok(None));
    }

    #[rstest]
    #[case(json!([]), "has 0 lines")]
    #[case(json!([line(0, 1000, 10), line(10, 2000, 10)]), "has 2 lines")]
    #[case(json!([line(5, 1000, 10)]), "begins with 5")]
    #[case(json!([line(0, 1000, 0)]), "0 ids from 1000")]
    #[case(json!([line(0, u32::MAX - 10, 10)]), "which there are not")]
    #[case(json!([line(0, u32::MAX, 10)]), "which there are not")]
    fn what_cannot_be_is_refused(#[case] uids: Value, #[case] words: &str) {
        let linux = json!({
            "namespaces": [{"type": "user"}], "uidMappings": uids, "gidMappings": [line(0, 1000, 10)],
        });
        let error = of_oci(linux).unwrap_err();
        assert!(error.contains("user ids") && error.contains(words), "{error}");
    }

    #[rstest]
    #[case("0:1000")]
    #[case("0:1000:1:1")]
    #[case("0:-1:10")]
    #[case("")]
    fn a_root_file_systems_mapping_is_read_whole(#[case] text: &str) {
        assert!(UserNamespace::of_options(text, "0:1000:10").is_err());
        assert!(UserNamespace::of_options("0:1000:10", text).is_err());
    }

    #[test]
    fn root_is_one_of_the_pods_own_where_it_serves_its_files() {
        let lines = |outside, length| IdMapping { outside, length }.line_served_by_root();
        assert_eq!(lines(65536, 1000), "0 65536 1000\n65536 0 1\n");
        assert_eq!(lines(1000, 65536), "0 1000 65536\n65536 0 1\n");
        assert_eq!(lines(0, 65536), "0 0 65536\n");
    }

    #[test]
    fn a_container_is_where_its_pod_is() {
        expect_same(None, None).unwrap();
        expect_same(Some(USERS), Some(USERS)).unwrap();
        let other = UserNamespace {
            gids: USERS.uids,
            ..USERS
        };
        for (of_pod, of_container) in [(None, Some(USERS)), (Some(USERS), None), (Some(USERS), Some(other))] {
            let error = expect_same(of_pod, of_container).unwrap_err().to_string();
            assert!(error.contains("0 65536 65536"), "{error}");
        }
    }
}
