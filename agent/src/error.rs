//! Errors as the protocol has them: a code for the host's program, a sentence for a person.

use std::fmt::Display;

use ttrpc::Code;

/// What could not be done.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    FailedPrecondition(String),
    /// What the runtime said, which names what it was about.
    #[error("{0}")]
    Runtime(String),
    #[error("{what}: {cause}")]
    Failed { what: String, cause: String },
}

impl AgentError {
    /// Something that was tried and did not work.
    pub(crate) fn failed<E: Display>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |cause| Self::Failed {
            what,
            cause: cause.to_string(),
        }
    }
}

impl From<AgentError> for ttrpc::Error {
    fn from(error: AgentError) -> Self {
        let code = match error {
            AgentError::NotFound(_) => Code::NOT_FOUND,
            AgentError::AlreadyExists(_) => Code::ALREADY_EXISTS,
            AgentError::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            AgentError::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            AgentError::Runtime(_) | AgentError::Failed { .. } => Code::INTERNAL,
        };
        Self::RpcStatus(ttrpc::get_status(code, error.to_string()))
    }
}
