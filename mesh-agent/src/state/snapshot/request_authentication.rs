//! Whose tokens a workload believes: Istio's `RequestAuthentication`, compiled to what is looked for and compared.
//!
//! Used in `policy/jwt`; made in `compile/request_authentication.rs`, where it is tested.

use std::sync::Arc;

use http::HeaderName;

use super::{Keys, Protocol};

/// What a workload believes of tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens {
    /// The rules of every `RequestAuthentication` that selects it.
    pub rules: Box<[AppliedTokens]>,
    /// What Services declare of the pod's ports, sorted; empty where there are no rules.
    pub declared: Box<[(u16, Protocol)]>,
}

/// The rules of one `RequestAuthentication` that selects a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppliedTokens {
    /// `NAMESPACE/NAME`
    pub name: Arc<str>,
    /// `jwtRules`
    pub rules: Arc<[TokenRule]>,
    /// The ports of the pod that it is about, sorted, where it is written for a Service; `None`: all of them.
    pub ports: Option<Box<[u16]>>,
}

impl Tokens {
    /// The rules about a port.
    pub fn of(&self, port: u16) -> impl Iterator<Item = &TokenRule> {
        let about = move |one: &&AppliedTokens| {
            one.ports.as_ref().is_none_or(|ports| ports.binary_search(&port).is_ok())
        };
        self.rules.iter().filter(about).flat_map(|one| &*one.rules)
    }

    /// Whether connections to a port are read for requests with tokens: not where it is declared to carry bytes.
    pub fn reads(&self, port: u16) -> bool {
        !self.rules.is_empty()
            && self.of(port).next().is_some()
            && self.declared(port) != Some(Protocol::Opaque)
    }

    /// Whether it is certain that what comes to a port are requests, some of which might have tokens.
    pub fn asks_for_requests(&self, port: u16) -> bool {
        self.reads(port) && self.declared(port).is_some()
    }

    fn declared(&self, port: u16) -> Option<Protocol> {
        let place = self.declared.binary_search_by_key(&port, |(port, _)| *port).ok()?;
        self.declared.get(place).map(|(_, protocol)| *protocol)
    }
}

/// The names of a claim, from the outside inwards.
pub type ClaimPath = Box<[Box<str>]>;

/// One entry of `jwtRules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRule {
    /// `issuer`
    pub issuer: Box<str>,
    /// `audiences`; empty: any.
    pub audiences: Box<[Box<str>]>,
    /// `jwks` or `jwksUri`.
    pub keys: Keys,
    /// Where its tokens are.
    pub locations: Box<[Location]>,
    /// `forwardOriginalToken`
    pub forward: bool,
    /// `outputPayloadToHeader`
    pub payload_to: Option<HeaderName>,
    /// `outputClaimToHeaders`: header, and the claim by its path.
    pub claims_to: Box<[(HeaderName, ClaimPath)]>,
    /// Claims whose text is a list of words with spaces between them: `scope`, `permission`, and `spaceDelimitedClaims`.
    pub spaced: Box<[Box<str>]>,
}

/// A place where a token may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `fromHeaders`; the token comes after the prefix.
    Header(HeaderName, Box<str>),
    /// `Authorization: Bearer`, where the scheme may be written in any case (RFC 9110 section 11.1).
    Bearer,
    /// `fromParams`: a parameter of the query.
    Param(Box<str>),
    /// `fromCookies`
    Cookie(Box<str>),
}
