//! Who may do what at a workload: Istio's `AuthorizationPolicy`, compiled to what is compared.
//!
//! Each workload has its own [`Authorization`], so that what is looked at for a connection or request does not grow with
//! the number of policies in the mesh. Compared in `policy/`; tested there and in `compile/tests/authorization.rs`.

use std::sync::Arc;

use http::HeaderName;

use super::{ClaimPath, Provider, Subnet};

/// The policies that select a workload, in the order in which they are asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Authorization {
    /// `CUSTOM`: what one of them matches, its authorizer has to permit.
    pub custom: Box<[Applied]>,
    /// `DENY`: what one of them matches is refused.
    pub deny: Box<[Applied]>,
    /// `ALLOW`: where there are any, what none of them matches is refused.
    pub allow: Box<[Applied]>,
    /// `AUDIT`, and what is only tried (`istio.io/dry-run`): noted, never enforced.
    pub noted: Box<[Applied]>,
    /// Whether one of them looks at the path of requests.
    pub reads_paths: bool,
    /// Whether one of them has bodies of requests shown to its authorizer.
    pub reads_bodies: bool,
}

impl Authorization {
    /// Sorts policies by what they do.
    pub fn new(applied: &[Applied]) -> Self {
        let enforced = |action| {
            let those = applied.iter().filter(move |one| !one.policy.dry_run && one.policy.action == action);
            those.cloned().collect()
        };
        let noted = applied.iter().filter(|one| one.policy.dry_run || one.policy.action == Action::Audit);
        Self {
            custom: enforced(Action::Custom),
            deny: enforced(Action::Deny),
            allow: enforced(Action::Allow),
            noted: noted.cloned().collect(),
            // Authorizers are told the path too.
            reads_paths: applied.iter().any(|one| one.policy.reads_paths() || one.provider.is_some()),
            reads_bodies: applied
                .iter()
                .filter_map(|one| one.provider.as_ref())
                .any(|one| one.body.is_some()),
        }
    }

    /// Whether nothing is asked of whoever comes, nor noted.
    pub fn is_empty(&self) -> bool {
        [&self.custom, &self.deny, &self.allow, &self.noted].into_iter().all(|applied| applied.is_empty())
    }
}

/// A policy that selects a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// The policy.
    pub policy: Arc<Policy>,
    /// The ports of the pod that it is about, sorted, where it is written for a Service; `None`: all of them.
    pub ports: Option<Box<[u16]>>,
    /// Of a `CUSTOM` policy: who is asked; `None` where that is nobody who is known, so that what it matches is refused.
    pub provider: Option<Arc<Provider>>,
}

impl Applied {
    /// Whether it is about this port.
    pub fn is_about(&self, port: u16) -> bool {
        self.ports.as_ref().is_none_or(|ports| ports.binary_search(&port).is_ok())
    }
}

/// What a policy does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Action {
    /// `ALLOW`
    #[default]
    Allow,
    /// `DENY`
    Deny,
    /// `AUDIT`
    Audit,
    /// `CUSTOM`
    Custom,
}

impl Action {
    /// The word in configuration, metrics and logs.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
            Self::Custom => "CUSTOM",
        }
    }
}

/// One `AuthorizationPolicy`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `metadata.namespace`
    pub namespace: Arc<str>,
    /// `metadata.name`
    pub name: Arc<str>,
    /// `action`
    pub action: Action,
    /// `istio.io/dry-run: "true"`: noted, never enforced.
    pub dry_run: bool,
    /// `rules`: the policy matches when one of them does; with none it never matches.
    pub rules: Box<[Rule]>,
}

impl Policy {
    fn clauses(&self) -> impl Iterator<Item = &Clause> {
        self.rules.iter().flat_map(Rule::clauses)
    }

    fn reads_paths(&self) -> bool {
        self.clauses().any(|clause| matches!(clause, Clause::Path(_)))
    }

    /// The same policy where `cluster.local`, and each alias, stands for the mesh's own trust domain and all its aliases:
    /// policies outlive a change of its name.
    #[must_use]
    pub fn in_trust_domains(&self, own: &str, aliases: &[Arc<str>]) -> Self {
        let domains: Vec<&str> = std::iter::once(own).chain(aliases.iter().map(|alias| &**alias)).collect();
        let mut policy = self.clone();
        for rule in &mut policy.rules {
            for clause in rule.from.iter_mut().flatten().chain(&mut rule.when) {
                if let Clause::Principal(named) = clause {
                    for texts in [&mut named.any_of, &mut named.none_of] {
                        *texts = texts.iter().flat_map(|text| text.in_trust_domains(&domains)).collect();
                    }
                }
            }
        }
        policy
    }
}

/// One entry of `rules`: one of `from`, one of `to` and all of `when` must hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rule {
    /// `from[].source`, each with all that it asks for; empty: from anywhere.
    pub from: Box<[Box<[Clause]>]>,
    /// `to[].operation`, each with all that it asks for; empty: anything.
    pub to: Box<[Box<[Clause]>]>,
    /// `when`
    pub when: Box<[Clause]>,
    /// Whether any of these asks for what only HTTP has.
    pub http: bool,
}

impl Rule {
    /// A rule of these parts.
    pub fn new(from: Box<[Box<[Clause]>]>, to: Box<[Box<[Clause]>]>, when: Box<[Clause]>) -> Self {
        let mut rule = Self { from, to, when, http: false };
        let http = rule.clauses().any(Clause::is_http);
        rule.http = http;
        rule
    }

