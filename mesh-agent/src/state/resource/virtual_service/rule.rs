//! One entry of `spec.http`: which parts may stand together, and the parts that have no file of their own.
//!
//! Tested in `tests.rs` beside it.

use serde::Deserialize;

use super::{HttpRule, RuleAction, action, fault, request_match, retries};
use crate::state::{
    resource::{
        duration::IstioDuration,
        field::{Checked, FieldError, NotYet, item, under},
        headers,
    },
    snapshot::Rewrite,
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
    #[serde(rename = "delegate")]
    _delegate: Option<NotYet>,
    #[serde(rename = "mirror")]
    _mirror: Option<NotYet>,
    #[serde(rename = "mirrorPercentage")]
    _mirror_percentage: Option<NotYet>,
    #[serde(rename = "mirrorPercent")]
    _mirror_percent: Option<NotYet>,
    #[serde(rename = "mirrors")]
    _mirrors: Option<NotYet>,
    #[serde(rename = "corsPolicy")]
    _cors_policy: Option<NotYet>,
}

impl Wire {
    /// The rule, when every part is valid and they may stand together.
    pub fn check(self) -> Checked<HttpRule> {
        self.check_conflicts()?;
        let mut matches = Vec::new();
        for (i, wire) in self.r#match.unwrap_or_default().into_iter().enumerate() {
            matches.push(wire.check().map_err(item("match", i))?);
        }
        let rewrite = match self.rewrite {
            Some(rewrite) => rewrite.check().map_err(under("rewrite"))?,
            None => Rewrite::default(),
        };
        let mut action = if let Some(redirect) = self.redirect {
            RuleAction::Redirect(redirect.check().map_err(under("redirect"))?)
        } else if let Some(direct) = self.direct_response {
            direct.check().map_err(under("directResponse"))?
        } else {
            RuleAction::Forward(action::check_route(self.route.unwrap_or_default())?)
        };
        let mut headers = self.headers.unwrap_or_default().check().map_err(under("headers"))?;
        if rewrite.authority.is_some() {
            // The rewrite wins over what header operations say.
            headers.request.authority = None;
            if let RuleAction::Forward(destinations) = &mut action {
                for destination in destinations {
                    destination.headers.request.authority = None;
                }
            }
        }
        Ok(HttpRule {
            name: self.name.filter(|name| !name.is_empty()),
            matches,
            action,
            fault: self
                .fault
                .map(fault::Wire::check)
                .transpose()
                .map_err(under("fault"))?
                .unwrap_or_default(),
            headers,
            rewrite,
            timeout: check_timeout(self.timeout)?,
            retries: self.retries.map(retries::Wire::check).transpose().map_err(under("retries"))?,
        })
    }

    fn check_conflicts(&self) -> Checked<()> {
        let route = self.route.as_ref().is_some_and(|route| !route.is_empty());
        let answers =
            [("redirect", self.redirect.is_some()), ("directResponse", self.direct_response.is_some())];
        let others = [
            ("route", route),
            ("directResponse", self.direct_response.is_some()),
            ("rewrite", self.rewrite.is_some()),
            ("fault", self.fault.is_some()),
        ];
        for (answer, _) in answers.iter().filter(|(_, given)| *given) {
            if let Some((other, _)) = others.iter().find(|(other, given)| *given && other != answer) {
                let message = format!("HTTP route cannot contain both {other} and {answer}");
                return Err(FieldError::new(*answer, message));
            }
        }
        if !route && answers.iter().all(|(_, given)| !given) {
            return Err(FieldError::new("", "HTTP route, redirect or directResponse is required"));
        }
        Ok(())
    }
}

/// `0s` is the usual way to say "no limit".
fn check_timeout(timeout: Option<IstioDuration>) -> Checked<Option<std::time::Duration>> {
    match timeout {
        None => Ok(None),
        Some(timeout) if timeout.0.is_zero() => Ok(None),
        Some(timeout) => timeout.at_least_a_millisecond("timeout").map(Some),
    }
}
