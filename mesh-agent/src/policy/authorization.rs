//! What authorization policies say of a connection or request.
//!
//! Asked in Istio's order: what a CUSTOM policy matches, its authorizer has to have permitted; what a DENY policy matches
//! is refused; where there are ALLOW policies, one of them has to match. Looks only at the policies that select the pod, allocates nothing until it refuses, and believes only
//! what the kernel or a verified certificate says of who asks.
//!
//! Of a connection, what only requests have is not known. While its bytes may still turn out to be requests, that is said
//! ([`Ruling::BytesDecide`]); once they have not, an ALLOW rule that asks for it does not hold, and a DENY rule holds
//! whatever it asks for, as in Istio. So what is permitted as bytes would have been permitted as any request too.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::{HeaderMap, Method};

use super::{Permit, inbound, jwt::Claims, matching};
use crate::{
    error::{Error, Kind, Result},
    identity::SpiffeId,
    report::{PolicyNote, Reporter},
    state::snapshot::{Action, Applied, Authorization, Clause, Policy, Provider, Rule, Workload},
};

/// Who asks for what.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The pod that is asked, with the policies that select it.
    pub workload: &'a Workload,
    /// Where its app listens.
    pub destination: SocketAddr,
    /// Who asks, as a verified certificate or the kernel says.
    pub source: Option<&'a SpiffeId>,
    /// Where the connection comes from.
    pub client: SocketAddr,
    /// The external authorizers that have said yes to what is asked.
    pub approved: &'a [Arc<Provider>],
}

/// The head of a request, as policies see it.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// Its method.
    pub method: &'a Method,
    /// Its host, with the port if it names one.
    pub authority: &'a str,
    /// Its path in its normal form, without the query.
    pub path: &'a str,
    /// Its headers.
    pub headers: &'a HeaderMap,
    /// What its verified token says.
    pub claims: Option<&'a Claims>,
}

/// What is said of a connection before its bytes are looked at.
#[derive(Debug)]
pub enum Ruling {
    /// Whatever the bytes are, they may pass.
    Permitted(Permit),
    /// The requests in it, or its server name, decide.
    BytesDecide,
}

/// Whether a connection may be handed to the pod's app, going by what is known before its first byte.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Plaintext`], [`Kind::IllegalDestination`].
pub fn connection(asked: &Asked<'_>, reporter: &Reporter) -> Result<Ruling> {
    let permit = inbound(asked)?;
    let facts = Facts { asked, bytes: Bytes::Unread };
    let tokens = asked.workload.authentication.tokens.reads(asked.destination.port());
    match verdict(&asked.workload.authorization, &facts) {
        Verdict::Open => Ok(Ruling::BytesDecide),
        Verdict::Allowed if tokens => Ok(Ruling::BytesDecide),
        decided => {
            note(&facts, reporter);
            decided.settle(permit).map(Ruling::Permitted)
        }
    }
}

/// The same for a connection whose bytes are no requests; `server_name` is what its `ClientHello` says.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Plaintext`], [`Kind::IllegalDestination`].
pub fn opaque(asked: &Asked<'_>, server_name: Option<&str>, reporter: &Reporter) -> Result<Permit> {
    if asked.workload.authentication.tokens.asks_for_requests(asked.destination.port()) {
        let text =
            "the port is declared HTTP and its requests are looked at for tokens, but these bytes are none";
        return Err(Error::new(Kind::BadRequest, text));
    }
    decide(asked, Bytes::Opaque { server_name }, reporter)
}

/// Whether a connection is read for nothing but the tokens of requests that may be in it, and may as well carry bytes.
pub fn read_for_tokens_alone(asked: &Asked<'_>) -> bool {
    let (tokens, port) = (&asked.workload.authentication.tokens, asked.destination.port());
    let verdict = || verdict(&asked.workload.authorization, &Facts { asked, bytes: Bytes::Unread });
    tokens.reads(port) && !tokens.asks_for_requests(port) && matches!(verdict(), Verdict::Allowed)
}

/// Whether a request may be handed to the pod's app.
///
/// # Errors
/// [`Kind::Denied`], [`Kind::Plaintext`], [`Kind::IllegalDestination`].
pub fn request(asked: &Asked<'_>, head: &Head<'_>, reporter: &Reporter) -> Result<Permit> {
    decide(asked, Bytes::Request(head), reporter)
}

/// The external authorizer that has to be asked next, if one has. To be called again once it has said yes, for what it has
/// changed of a request may select others. `None` says nothing of whether the rest of the policies permit it.
pub fn authorizer<'a>(asked: &Asked<'a>, open: Open<'_>) -> Option<&'a Arc<Provider>> {
    let head;
    let bytes = match open {
        Open::Connection | Open::Requests => return None,
        Open::Opaque(server_name) => Bytes::Opaque { server_name },
        Open::Request(of_request) => {
            head = of_request;
            Bytes::Request(&head)
        }
    };
    let facts = Facts { asked, bytes };
    match custom(&asked.workload.authorization, &facts) {
        Selected::Asks(provider) => Some(provider),
        Selected::Nothing | Selected::Refused(..) | Selected::Open => None,
    }
}

