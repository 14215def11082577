//! Whether one clause of a rule holds.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, header::HOST};

use super::{
    authorization::{Bytes, Facts, Head, Holds},
    jwt::Claims,
};
use crate::{
    identity::SpiffeId,
    state::snapshot::{Clause, Listed, PathMatch, ServiceAccount, TemplatePart, TextMatch},
};

impl From<bool> for Holds {
    fn from(holds: bool) -> Self {
        if holds { Self::Yes } else { Self::No }
    }
}

/// Whether the clause holds; open where it asks for what is not known yet.
pub(super) fn holds(clause: &Clause, facts: &Facts<'_>) -> Holds {
    let to = facts.asked.destination;
    match clause {
        Clause::Principal(listed) => of_source(listed, facts, |text, id| {
            let SpiffeId { trust_domain, namespace, service_account } = id;
            pieces_match(text, &[trust_domain, "/ns/", namespace, "/sa/", service_account])
        }),
        Clause::Namespace(listed) => of_source(listed, facts, |text, id| text_matches(text, &id.namespace)),
        Clause::TrustDomain(listed) => {
            of_source(listed, facts, |text, id| text_matches(text, &id.trust_domain))
        }
        Clause::ServiceAccount(listed) => of_source(listed, facts, |account: &ServiceAccount, id| {
            *account.namespace == *id.namespace && *account.name == *id.service_account
        }),
        Clause::SourceIp(listed) => {
            let source = facts.source_ip();
            listed.holds(|subnet| subnet.contains(source)).into()
        }
        Clause::DestinationIp(listed) => {
            let to = to.ip().to_canonical();
            listed.holds(|subnet| subnet.contains(to)).into()
        }
        Clause::Port(listed) => listed.holds(|wanted| *wanted == to.port()).into(),
        Clause::Sni(listed) => match facts.bytes {
            Bytes::Unread => Holds::Open,
            Bytes::Opaque { server_name } => {
                listed.holds(|text| server_name.is_some_and(|name| text_matches(text, name))).into()
            }
            Bytes::Request(_) => listed.holds(|_| false).into(),
        },
        Clause::Host(_)
        | Clause::Method(_)
        | Clause::Path(_)
        | Clause::Header(..)
        | Clause::RequestPrincipal(_)
        | Clause::Audience(_)
        | Clause::Presenter(_)
        | Clause::Claim(..) => match facts.bytes {
            Bytes::Unread | Bytes::Opaque { .. } => Holds::Open,
            Bytes::Request(head) => of_request(clause, head).into(),
        },
    }
}

fn of_request(clause: &Clause, head: &Head<'_>) -> bool {
    match clause {
        Clause::Host(listed) => listed.holds(|text| host_matches(text, head.authority)),
        Clause::Method(listed) => listed.holds(|text| text_matches(text, head.method.as_str())),
        Clause::Path(listed) => listed.holds(|path| match path {
            PathMatch::Text(text) => text_matches(text, head.path),
            PathMatch::Template(parts) => template_matches(parts, head.path),
        }),
        Clause::Header(name, listed) => {
            let value = match *name {
                HOST => Some(Cow::Borrowed(head.authority.as_bytes())),
                _ => header(head.headers, name),
            };
            listed.holds(|text| value.as_ref().is_some_and(|value| bytes_match(text, value)))
        }
        _ => of_token(clause, head.claims),
    }
}

/// Who has no token has no value of any of these.
fn of_token(clause: &Clause, claims: Option<&Claims>) -> bool {
    match clause {
        Clause::RequestPrincipal(listed) => {
            let principal = claims.and_then(Claims::principal);
            listed.holds(|text| principal.as_ref().is_some_and(|pieces| pieces_match(text, pieces)))
        }
        Clause::Audience(listed) => listed.holds(|text| {
            claims.is_some_and(|claims| claims.audiences().any(|audience| text_matches(text, audience)))
        }),
        Clause::Presenter(listed) => {
            let presenter = claims.and_then(Claims::presenter);
            listed.holds(|text| presenter.is_some_and(|presenter| text_matches(text, presenter)))
        }
        Clause::Claim(path, listed) => listed
            .holds(|text| claims.is_some_and(|claims| claims.any(path, |value| text_matches(text, value)))),
        _ => false,
    }
}

