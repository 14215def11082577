//! Why a request gets no answer, in a form that hyper makes the right `RST_STREAM` of.

use std::{error::Error, fmt};

/// What hyper is told.
#[derive(Debug)]
pub enum Failure {
    /// The stream is to be reset with this code.
    Reset(h2::Error),
    /// The connection has been ended.
    Ended,
    /// Whatever went wrong.
    Other(anyhow::Error),
}

impl Failure {
    /// Whether it is what the request asked for.
    pub fn is_wanted(&self) -> bool {
        matches!(self, Self::Reset(_) | Self::Ended)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(error) => write!(out, "reset on demand: {error}"),
            Self::Ended => out.write_str("ended on demand"),
            Self::Other(error) => write!(out, "{error:#}"),
        }
    }
}

impl Error for Failure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Reset(error) => Some(error),
            Self::Ended | Self::Other(_) => None,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}
