//! SPIFFE identities in Istio's shape: `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
//!
//! Parsing accepts exactly that shape and nothing near it: two spellings of one identity would be two answers
//! to one policy. Tested by the unit tests below.

use std::{fmt, str::FromStr, sync::Arc};

/// Longest identity accepted, in bytes (the SPIFFE ID specification, section 2.3).
const MAX_LENGTH: usize = 2048;

/// The identity of a workload. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    /// Trust domain, `cluster.local` by default.
    pub trust_domain: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    pub service_account: Arc<str>,
}

/// Why a string is no identity of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Longer than 2048 bytes.
    #[error("an identity of {0} bytes is longer than the {MAX_LENGTH} allowed")]
    TooLong(usize),
    /// Not `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
    #[error("{0:?} is not of the form spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
    Shape(String),
    /// A part is empty or has a character that may not be in it.
    #[error("{0:?} has a bad {1}: letters, digits, '.', '-' and '_' only, and not empty")]
    Part(String, &'static str),
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(text: &str) -> Result<Self, SpiffeIdError> {
        if text.len() > MAX_LENGTH {
            return Err(SpiffeIdError::TooLong(text.len()));
        }
        let shape = || SpiffeIdError::Shape(text.to_owned());
        let mut parts = text.strip_prefix("spiffe://").ok_or_else(shape)?.split('/');
        let (Some(trust_domain), Some("ns"), Some(namespace), Some("sa"), Some(service_account), None) =
            (parts.next(), parts.next(), parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(shape());
        };
        let part = |name| SpiffeIdError::Part(text.to_owned(), name);
        if !is_trust_domain(trust_domain) {
            return Err(part("trust domain (lower case)"));
        }
        if !is_segment(namespace) {
            return Err(part("namespace"));
        }
        if !is_segment(service_account) {
            return Err(part("service account"));
        }
        Ok(Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }
}

/// Whether this may stand as the trust domain of an identity.
pub(super) fn is_trust_domain(name: &str) -> bool {
    is_segment(name) && name.len() <= 255 && !name.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn is_segment(part: &str) -> bool {
    !part.is_empty()
        && part != "."
        && part != ".."
        && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_parses_to_the_same() -> Result<(), SpiffeIdError> {
        let text = "spiffe://cluster.local/ns/default/sa/reviews-v2.blue_1";
        let id: SpiffeId = text.parse()?;
        assert_eq!(&*id.trust_domain, "cluster.local");
        assert_eq!(&*id.namespace, "default");
        assert_eq!(&*id.service_account, "reviews-v2.blue_1");
        assert_eq!(id.to_string(), text);
        Ok(())
    }

    #[test]
    fn near_misses_are_refused() {
        for text in [
            "",
            "cluster.local/ns/a/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local",
            "spiffe://cluster.local/",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local//ns/a/sa/b",
            "spiffe:///ns/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:80/ns/a/sa/b",
            "spiffe://me@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a%2fb/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?x",
            "spiffe://cluster.local/ns/a/sa/b#x",
            "spiffe://cluster.local/ns/a/sa/b ",
            "spiffe://cluster.local/ns/a/sa/b\u{0}",
            "spiffe://clüster.local/ns/a/sa/b",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?} was accepted");
        }
        let long = format!("spiffe://cluster.local/ns/a/sa/{}", "b".repeat(MAX_LENGTH));
        assert!(matches!(long.parse::<SpiffeId>(), Err(SpiffeIdError::TooLong(_))));
    }
}
