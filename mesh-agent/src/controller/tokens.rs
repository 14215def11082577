//! Tokens: how the agent of a node shows who it is where no Kubernetes can vouch for it.
//!
//! JWTs (RFC 7519) signed ES256 alone, with the claims of Kubernetes' bound service account tokens. A token is refused once
//! it has expired, and from the moment a newer one of the same account and node has been used: what was stolen before a
//! rotation is worth nothing after it, across restarts. Tested in `tests/tokens.rs`.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result};
use jsonwebtoken::{Algorithm, Header, Validation, errors::ErrorKind};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::{authentication::Caller, token_key::TokenKey};
use crate::{config::ServiceAccountName, identity};

/// How far the clocks of the issuer and of the controller may be apart without a new token being refused as one of the
/// future. It makes no token live longer.
const CLOCK_SKEW: Duration = Duration::from_mins(10);
/// Longest token looked at, in bytes.
const LONGEST: usize = 16 * 1024;
/// Where it is kept which tokens are the latest that were used.
const LATEST: &str = "tokens.json";
/// What the subject of a service account begins with, in Kubernetes.
const SUBJECT: &str = "system:serviceaccount:";

/// Whom a token is to be made for.
#[derive(Debug, Clone)]
pub struct TokenFor<'a> {
    /// The trust domain of the mesh, which issues it.
    pub trust_domain: &'a str,
    /// Who shall accept it.
    pub audience: &'a str,
    /// Whose it is.
    pub account: &'a ServiceAccountName,
    /// The node it is for.
    pub node: &'a str,
    /// How long it is good.
    pub duration: Duration,
}

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: Vec<String>,
    sub: String,
    iat: i64,
    nbf: i64,
    exp: i64,
    /// Begins with the time it was made, so that of two tokens it is known which is newer.
    jti: String,
    #[serde(rename = "kubernetes.io")]
    kubernetes: Kubernetes,
}

/// What Kubernetes adds to the tokens it makes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Kubernetes {
    namespace: String,
    serviceaccount: Named,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    node: Option<Named>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Named {
    name: String,
}

/// Why a token shows nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not a token at all.
    #[error("the token cannot be read: {0}")]
    Malformed(String),
    /// Not signed by our key.
    #[error("the token is not signed by this controller's key")]
    Signature,
    /// Too late.
    #[error("the token has expired; make a new one with `mesh-agent token`")]
    Expired,
    /// Too early.
    #[error("the token is not valid yet; is the clock right where it was made?")]
    NotYet,
    /// Made for somebody else.
    #[error("the token is for another audience than {0:?}")]
    Audience(String),
    /// Made in another mesh.
    #[error("the token was not issued by {0:?}")]
    Issuer(String),
    /// Its parts contradict each other.
    #[error("the token's subject {0:?} is not the service account that it names")]
    Subject(String),
    /// Somebody shows an old one.
    #[error("the token was replaced: a newer one of {0} has been used since")]
    Replaced(String),
}

impl TokenKey {
    /// A token, made now.
    ///
    /// # Errors
    /// When it cannot be signed.
    pub fn issue(&self, whom: &TokenFor<'_>, now: OffsetDateTime) -> Result<String> {
        let TokenFor { trust_domain, audience, account, node, duration } = *whom;
        let seconds = |offset: Duration| i64::try_from(offset.as_secs()).unwrap_or(i64::MAX);
        let iat = now.unix_timestamp();
        let claims = Claims {
            iss: issuer(trust_domain),
            aud: vec![audience.to_owned()],
            sub: format!("{SUBJECT}{}:{}", account.namespace, account.name),
            iat,
            nbf: iat.saturating_sub(seconds(CLOCK_SKEW)),
            exp: iat.saturating_add(seconds(duration)),
            jti: format!("{:032x}-{:016x}", now.unix_timestamp_nanos().max(0), fastrand::u64(..)),
            kubernetes: Kubernetes {
                namespace: account.namespace.clone(),
                serviceaccount: Named { name: account.name.clone() },
                node: Some(Named { name: node.to_owned() }),
            },
        };
        let header = Header::new(Algorithm::ES256);
        jsonwebtoken::encode(&header, &claims, &self.signing).context("signing the token")
    }
}

