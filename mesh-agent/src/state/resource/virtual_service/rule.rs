//! One entry of `spec.http`: which parts may stand together, and the parts that have no file of their own.
//!
//! Tested in `tests.rs` beside it.

use serde::Deserialize;

use super::{HttpRule, RuleAction, action, cors, delegate, fault, mirror, request_match, retries};
use crate::state::resource::{
    duration::IstioDuration,
    field::{Checked, FieldError, item, under},
    headers,
};

/// As written.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    /// Name of the rule in logs and metrics.
    name: Option<String>,
    /// It is for requests that one of these matches; none: for all.
    r#match: Option<Vec<request_match::Wire>>,
    /// Where requests go, in shares by weight.
    route: Option<Vec<action::WireDestination>>,
    /// Answers with a redirect in place of a route.
    redirect: Option<action::WireRedirect>,
    /// Answers with a fixed status and body in place of a route.
    direct_response: Option<action::WireDirect>,
    /// Changes path or authority before the request goes on.
    rewrite: Option<action::WireRewrite>,
    /// Time for the whole request, retries included; none by default.
    timeout: Option<IstioDuration>,
    /// When and how often a request that failed is tried again.
    retries: Option<retries::Wire>,
    /// Delays or failures that are made on purpose.
    fault: Option<fault::Wire>,
    /// Changes headers of requests and responses.
    headers: Option<headers::Wire>,
    /// The VirtualService whose rules decide, in place of a route.
    delegate: Option<delegate::Wire>,
    /// Where a copy of each request goes.
    mirror: Option<action::WireTarget>,
    /// The share of requests that is copied; all by default.
    mirror_percentage: Option<fault::WirePercentage>,
    /// Deprecated in favour of `mirrorPercentage`.
    mirror_percent: Option<u32>,
    /// Where copies go, each with its share.
    mirrors: Option<Vec<mirror::WireMirror>>,
    /// Which pages of other origins may ask (CORS).
    cors_policy: Option<cors::Wire>,
}

/// What of the whole object a rule must know.
#[derive(Debug, Clone, Copy)]
pub struct Within<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Whether it has no hosts: its rules are for others to delegate to.
    pub delegate: bool,
}

impl Wire {
    /// The rule, when every part is valid and they may stand together.
    pub fn check(self, within: Within<'_>) -> Checked<HttpRule> {
        self.check_conflicts(within)?;
        let mut matches = Vec::new();
        for (i, wire) in self.r#match.unwrap_or_default().into_iter().enumerate() {
            matches.push(wire.check(within.namespace).map_err(item("match", i))?);
        }
        let action = if let Some(delegate) = self.delegate {
            delegate.check(within.namespace).map_err(under("delegate"))?
        } else if let Some(redirect) = self.redirect {
            RuleAction::Redirect(redirect.check().map_err(under("redirect"))?)
        } else if let Some(direct) = self.direct_response {
            direct.check().map_err(under("directResponse"))?
        } else {
            RuleAction::Forward(action::check_route(self.route.unwrap_or_default())?)
        };
        let mirrors = mirror::Wire {
            mirror: self.mirror,
            percentage: self.mirror_percentage,
            percent: self.mirror_percent,
            mirrors: self.mirrors,
        };
        Ok(HttpRule {
            name: self.name.filter(|name| !name.is_empty()),
            matches,
            action,
            fault: self.fault.map(fault::Wire::check).transpose().map_err(under("fault"))?,
            headers: self.headers.map(headers::Wire::check).transpose().map_err(under("headers"))?,
            rewrite: self.rewrite.map(action::WireRewrite::check).transpose().map_err(under("rewrite"))?,
            timeout: check_timeout(self.timeout)?,
            retries: self.retries.map(retries::Wire::check).transpose().map_err(under("retries"))?,
            mirrors: mirrors.check()?,
            cors: self.cors_policy.map(cors::Wire::check).transpose().map_err(under("corsPolicy"))?,
        })
    }

    fn check_conflicts(&self, within: Within<'_>) -> Checked<()> {
        let route = self.route.as_ref().is_some_and(|route| !route.is_empty());
        let (redirect, direct) = (self.redirect.is_some(), self.direct_response.is_some());
        if self.delegate.is_some() {
            return self.check_root(within, route);
        }
        let others = [
            ("route", route),
            ("fault", self.fault.is_some()),
            ("rewrite", self.rewrite.is_some()),
            ("directResponse", direct),
        ];
        for (answer, _) in
            [("redirect", redirect), ("directResponse", direct)].iter().filter(|(_, given)| *given)
        {
            if let Some((other, _)) = others.iter().find(|(other, given)| *given && other != answer) {
                let message = format!("HTTP route cannot contain both {other} and {answer}");
                return Err(FieldError::new(*answer, message));
            }
        }
        if !route && !redirect && !direct {
            return Err(FieldError::new("", "HTTP route, redirect or directResponse is required"));
        }
        self.check_mirrors()
    }

    /// A rule that delegates says which requests it takes, and what the delegate's rules leave open.
    fn check_root(&self, within: Within<'_>, route: bool) -> Checked<()> {
        if within.delegate {
            return Err(FieldError::new("delegate", "delegate HTTP route cannot contain delegate"));
        }
        let answers = [
            ("redirect", self.redirect.is_some()),
            ("route", route),
            ("directResponse", self.direct_response.is_some()),
        ];
        if let Some((answer, _)) = answers.iter().find(|(_, given)| *given) {
            let name = self.name.as_deref().unwrap_or_default();
            let message = format!("root HTTP route {name} must not specify {answer}");
            return Err(FieldError::new(*answer, message));
        }
        self.check_mirrors()
    }

    fn check_mirrors(&self) -> Checked<()> {
        if self.mirror.is_some() && self.mirrors.as_ref().is_some_and(|mirrors| !mirrors.is_empty()) {
            return Err(FieldError::new("mirrors", "HTTP route cannot contain both mirror and mirrors"));
        }
        Ok(())
    }
}

/// No limit is written `0s`.
fn check_timeout(timeout: Option<IstioDuration>) -> Checked<Option<std::time::Duration>> {
    match timeout {
        Some(timeout) if !timeout.0.is_zero() => timeout.at_least_a_millisecond("timeout").map(Some),
        none => Ok(none.map(|timeout| timeout.0)),
    }
}