/// Who has proved nothing matches no value, and so holds against every list of what it must not be.
fn of_source<T>(listed: &Listed<T>, facts: &Facts<'_>, matches: impl Fn(&T, &SpiffeId) -> bool) -> Holds {
    listed.holds(|value| facts.asked.source.is_some_and(|id| matches(value, id))).into()
}

/// All lines of a header as one, as Envoy compares them: whoever sends two is not taken for one who sends either.
fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut lines = headers.get_all(name).iter();
    let first = lines.next()?.as_bytes();
    let Some(second) = lines.next() else { return Some(Cow::Borrowed(first)) };
    let mut all = first.to_vec();
    for line in std::iter::once(second).chain(lines) {
        all.push(b',');
        all.extend_from_slice(line.as_bytes());
    }
    Some(Cow::Owned(all))
}

fn text_matches(text: &TextMatch, value: &str) -> bool {
    bytes_match(text, value.as_bytes())
}

fn bytes_match(text: &TextMatch, value: &[u8]) -> bool {
    match text {
        TextMatch::Exact(exact) => value == exact.as_bytes(),
        TextMatch::Prefix(prefix) => value.starts_with(prefix.as_bytes()),
        TextMatch::Suffix(suffix) => value.ends_with(suffix.as_bytes()),
        TextMatch::Present => !value.is_empty(),
    }
}

/// As if the pieces were one text.
fn pieces_match(text: &TextMatch, pieces: &[&str]) -> bool {
    let bytes = || pieces.iter().flat_map(|piece| piece.bytes());
    match text {
        TextMatch::Exact(exact) => bytes().eq(exact.bytes()),
        TextMatch::Prefix(prefix) => begins(bytes(), prefix.bytes()),
        TextMatch::Suffix(suffix) => begins(bytes().rev(), suffix.bytes().rev()),
        TextMatch::Present => true,
    }
}

fn begins(mut whole: impl Iterator<Item = u8>, start: impl Iterator<Item = u8>) -> bool {
    start.into_iter().all(|byte| whole.next() == Some(byte))
}

/// In either case, and with or without its port: both name the same host.
fn host_matches(text: &TextMatch, authority: &str) -> bool {
    let matches = |host: &str| match text {
        TextMatch::Exact(exact) => host.eq_ignore_ascii_case(exact),
        TextMatch::Prefix(prefix) => {
            host.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
        }
        TextMatch::Suffix(suffix) => {
            let start = host.len().checked_sub(suffix.len());
            start.and_then(|start| host.get(start..)).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
        }
        TextMatch::Present => !host.is_empty(),
    };
    let host = without_port(authority);
    // `example.com.` is `example.com` (RFC 3986 section 3.2.2).
    matches(authority) || matches(host) || matches(host.strip_suffix('.').unwrap_or(host))
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (!host.contains(':') || host.ends_with(']')) =>
        {
            host
        }
        _ => authority,
    }
}

/// `{**}` is the last of its kind, so that what follows it is the end of the path.
fn template_matches(parts: &[TemplatePart], path: &str) -> bool {
    let mut left = path;
    for (i, part) in parts.iter().enumerate() {
        match part {
            TemplatePart::Literal(literal) => match left.strip_prefix(&**literal) {
                Some(rest) => left = rest,
                None => return false,
            },
            TemplatePart::Segment => {
                let end = left.find('/').unwrap_or(left.len());
                if end == 0 {
                    return false;
                }
                left = &left[end..];
            }
            TemplatePart::Rest => {
                return match parts.get(i + 1) {
                    Some(TemplatePart::Literal(end)) => left.ends_with(&**end),
                    _ => true,
                };
            }
        }
    }
    left.is_empty()
}
