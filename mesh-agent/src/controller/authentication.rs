//! Who calls, and what that lets him ask for.
//!
//! Tested in `tests/`.

use std::{collections::HashSet, fmt};

use super::{token_review::Reviews, tokens::Tokens};
use crate::{config::ServiceAccountName, identity::SpiffeId};

/// Who has shown a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    pub account: ServiceAccountName,
    /// The node the token is bound to.
    pub node: Option<String>,
}

impl Caller {
    /// The identity that is the caller's own.
    pub fn own_identity(&self, trust_domain: &str) -> Result<SpiffeId, crate::identity::SpiffeIdError> {
        let ServiceAccountName { namespace, name } = &self.account;
        format!("spiffe://{trust_domain}/ns/{namespace}/sa/{name}").parse()
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.node {
            Some(node) => write!(f, "{} on node {node}", self.account),
            None => self.account.fmt(f),
        }
    }
}

/// How callers show who they are.
#[derive(Debug)]
pub enum Callers {
    /// By tokens that this controller's key has signed.
    Signed(Box<Tokens>),
    /// By tokens of Kubernetes, which its API server is asked about.
    Reviewed(Reviews),
}

/// Why nobody is shown.
#[derive(Debug)]
pub(super) enum Unauthenticated {
    /// The token shows nobody.
    Refused(String),
    /// Who would know could not be asked.
    Unheard(String),
}

impl Callers {
    /// Who shows this token.
    pub(super) async fn caller(&self, token: &str) -> Result<Caller, Unauthenticated> {
        match self {
            Self::Signed(tokens) => {
                tokens.caller(token).map_err(|error| Unauthenticated::Refused(error.to_string()))
            }
            Self::Reviewed(reviews) => reviews.caller(token).await,
        }
    }
}

/// The service accounts that may have more than their own certificate.
#[derive(Debug, Clone)]
pub struct Accounts {
    agents: HashSet<ServiceAccountName>,
    gateways: HashSet<ServiceAccountName>,
}

impl Accounts {
    /// These: agents may ask for the identities of their node's pods; gateways, which have but their own, judge tokens too.
    pub fn new(
        agents: impl IntoIterator<Item = ServiceAccountName>,
        gateways: impl IntoIterator<Item = ServiceAccountName>,
    ) -> Self {
        Self { agents: agents.into_iter().collect(), gateways: gateways.into_iter().collect() }
    }

    /// Whether it is an agent's.
    pub(super) fn is_agent(&self, caller: &Caller) -> bool {
        self.agents.contains(&caller.account)
    }

    /// Whether it may be told the key sets.
    pub(super) fn judges_tokens(&self, caller: &Caller) -> bool {
        self.is_agent(caller) || self.gateways.contains(&caller.account)
    }
}
