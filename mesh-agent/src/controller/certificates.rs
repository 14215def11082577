//! `CreateCertificate`: who may have which certificate.
//!
//! The steps are those a request takes: who calls, how often, for whom, with which key. Each may refuse, with a status that
//! says who was refused what, and why. Tested in `tests/`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::sync::watch;
use tonic::{Code, Status};

use super::{
    audit,
    authentication::{Accounts, Caller, Callers, Unauthenticated},
    csr::{self, Requested},
    pods::Pods,
    rate_limit::{RateLimit, Verdict},
};
use crate::{
    identity::{CertificateRequest, CertificateResponse, EmbeddedCa, Issued, LeafPolicy, SpiffeId},
    state::snapshot::Snapshot,
};

/// What callers may have.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long a certificate is valid that is asked for without a time.
    pub lifetime: Duration,
    /// The longest time that may be asked for.
    pub max_lifetime: Duration,
    /// Requests a second of one caller.
    pub requests_per_second: u32,
    /// Requests of one caller at once.
    pub burst: u32,
}

/// The certificate authority behind the wire.
#[derive(Debug)]
pub struct CertificateService {
    ca: Arc<EmbeddedCa>,
    trust_domain: Arc<str>,
    callers: Callers,
    accounts: Accounts,
    pods: Pods,
    limits: Limits,
    rate: RateLimit,
}

/// A refusal, before it is a status.
#[derive(Debug)]
struct Refusal {
    code: Code,
    reason: String,
    /// How many alike the log is told of; 0: it is not.
    count: u64,
}

fn refused(code: Code, reason: impl Into<String>) -> Refusal {
    Refusal { code, reason: reason.into(), count: 1 }
}

impl CertificateService {
    /// The service of this authority; `snapshots` say which pods run where.
    pub(crate) fn new(
        ca: Arc<EmbeddedCa>,
        trust_domain: &str,
        callers: Callers,
        accounts: Accounts,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        limits: Limits,
    ) -> Self {
        let rate = RateLimit::new(limits.requests_per_second, limits.burst);
        Self {
            ca,
            trust_domain: trust_domain.into(),
            callers,
            accounts,
            pods: Pods::new(snapshots),
            limits,
            rate,
        }
    }

    /// Answers one request. `bearer`: what came in `authorization`.
    ///
    /// # Errors
    /// The refusal, as the caller is told it.
    pub(super) async fn create(
        &self,
        peer: SocketAddr,
        bearer: Option<&str>,
        request: &CertificateRequest,
    ) -> Result<CertificateResponse, Status> {
        let mut record = audit::Request::from(peer);
        match self.decide(&mut record, bearer, request).await {
            Ok((issued, kind)) => {
                record.issued(&issued.info, &kind);
                Ok(self.response(&issued))
            }
            Err(Refusal { code, reason, count }) => {
                if count > 0 {
                    record.refused(code, &reason, count);
                }
                Err(Status::new(code, reason))
            }
        }
    }

    /// Whether the caller may be told the key sets: agents and gateways are.
    ///
    /// # Errors
    /// The refusal, as the caller is told it.
    pub(super) async fn may_watch(&self, peer: SocketAddr, bearer: Option<&str>) -> Result<(), Status> {
        let mut record = audit::Request::from(peer);
        "the key sets".clone_into(&mut record.identity);
        let Err(Refusal { code, reason, count }) = self.decide_watch(&mut record, bearer).await else {
            return Ok(());
        };
        if count > 0 {
            record.refused(code, &reason, count);
        }
        Err(Status::new(code, reason))
    }

    async fn decide_watch(&self, record: &mut audit::Request, bearer: Option<&str>) -> Result<(), Refusal> {
        let caller = self.known_caller(record, bearer).await?;
        if self.accounts.judges_tokens(&caller) {
            return Ok(());
        }
        let reason = format!("{caller} is no agent (--agent-accounts) and no gateway (--gateway-accounts)");
        Err(refused(Code::PermissionDenied, reason))
    }

    /// Who calls, if not too often.
    async fn known_caller(
        &self,
        record: &mut audit::Request,
        bearer: Option<&str>,
    ) -> Result<Caller, Refusal> {
        let caller = match self.authenticate(bearer).await {
            Ok(caller) => caller,
            Err(refusal) => {
                // Only failures count against an address: others there may have a token.
                self.within_rate(&record.peer.ip().to_string())?;
                return Err(refusal);
            }
        };
        record.caller = caller.to_string();
        self.within_rate(&record.caller)?;
        Ok(caller)
    }