fn issuer(trust_domain: &str) -> String {
    format!("spiffe://{trust_domain}")
}

/// The tokens of one mesh, as its controller sees them.
#[derive(Debug)]
pub struct Tokens {
    key: TokenKey,
    validation: Validation,
    issuer: String,
    audience: String,
    file: PathBuf,
    /// The newest token that was used, by whose it is.
    latest: Mutex<HashMap<String, String>>,
}

impl Tokens {
    /// Tokens for this audience, with the key and the memory of a state directory.
    ///
    /// # Errors
    /// When either cannot be read.
    pub fn open(state_dir: &Path, trust_domain: &str, audience: &str) -> Result<Self> {
        let key = TokenKey::open(state_dir)?;
        let file = state_dir.join(LATEST);
        let latest = match fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text)
                .with_context(|| format!("{} is not what the controller wrote", file.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => HashMap::new(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        };
        let issuer = issuer(trust_domain);
        let mut validation = Validation::new(Algorithm::ES256);
        validation.leeway = 0;
        validation.validate_nbf = true;
        validation.set_audience(&[audience]);
        validation.set_issuer(&[&issuer]);
        validation.set_required_spec_claims(&["exp", "nbf", "aud", "iss", "sub"]);
        let audience = audience.to_owned();
        Ok(Self { key, validation, issuer, audience, file, latest: Mutex::new(latest) })
    }

    /// Who shows this token.
    ///
    /// # Errors
    /// Why it shows nothing.
    pub(super) fn caller(&self, token: &str) -> Result<Caller, TokenError> {
        if token.len() > LONGEST {
            return Err(TokenError::Malformed(format!("it is longer than {LONGEST} bytes")));
        }
        let claims = jsonwebtoken::decode::<Claims>(token, &self.key.verifying, &self.validation)
            .map_err(|error| self.explain(&error))?
            .claims;
        let Kubernetes { namespace, serviceaccount: Named { name }, node } = claims.kubernetes;
        if claims.sub != format!("{SUBJECT}{namespace}:{name}") {
            return Err(TokenError::Subject(claims.sub));
        }
        let account = ServiceAccountName { namespace, name };
        let caller = Caller { account, node: node.map(|node| node.name) };
        self.must_be_latest(&caller, claims.jti)?;
        Ok(caller)
    }

    fn explain(&self, error: &jsonwebtoken::errors::Error) -> TokenError {
        match error.kind() {
            ErrorKind::InvalidSignature | ErrorKind::InvalidAlgorithm => TokenError::Signature,
            ErrorKind::ExpiredSignature => TokenError::Expired,
            ErrorKind::ImmatureSignature => TokenError::NotYet,
            ErrorKind::InvalidAudience => TokenError::Audience(self.audience.clone()),
            ErrorKind::InvalidIssuer => TokenError::Issuer(self.issuer.clone()),
            _ => TokenError::Malformed(error.to_string()),
        }
    }

    fn must_be_latest(&self, caller: &Caller, jti: String) -> Result<(), TokenError> {
        let whose = caller.to_string();
        // The map is whole after every change.
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        match latest.get(&whose) {
            Some(known) if *known > jti => return Err(TokenError::Replaced(whose)),
            Some(known) if *known == jti => return Ok(()),
            _ => latest.insert(whose, jti),
        };
        // Once for each token: some hundred bytes for each node.
        if let Err(error) = self.remember(&latest) {
            let error = format!("{error:#}");
            tracing::warn!(error, "tokens that were replaced will be taken again after a restart");
        }
        Ok(())
    }

    fn remember(&self, latest: &HashMap<String, String>) -> Result<()> {
        let text = serde_json::to_vec_pretty(latest)?;
        identity::write_over(&self.file, 0o600, &text).map_err(Into::into)
    }
}
