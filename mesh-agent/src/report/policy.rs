//! What policies that are only tried, or only audit, have to say, and what external authorizers have said.

use std::net::SocketAddr;

use super::Reporter;
use crate::{
    identity::SpiffeId,
    state::snapshot::{Action, Policy, Workload},
};

/// A connection or request that a policy which is not enforced has something to say about.
#[derive(Debug)]
pub struct PolicyNote<'a> {
    /// The pod that was asked.
    pub pod: &'a Workload,
    /// Where it came from.
    pub client: SocketAddr,
    /// What it was for.
    pub destination: SocketAddr,
    /// Who asked.
    pub source: Option<&'a SpiffeId>,
    /// What the policy does.
    pub action: Action,
    /// The policy and its rule that matched; `None`: an ALLOW policy is tried, and none matched.
    pub by: Option<(&'a Policy, usize)>,
    /// What it would have come to.
    pub allowed: bool,
}

impl PolicyNote<'_> {
    /// The word in metrics and logs.
    const fn result(&self) -> &'static str {
        match (self.action, self.allowed) {
            (Action::Audit, _) => "audited",
            (_, true) => "allowed",
            (_, false) => "denied",
        }
    }
}

/// What came of asking an external authorizer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// It said yes.
    Allowed,
    /// It said no.
    Denied,
    /// It gave no answer, and what was asked about is refused.
    Error,
    /// It gave no answer, and `failOpen` lets in what was asked about.
    FailedOpen,
}

impl Asked {
    /// The word in metrics.
    const fn word(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Denied => "denied",
            Self::Error => "error",
            Self::FailedOpen => "failed_open",
        }
    }
}

impl Reporter {
    /// An external authorizer was asked: `mesh_external_authorization_total`.
    pub fn asked(&self, provider: &str, came_of_it: Asked) {
        let labels = [("provider", provider.to_owned()), ("result", came_of_it.word().to_owned())];
        self.metrics.external_authorization.get_or_create(&labels).inc();
    }

    /// A policy that is not enforced was asked: `mesh_policy_dry_run_total`, and one log line.
    pub fn noted(&self, note: &PolicyNote<'_>) {
        let policy = note.by.map(|(policy, _)| format!("{}/{}", policy.namespace, policy.name));
        let policy = policy.unwrap_or_else(|| "none".to_owned());
        self.log.line(|line| {
            line.text("event", Some("policy"));
            line.display("src.addr", Some(note.client));
            line.display("src.identity", note.source);
            line.display("dst.addr", Some(note.destination));
            line.text("pod", Some(&note.pod.name));
            line.text("pod_namespace", Some(&note.pod.namespace));
            line.text("action", Some(note.action.word()));
            line.text("result", Some(note.result()));
            line.text("policy", Some(&policy));
            line.number("rule", note.by.map(|(_, rule)| rule as u64));
        });
        self.metrics.noted(note.action.word(), note.result(), policy);
    }
}
