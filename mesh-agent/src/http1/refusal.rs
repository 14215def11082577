//! Why a request was refused, for the client (a status) and for the operator (a sentence that names the rule).

use std::fmt;

use http::StatusCode;

use super::Limits;

/// Why a request was refused. The connection ends with the answer to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The bytes are no request, or one that can be read in two ways; the sentence names the rule.
    Malformed(&'static str),
    /// The head is larger than [`Limits::head_bytes`]: the limit.
    HeadTooLarge(usize),
    /// There are more header lines than [`Limits::headers`]: the limit.
    TooManyHeaders(usize),
    /// The target is longer than [`Limits::target_bytes`]: the limit.
    TargetTooLong(usize),
    /// The head did not arrive in time.
    HeadTimeout,
}

impl Refusal {
    pub(super) fn head_too_large(limits: &Limits) -> Self {
        Self::HeadTooLarge(limits.head_bytes)
    }

    /// What to answer.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Malformed(_) => StatusCode::BAD_REQUEST,
            Self::HeadTooLarge(_) | Self::TooManyHeaders(_) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::TargetTooLong(_) => StatusCode::URI_TOO_LONG,
            Self::HeadTimeout => StatusCode::REQUEST_TIMEOUT,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(sentence) => out.write_str(sentence),
            Self::HeadTooLarge(limit) => write!(out, "the head of the request is larger than {limit} bytes"),
            Self::TooManyHeaders(limit) => write!(out, "the request has more than {limit} header lines"),
            Self::TargetTooLong(limit) => {
                write!(out, "the target of the request is longer than {limit} bytes")
            }
            Self::HeadTimeout => out.write_str("the head of the request did not arrive in time"),
        }
    }
}