    fn clauses(&self) -> impl Iterator<Item = &Clause> {
        self.from.iter().chain(&self.to).flatten().chain(&self.when)
    }
}

/// What is asked of one attribute: one of `any_of` (where there are any), and none of `none_of`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listed<T> {
    /// The field itself, or `values`.
    pub any_of: Box<[T]>,
    /// The field with `not`, or `notValues`.
    pub none_of: Box<[T]>,
}

impl<T> Listed<T> {
    /// Whether it holds, by what matches.
    pub fn holds(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any_of.is_empty() || self.any_of.iter().any(&matches)) && !self.none_of.iter().any(&matches)
    }
}

/// One attribute and what is asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Clause {
    /// `principals`, `source.principal`: `TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
    Principal(Listed<TextMatch>),
    /// `namespaces`, `source.namespace`.
    Namespace(Listed<TextMatch>),
    /// `serviceAccounts`, `source.serviceAccount`.
    ServiceAccount(Listed<ServiceAccount>),
    /// `trustDomains`, `source.trustDomain`.
    TrustDomain(Listed<TextMatch>),
    /// `ipBlocks`, `source.ip`; `remoteIpBlocks`, `remote.ip`, which are the same for as long as there are no gateways.
    SourceIp(Listed<Subnet>),
    /// `destination.ip`
    DestinationIp(Listed<Subnet>),
    /// `ports`, `destination.port`: of the pod.
    Port(Listed<u16>),
    /// `connection.sni`: the name in the client's `ClientHello`.
    Sni(Listed<TextMatch>),
    /// `hosts`
    Host(Listed<TextMatch>),
    /// `methods`
    Method(Listed<TextMatch>),
    /// `paths`
    Path(Listed<PathMatch>),
    /// `request.headers[NAME]`
    Header(HeaderName, Listed<TextMatch>),
    /// `requestPrincipals`, `request.auth.principal`: `ISSUER/SUBJECT` of the request's token.
    RequestPrincipal(Listed<TextMatch>),
    /// `request.auth.audiences`
    Audience(Listed<TextMatch>),
    /// `request.auth.presenter`: the claim `azp`.
    Presenter(Listed<TextMatch>),
    /// `request.auth.claims[NAME][NAME]`
    Claim(ClaimPath, Listed<TextMatch>),
}

impl Clause {
    /// Whether only requests have it.
    pub const fn is_http(&self) -> bool {
        match self {
            Self::Host(_)
            | Self::Method(_)
            | Self::Path(_)
            | Self::Header(..)
            | Self::RequestPrincipal(_)
            | Self::Audience(_)
            | Self::Presenter(_)
            | Self::Claim(..) => true,
            Self::Principal(_)
            | Self::Namespace(_)
            | Self::ServiceAccount(_)
            | Self::TrustDomain(_)
            | Self::SourceIp(_)
            | Self::DestinationIp(_)
            | Self::Port(_)
            | Self::Sni(_) => false,
        }
    }
}

/// A service account in its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    /// Its namespace.
    pub namespace: Box<str>,
    /// Its name.
    pub name: Box<str>,
}

/// A text as policies write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextMatch {
    /// `abc`
    Exact(Box<str>),
    /// `abc*`
    Prefix(Box<str>),
    /// `*abc`
    Suffix(Box<str>),
    /// `*`: anything but nothing.
    Present,
}

impl TextMatch {
    /// Reads what is written; `None` where stars stand at both ends.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Present);
        }
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            (Some(_), Some(_)) => None,
            (Some(suffix), None) => Some(Self::Suffix(suffix.into())),
            (None, Some(prefix)) => Some(Self::Prefix(prefix.into())),
            (None, None) => Some(Self::Exact(text.into())),
        }
    }

    /// What a principal comes to, where it names one of these trust domains, the first of which is the mesh's own.
    fn in_trust_domains(&self, domains: &[&str]) -> Vec<Self> {
        let (Self::Exact(text) | Self::Prefix(text) | Self::Suffix(text)) = self else {
            return vec![self.clone()];
        };
        let Some((named, rest)) = text.split_once('/') else { return vec![self.clone()] };
        // `*` for a trust domain is any; `*-old/ns/…` is those that end so.
        let suffix = matches!(self, Self::Suffix(_));
        let is_named = |domain: &&str| if suffix { domain.ends_with(named) } else { *domain == named };
        let own = (!suffix && named == "cluster.local") || domains.iter().any(is_named);
        if !own || (suffix && named.is_empty()) {
            return vec![self.clone()];
        }
        let written = |domain: &&str| -> Box<str> { format!("{domain}/{rest}").into() };
        let all = domains.iter().map(|domain| match self {
            Self::Prefix(_) => Self::Prefix(written(domain)),
            _ => Self::Exact(written(domain)),
        });
        // Whoever else it names, it goes on to name.
        all.chain(suffix.then(|| self.clone())).collect()
    }
}

/// A path as policies write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathMatch {
    /// Whole, its beginning or its end.
    Text(TextMatch),
    /// With `{*}` and `{**}` in it.
    Template(Box<[TemplatePart]>),
}

/// A part of a path with `{*}` or `{**}` in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TemplatePart {
    /// As it stands.
    Literal(Box<str>),
    /// `{*}`: one segment, never empty.
    Segment,
    /// `{**}`: any number of segments, none among them.
    Rest,
}
