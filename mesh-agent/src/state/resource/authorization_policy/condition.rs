//! One entry of `when`: an attribute by its key, and its values.

use serde::Deserialize;

use super::{
    super::{
        field::{Checked, FieldError, under},
        string_match::header_name,
    },
    rule::{self, Owner, values},
};
use crate::state::snapshot::{ClaimPath, Clause, Listed};

const HEADER: &str = "request.headers[";

const CLAIMS: &str = "request.auth.claims[";

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WireCondition {
    key: Option<String>,
    values: Option<Vec<String>>,
    not_values: Option<Vec<String>>,
}

impl WireCondition {
    pub(super) fn check(self, owner: Owner<'_>) -> Checked<Clause> {
        let key = self.key.unwrap_or_default();
        if key.is_empty() {
            return Err(FieldError::new("key", "is required"));
        }
        if self.values.is_none() && self.not_values.is_none() {
            return Err(FieldError::new("values", "at least one of values and notValues is required"));
        }
        let listed = Written(self.values, self.not_values);
        Ok(match &*key {
            "source.ip" | "remote.ip" => Clause::SourceIp(listed.read(rule::subnet)?),
            "destination.ip" => Clause::DestinationIp(listed.read(rule::subnet)?),
            "destination.port" => Clause::Port(listed.read(rule::port)?),
            "source.principal" => Clause::Principal(listed.read(rule::text)?),
            "source.namespace" => Clause::Namespace(listed.read(rule::text)?),
            "source.trustDomain" => Clause::TrustDomain(listed.read(rule::text)?),
            "source.serviceAccount" => {
                Clause::ServiceAccount(listed.read(|value| rule::account(owner, value))?)
            }
            "connection.sni" => Clause::Sni(listed.read(rule::text)?),
            "request.auth.principal" => Clause::RequestPrincipal(listed.read(rule::text)?),
            "request.auth.audiences" => Clause::Audience(listed.read(rule::text)?),
            "request.auth.presenter" => Clause::Presenter(listed.read(rule::text)?),
            key => {
                if let Some(path) = claim(key) {
                    return Ok(Clause::Claim(path, listed.read(rule::text)?));
                }
                let name = key.strip_prefix(HEADER).and_then(|rest| rest.strip_suffix(']'));
                let unknown = || format!("{key:?} is not an attribute of a connection or request");
                let name = name.ok_or_else(|| FieldError::new("key", unknown()))?;
                let name = header_name(name).map_err(under("key"))?;
                Clause::Header(name, listed.read(rule::text)?)
            }
        })
    }
}

/// The names in the brackets of `request.auth.claims[a][b]`.
fn claim(key: &str) -> Option<ClaimPath> {
    let rest = key.strip_prefix(CLAIMS)?.strip_suffix(']')?;
    let good = |name: &str| !name.is_empty() && !name.contains(['[', ']']);
    rest.split("][").map(|name| good(name).then(|| name.into())).collect()
}

struct Written(Option<Vec<String>>, Option<Vec<String>>);

impl Written {
    fn read<T>(self, read: impl Fn(&str) -> Checked<T>) -> Checked<Listed<T>> {
        Ok(Listed { any_of: values("values", self.0, &read)?, none_of: values("notValues", self.1, &read)? })
    }
}
