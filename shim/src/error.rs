//! What a call of containerd was answered when it could not be done.

use coreos_kvm_launcher::agent::AgentError;
pub(crate) use coreos_kvm_launcher::sentence;
use ttrpc::Code;

/// An error as containerd gets it: what kind it is decides what containerd does next, the sentence is for the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    FailedPrecondition(String),
    #[error("{0}")]
    Unimplemented(String),
    #[error("{0}")]
    Internal(String),
}

impl ShimError {
    /// Makes an error of what went wrong while `what` was being done: `making the directory /a/b: Permission denied`.
    pub(crate) fn while_doing<E: std::error::Error>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |error| Self::Internal(format!("{what}: {}", sentence(&error)))
    }

    /// The same, of something that the pod's author or the admin wrote.
    pub(crate) fn invalid<E: std::error::Error>(error: E) -> Self {
        Self::InvalidArgument(sentence(&error))
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::Unimplemented(_) => Code::UNIMPLEMENTED,
            Self::Internal(_) => Code::UNKNOWN,
        }
    }
}

impl From<AgentError> for ShimError {
    fn from(error: AgentError) -> Self {
        match error {
            AgentError::NotFound(message) => Self::NotFound(message),
            AgentError::AlreadyExists(message) => Self::AlreadyExists(message),
            AgentError::InvalidArgument(message) => Self::InvalidArgument(message),
            AgentError::FailedPrecondition(message) => Self::FailedPrecondition(message),
            AgentError::Unimplemented(message) => Self::Unimplemented(message),
            error => Self::Internal(sentence(&error)),
        }
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}