/// What is open already.
#[derive(Debug, Clone, Copy)]
pub enum Open<'a> {
    /// A connection whose bytes pass unread.
    Connection,
    /// A connection whose requests are judged one by one.
    Requests,
    /// A connection whose bytes are no requests, and its server name.
    Opaque(Option<&'a str>),
    /// A request, until its response has ended.
    Request(Head<'a>),
}

/// Whether what was permitted would be permitted now. Notes nothing of what is only tried: that was done when it began.
///
/// # Errors
/// As for who asks anew. Of a connection that passes unread nobody knows the requests: where those would decide it has no
/// permit.
pub fn stands(asked: &Asked<'_>, open: Open<'_>) -> Result<()> {
    let permit = inbound(asked)?;
    let said = |bytes| verdict(&asked.workload.authorization, &Facts { asked, bytes });
    let now = match open {
        Open::Connection if asked.workload.authentication.tokens.reads(asked.destination.port()) => {
            Verdict::Open
        }
        Open::Connection => said(Bytes::Unread),
        Open::Requests => match said(Bytes::Unread) {
            Verdict::Open => Verdict::Allowed,
            decided => decided,
        },
        Open::Opaque(server_name) => said(Bytes::Opaque { server_name }),
        Open::Request(head) => said(Bytes::Request(&head)),
    };
    now.settle(permit).map(|_| ())
}

fn decide(asked: &Asked<'_>, bytes: Bytes<'_>, reporter: &Reporter) -> Result<Permit> {
    let permit = inbound(asked)?;
    let facts = Facts { asked, bytes };
    note(&facts, reporter);
    verdict(&asked.workload.authorization, &facts).settle(permit)
}

/// What rules are held against.
#[derive(Clone, Copy)]
pub(super) struct Facts<'a> {
    pub asked: &'a Asked<'a>,
    pub bytes: Bytes<'a>,
}

impl Facts<'_> {
    pub fn source_ip(&self) -> IpAddr {
        self.asked.client.ip().to_canonical()
    }
}

/// How far the bytes of a connection are known.
#[derive(Clone, Copy)]
pub(super) enum Bytes<'a> {
    /// Not at all.
    Unread,
    /// They are no requests.
    Opaque { server_name: Option<&'a str> },
    /// This request is what is asked about.
    Request(&'a Head<'a>),
}

/// What policies come to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Verdict<'a> {
    Allowed,
    /// By this rule; by none where no ALLOW policy matches.
    Denied(Option<(&'a Policy, usize)>),
    /// More has to be known.
    Open,
}

impl Verdict<'_> {
    fn settle(self, permit: Permit) -> Result<Permit> {
        match self {
            Self::Allowed => Ok(permit),
            Self::Denied(by) => Err(Error::new(Kind::Denied, detail(by))),
            Self::Open => Err(Error::new(Kind::Denied, detail(None))),
        }
    }
}

/// What Envoy says of it in its access log.
fn detail(by: Option<(&Policy, usize)>) -> String {
    match by {
        Some((policy, rule)) => {
            let Policy { namespace, name, .. } = policy;
            format!("rbac_access_denied_matched_policy[ns[{namespace}]-policy[{name}]-rule[{rule}]]")
        }
        None => "rbac_access_denied_matched_policy[none]".to_owned(),
    }
}

/// Whether something holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holds {
    Yes,
    No,
    /// That is not known yet.
    Open,
}

/// What the enforced policies say.
pub(super) fn verdict<'a>(all: &'a Authorization, facts: &Facts<'_>) -> Verdict<'a> {
    let port = facts.asked.destination.port();
    let about = |applied: &'a [Applied]| applied.iter().filter(move |one| one.is_about(port));
    let mut open = match custom(all, facts) {
        Selected::Nothing => false,
        Selected::Open => true,
        Selected::Refused(policy, rule) => return Verdict::Denied(Some((policy, rule))),
        Selected::Asks(_) => return Verdict::Denied(None),
    };
    for applied in about(&all.deny) {
        let found = matched(&applied.policy, facts);
        if let Some((rule, Holds::Yes)) = found {
            return Verdict::Denied(Some((&applied.policy, rule)));
        }
        open |= found.is_some();
    }
    match allowed(about(&all.allow).map(|applied| &*applied.policy), facts) {
        Holds::No => Verdict::Denied(None),
        Holds::Yes if !open => Verdict::Allowed,
        Holds::Yes | Holds::Open => Verdict::Open,
    }
}

