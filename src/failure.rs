//! How a command ends when it does not do what was asked.

use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use tender_client::AttachError;

use crate::trace::TraceError;

/// Why a command ends early.
#[derive(Debug)]
pub enum Failure {
    /// To be told on standard error: what, why, and the cure.
    Message(String),
    /// All was done and shown, but the answer is bad.
    Bad,
    /// A signal asked for the end; everything was cleaned up.
    Interrupted,
    /// Whoever read the output has had enough.
    OutputClosed,
}

impl Failure {
    /// A failure with its message.
    pub fn message(text: impl Display) -> Self {
        Self::Message(text.to_string())
    }

    /// A failed operation on a path or process: what was tried, and what the system said.
    pub fn of(tried: impl Display) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Message(format!("{tried}: {error}"))
    }

    /// A write to standard output that failed.
    pub fn of_output(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::OutputClosed,
            _ => Self::Message(format!("cannot write to standard output: {error}")),
        }
    }

    /// Tells it, and the exit status: 1, or as if the signal concerned had ended the process.
    pub fn tell(&self) -> ExitCode {
        match self {
            Self::Message(text) => {
                eprintln!("tender: {text}");
                ExitCode::FAILURE
            }
            Self::Bad => ExitCode::FAILURE,
            Self::Interrupted => ExitCode::from(130),
            Self::OutputClosed => ExitCode::from(141),
        }
    }
}

impl From<AttachError> for Failure {
    fn from(error: AttachError) -> Self {
        const CURE: &str = "give --token-file FILE, the file that its configuration names for your tenant";
        match error {
            // The daemon speaks of the wire's metadata, which nobody at a command line can send.
            AttachError::Unauthenticated { token_shown: false, .. } => {
                Self::message(format_args!("the daemon wants a token, and none was given; {CURE}"))
            }
            AttachError::Unauthenticated { token_shown: true, .. } => {
                Self::message(format_args!("the daemon knows no tenant by the token that was given; {CURE}"))
            }
            other => Self::message(other),
        }
    }
}

impl From<TraceError> for Failure {
    fn from(error: TraceError) -> Self {
        Self::message(error)
    }
}
