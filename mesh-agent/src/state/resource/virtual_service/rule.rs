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
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    name: Option<String>,
    r#match: Option<Vec<request_match::Wire>>,
    route: Option<Vec<action::WireDestination>>,
    redirect: Option<action::WireRedirect>,
    direct_response: Option<action::WireDirect>,
    rewrite: Option<action::WireRewrite>,
    timeout: Option<IstioDuration>,
    retries: Option<retries::Wire>,
    fault: Option<fault::Wire>,
    headers: Option<headers::Wire>,
    delegate: Option<delegate::Wire>,
    mirror: Option<action::WireTarget>,
    mirror_percentage: Option<fault::WirePercentage>,
    mirror_percent: Option<u32>,
    mirrors: Option<Vec<mirror::WireMirror>>,
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
            matches.push(wire.check().map_err(item("match", i))?);
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