/// What CUSTOM policies come to.
enum Selected<'a> {
    /// None matches whose authorizer has not said yes.
    Nothing,
    /// More has to be known before an authorizer can be asked.
    Open,
    /// By this rule: there is nobody who could be asked.
    Refused(&'a Policy, usize),
    /// This one has not been asked.
    Asks(&'a Arc<Provider>),
}

/// Of bytes that may still turn out to be requests nobody is asked: as requests they are shown one by one.
fn custom<'a>(all: &'a Authorization, facts: &Facts<'_>) -> Selected<'a> {
    let port = facts.asked.destination.port();
    let mut open = false;
    for applied in all.custom.iter().filter(|one| one.is_about(port)) {
        let Some((place, holds)) = matched(&applied.policy, facts) else { continue };
        let opaque = matches!(facts.bytes, Bytes::Opaque { .. });
        // What only requests have is not known of bytes: there is nothing to ask about. Nor is there over HTTP.
        let of_connections =
            |rule: &Rule| !rule.http && self::holds(Action::Custom, rule, facts) == Holds::Yes;
        let can_ask = |provider: &&Arc<Provider>| {
            !opaque || (provider.knows_connections() && applied.policy.rules.iter().any(of_connections))
        };
        let Some(provider) = applied.provider.as_ref().filter(can_ask) else {
            if holds == Holds::Yes {
                return Selected::Refused(&applied.policy, place);
            }
            open = true;
            continue;
        };
        if holds == Holds::Open || matches!(facts.bytes, Bytes::Unread) {
            open = true;
        } else if !facts.asked.approved.iter().any(|by| by.is_same_authorizer(provider)) {
            return Selected::Asks(provider);
        }
    }
    if open { Selected::Open } else { Selected::Nothing }
}

/// Whether one of the policies matches; where there are none, that is as if one did.
fn allowed<'a>(policies: impl Iterator<Item = &'a Policy>, facts: &Facts<'_>) -> Holds {
    let mut sum = None;
    for policy in policies {
        match matched(policy, facts) {
            Some((_, Holds::Yes)) => return Holds::Yes,
            Some(_) => sum = Some(Holds::Open),
            None => sum = sum.or(Some(Holds::No)),
        }
    }
    sum.unwrap_or(Holds::Yes)
}

/// The first of the policy's rules that holds, else the first that may.
fn matched(policy: &Policy, facts: &Facts<'_>) -> Option<(usize, Holds)> {
    let mut open = None;
    for (place, rule) in policy.rules.iter().enumerate() {
        match holds(policy.action, rule, facts) {
            Holds::Yes => return Some((place, Holds::Yes)),
            Holds::Open => open = open.or(Some((place, Holds::Open))),
            Holds::No => {}
        }
    }
    open
}

fn holds(action: Action, rule: &Rule, facts: &Facts<'_>) -> Holds {
    let opaque = matches!(facts.bytes, Bytes::Opaque { .. });
    if opaque && rule.http && action == Action::Allow {
        return Holds::No;
    }
    let one_of = |alternatives: &[Box<[Clause]>]| {
        let mut sum = if alternatives.is_empty() { Holds::Yes } else { Holds::No };
        for clauses in alternatives {
            match all_of(clauses, facts) {
                Holds::Yes => return Holds::Yes,
                Holds::Open => sum = Holds::Open,
                Holds::No => {}
            }
        }
        sum
    };
    let mut sum = all_of(&rule.when, facts);
    for part in [&rule.from, &rule.to] {
        if sum == Holds::No {
            return sum;
        }
        sum = both(sum, one_of(part));
    }
    match sum {
        // Nothing more will be known: whoever refuses does not look at it.
        Holds::Open if opaque => Holds::Yes,
        sum => sum,
    }
}

fn all_of(clauses: &[Clause], facts: &Facts<'_>) -> Holds {
    let mut sum = Holds::Yes;
    for clause in clauses {
        sum = both(sum, matching::holds(clause, facts));
        if sum == Holds::No {
            break;
        }
    }
    sum
}

const fn both(one: Holds, other: Holds) -> Holds {
    match (one, other) {
        (Holds::No, _) | (_, Holds::No) => Holds::No,
        (Holds::Open, _) | (_, Holds::Open) => Holds::Open,
        (Holds::Yes, Holds::Yes) => Holds::Yes,
    }
}

/// Tells of what is only tried or audited, as far as it is certain.
fn note(facts: &Facts<'_>, reporter: &Reporter) {
    let Asked { workload, destination, client, source, .. } = *facts.asked;
    if workload.authorization.noted.is_empty() {
        return;
    }
    let tell = |action: Action, by: Option<(&Policy, usize)>, allowed: bool| {
        reporter.noted(&PolicyNote { pod: workload, client, destination, source, action, by, allowed });
    };
    let about = || {
        let noted = workload.authorization.noted.iter().filter(|one| one.is_about(destination.port()));
        noted.map(|one| &*one.policy)
    };
    for policy in about().filter(|policy| policy.action != Action::Allow) {
        if let Some((rule, Holds::Yes)) = matched(policy, facts) {
            tell(policy.action, Some((policy, rule)), policy.action == Action::Audit);
        }
    }
    let mut tried = about().filter(|policy| policy.action == Action::Allow).peekable();
    if tried.peek().is_none() {
        return;
    }
    let mut open = false;
    let by = tried.find_map(|policy| {
        let (rule, holds) = matched(policy, facts)?;
        open |= holds == Holds::Open;
        (holds == Holds::Yes).then_some((policy, rule))
    });
    if by.is_some() || !open {
        tell(Action::Allow, by, by.is_some());
    }
}
