//! Why a call brought no answer, and what that means for the next one.

use tonic::{Code, Status};

/// Why a call brought no answer. None of these reaches a caller: each verb turns it into an outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The daemon or the way to it is gone, or it says what no daemon says.
    Gone,
    /// The daemon is there, but does not know the attachment: it was started anew, or forgot.
    Detached,
    /// No answer in time.
    Deadline,
    /// Too much to do.
    Shed,
    /// The question was wrong or is not allowed.
    Refused,
}

impl Failure {
    /// Whether attaching anew may help.
    pub(crate) fn wants_attach(self) -> bool {
        matches!(self, Self::Gone | Self::Detached)
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        match status.code() {
            Code::NotFound => Self::Detached,
            Code::DeadlineExceeded => Self::Deadline,
            Code::ResourceExhausted => Self::Shed,
            // Out of range is the transport's word for a message that is too large.
            Code::InvalidArgument
            | Code::OutOfRange
            | Code::FailedPrecondition
            | Code::PermissionDenied
            | Code::Unauthenticated => {
                tracing::warn!("the daemon refuses: {}", status.message());
                Self::Refused
            }
            // What remains is a broken connection in one of its many forms, or a daemon that broke.
            code => {
                tracing::debug!("no answer from the daemon: {code:?}: {}", status.message());
                Self::Gone
            }
        }
    }
}
