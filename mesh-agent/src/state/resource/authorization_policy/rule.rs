//! One entry of `rules`: `from`, `to`, `when`.

use serde::Deserialize;

use super::{
    super::field::{Checked, FieldError, item, under},
    condition::WireCondition,
};
use crate::state::snapshot::{
    Clause, Listed, PathMatch, Rule, ServiceAccount, Subnet, TemplatePart, TextMatch,
};

/// Most entries of `serviceAccounts` (Istio), and most characters of one.
const MOST_ACCOUNTS: usize = 16;
const LONGEST_ACCOUNT: usize = 320;

const SEGMENT: &str = "{*}";
const REST: &str = "{**}";

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireRule {
    from: Option<Vec<WireFrom>>,
    to: Option<Vec<WireTo>>,
    when: Option<Vec<WireCondition>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireFrom {
    source: Option<WireSource>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireTo {
    operation: Option<WireOperation>,
}

type Values = Option<Vec<String>>;

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireSource {
    principals: Values,
    not_principals: Values,
    request_principals: Values,
    not_request_principals: Values,
    namespaces: Values,
    not_namespaces: Values,
    service_accounts: Values,
    not_service_accounts: Values,
    trust_domains: Values,
    not_trust_domains: Values,
    ip_blocks: Values,
    not_ip_blocks: Values,
    remote_ip_blocks: Values,
    not_remote_ip_blocks: Values,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct WireOperation {
    hosts: Values,
    not_hosts: Values,
    ports: Values,
    not_ports: Values,
    methods: Values,
    not_methods: Values,
    paths: Values,
    not_paths: Values,
}

/// Whose rule it is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owner<'a> {
    /// Namespace of the policy.
    pub namespace: &'a str,
}

impl WireRule {
    pub(super) fn check(self, owner: Owner<'_>) -> Checked<Rule> {
        let from = each("from", self.from, |from: WireFrom| match from.source {
            Some(source) => source.check(owner).map_err(under("source")),
            None => Err(FieldError::new("source", "is required")),
        })?;
        let to = each("to", self.to, |to: WireTo| match to.operation {
            Some(operation) => operation.check().map_err(under("operation")),
            None => Err(FieldError::new("operation", "is required")),
        })?;
        let when = self.when.unwrap_or_default().into_iter().enumerate();
        let when = when.map(|(i, condition)| condition.check(owner).map_err(item("when", i)));
        Ok(Rule::new(from, to, when.collect::<Checked<_>>()?))
    }
}

/// The alternatives of `from` or `to`; a list that is there and empty is a mistake, for it asks for nothing.
fn each<W>(
    list: &str,
    written: Option<Vec<W>>,
    check: impl Fn(W) -> Checked<Box<[Clause]>>,
) -> Checked<Box<[Box<[Clause]>]>> {
    let Some(written) = written else { return Ok(Box::default()) };
    if written.is_empty() {
        return Err(FieldError::new(list, "is empty; leave it out to ask for nothing"));
    }
    written.into_iter().enumerate().map(|(i, one)| check(one).map_err(item(list, i))).collect()
}

/// Gathers the clauses of a source or operation.
#[derive(Default)]
struct Clauses(Vec<Clause>);

impl Clauses {
    fn add<T>(
        &mut self,
        (field, written): (&str, Values),
        (not_field, not): (&str, Values),
        read: impl Fn(&str) -> Checked<T>,
        clause: impl FnOnce(Listed<T>) -> Clause,
    ) -> Checked<()> {
        if written.is_none() && not.is_none() {
            return Ok(());
        }
        let any_of = values(field, written, &read)?;
        let none_of = values(not_field, not, &read)?;
        self.0.push(clause(Listed { any_of, none_of }));
        Ok(())
    }

    fn finish(self) -> Checked<Box<[Clause]>> {
        if self.0.is_empty() {
            return Err(FieldError::new("", "asks for nothing; at least one field is required"));
        }
        Ok(self.0.into())
    }
}

/// The values of a field, which has some where it is there.
pub(super) fn values<T>(
    field: &str,
    written: Values,
    read: impl Fn(&str) -> Checked<T>,
) -> Checked<Box<[T]>> {
    let Some(written) = written else { return Ok(Box::default()) };
    if written.is_empty() {
        return Err(FieldError::new(field, "is empty; leave it out to ask for nothing"));
    }
    let read = |(i, value): (usize, &String)| match &**value {
        "" => Err(item(field, i)(FieldError::new("", "a value may not be empty"))),
        value => read(value).map_err(item(field, i)),
    };
    written.iter().enumerate().map(read).collect()
}

impl WireSource {
    fn check(self, owner: Owner<'_>) -> Checked<Box<[Clause]>> {
        self.check_accounts()?;
        let mut all = Clauses::default();
        let (wanted, not) = (self.principals, self.not_principals);
        all.add(("principals", wanted), ("notPrincipals", not), text, Clause::Principal)?;
        let (wanted, not) = (self.request_principals, self.not_request_principals);
        all.add(
            ("requestPrincipals", wanted),
            ("notRequestPrincipals", not),
            text,
            Clause::RequestPrincipal,
        )?;
        let (wanted, not) = (self.namespaces, self.not_namespaces);
        all.add(("namespaces", wanted), ("notNamespaces", not), text, Clause::Namespace)?;
        let account = |value: &str| account(owner, value);
        let (wanted, not) = (self.service_accounts, self.not_service_accounts);
        all.add(("serviceAccounts", wanted), ("notServiceAccounts", not), account, Clause::ServiceAccount)?;
        let (wanted, not) = (self.trust_domains, self.not_trust_domains);
        all.add(("trustDomains", wanted), ("notTrustDomains", not), text, Clause::TrustDomain)?;
        let (wanted, not) = (self.ip_blocks, self.not_ip_blocks);
        all.add(("ipBlocks", wanted), ("notIpBlocks", not), subnet, Clause::SourceIp)?;
        let (wanted, not) = (self.remote_ip_blocks, self.not_remote_ip_blocks);
        all.add(("remoteIpBlocks", wanted), ("notRemoteIpBlocks", not), subnet, Clause::SourceIp)?;
        all.finish()
    }

    /// Service accounts say all that the other two would, or contradict them.
    fn check_accounts(&self) -> Checked<()> {
        for (field, accounts) in
            [("serviceAccounts", &self.service_accounts), ("notServiceAccounts", &self.not_service_accounts)]
        {
            let Some(accounts) = accounts else { continue };
            let others = [&self.principals, &self.not_principals, &self.namespaces, &self.not_namespaces];
            if others.into_iter().any(Option::is_some) {
                return Err(FieldError::new(field, "cannot be given together with principals or namespaces"));
            }
            if accounts.len() > MOST_ACCOUNTS {
                return Err(FieldError::new(field, format!("has more than {MOST_ACCOUNTS} entries")));
            }
        }
        Ok(())
    }
}

impl WireOperation {
    fn check(self) -> Checked<Box<[Clause]>> {
        let mut all = Clauses::default();
        all.add(("ports", self.ports), ("notPorts", self.not_ports), port, Clause::Port)?;
        all.add(("methods", self.methods), ("notMethods", self.not_methods), text, Clause::Method)?;
        all.add(("paths", self.paths), ("notPaths", self.not_paths), path, Clause::Path)?;
        all.add(("hosts", self.hosts), ("notHosts", self.not_hosts), text, Clause::Host)?;
        all.finish()
    }
}

pub(super) fn text(value: &str) -> Checked<TextMatch> {
    TextMatch::parse(value).ok_or_else(|| {
        let message = format!("{value:?}: a * may stand at the beginning or at the end, not at both");
        FieldError::new("", message)
    })
}

pub(super) fn subnet(value: &str) -> Checked<Subnet> {
    Subnet::parse(value).ok_or_else(|| {
        FieldError::new("", format!("{value:?} is not an address, nor a subnet such as 10.0.0.0/8"))
    })
}

pub(super) fn port(value: &str) -> Checked<u16> {
    let digits = value.bytes().all(|b| b.is_ascii_digit());
    let port = value.parse().ok().filter(|_| digits);
    port.ok_or_else(|| FieldError::new("", format!("{value:?} is not a port: a number from 0 to 65535")))
}

/// `NAMESPACE/ACCOUNT`, or `ACCOUNT` in the policy's own namespace.
pub(super) fn account(owner: Owner<'_>, value: &str) -> Checked<ServiceAccount> {
    let (namespace, name) = value.split_once('/').unwrap_or((owner.namespace, value));
    let good = |part: &str| !part.is_empty() && !part.contains(['*', '/']);
    if value.len() > LONGEST_ACCOUNT || !good(namespace) || !good(name) {
        let message = format!("{value:?} is not a service account: [NAMESPACE/]NAME, without wildcards");
        return Err(FieldError::new("", message));
    }
    Ok(ServiceAccount { namespace: namespace.into(), name: name.into() })
}

/// A path, or a template where it has a `{*}` or `{**}`.
fn path(value: &str) -> Checked<PathMatch> {
    let template = value.contains(SEGMENT) || value.contains(REST);
    if !template {
        if value.contains(['{', '}']) {
            let message = format!("{value:?}: {{ and }} may only be those of {SEGMENT} and {REST}");
            return Err(FieldError::new("", message));
        }
        return text(value).map(PathMatch::Text);
    }
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = false;
    for (i, segment) in value.split('/').enumerate() {
        if i > 0 {
            literal.push('/');
        }
        let part = match segment {
            SEGMENT => TemplatePart::Segment,
            REST => TemplatePart::Rest,
            segment if segment.contains(['{', '}', '*']) => {
                let message = format!(
                    "{value:?}: {SEGMENT} and {REST} stand for whole segments, and a template has no other *, {{ or }}"
                );
                return Err(FieldError::new("", message));
            }
            segment => {
                literal.push_str(segment);
                continue;
            }
        };
        if rest {
            return Err(FieldError::new("", format!("{value:?}: {REST} must be the last of its kind")));
        }
        rest = part == TemplatePart::Rest;
        if !literal.is_empty() {
            parts.push(TemplatePart::Literal(std::mem::take(&mut literal).into()));
        }
        parts.push(part);
    }
    if !literal.is_empty() {
        parts.push(TemplatePart::Literal(literal.into()));
    }
    Ok(PathMatch::Template(parts.into()))
}