    async fn decide(
        &self,
        record: &mut audit::Request,
        bearer: Option<&str>,
        request: &CertificateRequest,
    ) -> Result<(Issued, String), Refusal> {
        let caller = self.known_caller(record, bearer).await?;
        let asked = request.impersonated();
        asked.unwrap_or("its own").clone_into(&mut record.identity);
        let own = caller.own_identity(&self.trust_domain);
        let id = match asked {
            None => own.clone(),
            Some(asked) => asked.parse(),
        };
        let id = id.map_err(|error| refused(Code::InvalidArgument, error.to_string()))?;
        record.identity = id.to_string();
        // Whoever names what is its own, as gateways do, asks for nothing more than who names nothing.
        self.authorize(&caller, &id, own.is_ok_and(|own| own == id)).await?;
        let invalid = |reason| refused(Code::InvalidArgument, reason);
        let requested = csr::read(&request.csr).map_err(invalid)?;
        names_only(&requested, &id).map_err(invalid)?;
        let lifetime = self.lifetime(request.validity_duration).map_err(invalid)?;
        let policy = LeafPolicy { lifetime, ..LeafPolicy::default() };
        let issued = self.ca.issue(&id, &requested.key, policy);
        Ok((issued.map_err(|error| refused(Code::Unavailable, error.detail))?, requested.kind))
    }

    async fn authenticate(&self, bearer: Option<&str>) -> Result<Caller, Refusal> {
        let unauthenticated = |reason: String| refused(Code::Unauthenticated, reason);
        let header =
            bearer.ok_or_else(|| unauthenticated("no bearer token in `authorization`".to_owned()))?;
        let token = match header.split_once(' ') {
            Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => token.trim(),
            _ => return Err(unauthenticated("`authorization` is not a bearer token".to_owned())),
        };
        self.callers.caller(token).await.map_err(|error| match error {
            Unauthenticated::Refused(reason) => unauthenticated(reason),
            Unauthenticated::Unheard(reason) => refused(Code::Unavailable, reason),
        })
    }

    fn within_rate(&self, caller: &str) -> Result<(), Refusal> {
        match self.rate.take(caller) {
            Verdict::Taken => Ok(()),
            Verdict::Refused { say } => {
                let Limits { requests_per_second, burst, .. } = self.limits;
                let reason = format!(
                    "{caller} asks for more than {requests_per_second} certificates a second ({burst} at once)"
                );
                Err(Refusal { code: Code::ResourceExhausted, reason, count: say.unwrap_or_default() })
            }
        }
    }

    async fn authorize(&self, caller: &Caller, id: &SpiffeId, is_own: bool) -> Result<(), Refusal> {
        let denied = |reason: String| Err(refused(Code::PermissionDenied, reason));
        if id.trust_domain != self.trust_domain {
            return denied(format!("{id} is of another trust domain than {}", self.trust_domain));
        }
        if is_own {
            return Ok(());
        }
        if !self.accounts.is_agent(caller) {
            return denied(format!("{caller} may not have {id}: it is no agent (--agent-accounts)"));
        }
        let Some(node) = &caller.node else {
            return denied(format!("{caller} may not have {id}: its token names no node"));
        };
        if self.pods.runs(id, node).await {
            return Ok(());
        }
        denied(format!("{caller} may not have {id}: no enrolled pod of that identity runs on node {node}"))
    }

    fn lifetime(&self, seconds: i64) -> Result<Duration, String> {
        let most = self.limits.max_lifetime;
        match u64::try_from(seconds) {
            // As Istio has it, no time or one that is none leaves it to the authority.
            Ok(0) | Err(_) => Ok(self.limits.lifetime.min(most)),
            Ok(seconds) if seconds <= most.as_secs() => Ok(Duration::from_secs(seconds)),
            Ok(seconds) => {
                let most = most.as_secs();
                Err(format!("certificates are issued for {most} seconds at most, asked was for {seconds}"))
            }
        }
    }

    fn response(&self, issued: &Issued) -> CertificateResponse {
        let mut cert_chain: Vec<String> = issued.chain.iter().map(|der| pem("CERTIFICATE", der)).collect();
        cert_chain.push(self.ca.bundle().iter().map(|der| pem("CERTIFICATE", der)).collect());
        CertificateResponse { cert_chain }
    }
}

/// A request may name the identity or nothing.
fn names_only(requested: &Requested, id: &SpiffeId) -> Result<(), String> {
    match requested.names.iter().find(|name| **name != id.to_string()) {
        None => Ok(()),
        Some(other) => Err(format!("the certificate request names {other}, and is for {id}")),
    }
}

/// PEM (RFC 7468) of one thing.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let mut text = format!("-----BEGIN {label}-----\n");
    let encoded = STANDARD.encode(der);
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, others) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = others;
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}
