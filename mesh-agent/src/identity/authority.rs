//! Issues and renews the certificates of this agent's workloads.
//!
//! One key and certificate per identity however many ask at once; renewed in the background for as long as
//! somebody holds the handle, kept while renewal fails, never used once expired. When to renew runs on tokio's
//! clock, whether a certificate is valid on the wall clock. Tested by the unit tests below.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use hyper::client::conn::http2::SendRequest;
use rustls_pki_types::CertificateDer;
use time::OffsetDateTime;
use tokio::sync::watch;
use tonic::body::Body;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use super::{
    CaError, SpiffeId,
    bundle::Signer,
    ca::{Ca, CertificateInfo, EmbeddedCa, LeafPolicy, Urgency, no_certificate},
    early::Early,
    remote::{RemoteCa, RemoteCaConfig},
    renewal::Issuer,
    slot::Slot,
    spiffe::is_trust_domain,
    trust::{Roots, Trust},
    workload::WorkloadIdentity,
    workload_api::WorkloadApi,
};
use crate::error::{Error, Kind, Result};

/// How long an asker waits for a certificate: an authority elsewhere may take its time, and pods that have theirs, and
/// policies, must not wait for it.
const PATIENCE: Duration = Duration::from_millis(500);

/// Issues and renews certificates; one per agent.
#[derive(Debug)]
pub struct Authority {
    trust_domain: Arc<str>,
    ca: Arc<Ca>,
    policy: LeafPolicy,
    trust: Arc<Trust>,
    /// Counts the pairs that have signed.
    signers: watch::Sender<u64>,
    /// Tells when the files that are followed have been looked at.
    looks: watch::Sender<()>,
    /// What is wrong with them, by what they are for.
    problems: Mutex<BTreeMap<&'static str, Vec<String>>>,
    /// One per identity ever asked for, dropped when nobody holds it; the inner lock makes issuing single.
    slots: Mutex<HashMap<SpiffeId, Slot>>,
}

/// What may be known of the certificate of an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorityInfo {
    /// `root`: it is believed; `signing`: it signs, below a root.
    pub role: &'static str,
    /// Its subject.
    pub name: String,
    /// Serial number, in hex.
    pub serial: String,
    /// Valid from.
    pub not_before: OffsetDateTime,
    /// Valid until.
    pub not_after: OffsetDateTime,
}

impl AuthorityInfo {
    fn of(role: &'static str, certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let (name, serial) = (parsed.subject().to_string(), format!("{:x}", parsed.serial));
        let (not_before, not_after) = (parsed.validity().not_before, parsed.validity().not_after);
        let (not_before, not_after) = (not_before.to_datetime(), not_after.to_datetime());
        Some(Self { role, name, serial, not_before, not_after })
    }
}

impl Authority {
    /// The authority whose root lives in `state_dir`, made there if there is none yet; agents on one directory
    /// share it.
    ///
    /// # Errors
    /// When the files cannot be read or made, are open to others, do not belong together, have expired, or are of
    /// another trust domain.
    pub fn open(state_dir: &Path, trust_domain: &str) -> std::result::Result<Self, CaError> {
        let ca = EmbeddedCa::open(state_dir, trust_domain)?;
        let roots = ca.roots();
        Ok(Self::new(trust_domain, Ca::Embedded(ca), roots))
    }

    /// An authority whose root ends with this process.
    ///
    /// # Errors
    /// When the root cannot be made.
    pub fn in_memory(trust_domain: &str) -> std::result::Result<Self, CaError> {
        let ca = EmbeddedCa::in_memory(trust_domain)?;
        let roots = ca.roots();
        Ok(Self::new(trust_domain, Ca::Embedded(ca), roots))
    }

    /// An authority reached over the network. It is not asked before somebody needs a certificate.
    ///
    /// # Errors
    /// When the trust domain or the server's name cannot be one.
    pub fn remote(config: RemoteCaConfig, trust_domain: &str) -> std::result::Result<Self, CaError> {
        if !is_trust_domain(trust_domain) {
            return Err(CaError::TrustDomain(trust_domain.to_owned()));
        }
        Ok(Self::new(trust_domain, Ca::Remote(Box::new(RemoteCa::new(config)?)), Roots::none()))
    }

    /// The certificates of a SPIFFE Workload API, followed from now on. Takes a tokio runtime.
    ///
    /// # Errors
    /// When the trust domain cannot be one.
    pub fn spiffe(socket: PathBuf, trust_domain: &str) -> std::result::Result<Self, CaError> {
        if !is_trust_domain(trust_domain) {
            return Err(CaError::TrustDomain(trust_domain.to_owned()));
        }
        Ok(Self::new(trust_domain, Ca::Spiffe(WorkloadApi::follow(socket)), Roots::none()))
    }

    fn new(trust_domain: &str, ca: Ca, roots: Roots) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            ca: Arc::new(ca),
            policy: LeafPolicy::default(),
            trust: Trust::new(roots),
            signers: watch::Sender::new(0),
            looks: watch::Sender::new(()),
            problems: Mutex::default(),
            slots: Mutex::default(),
        }
    }

    /// Problems of the state directory.
    pub(super) const STATE_DIR: &str = "--state-dir";
    /// Problems of the lists of revoked certificates.
    pub(super) const LISTS: &str = "--crl";

    /// Whom the handles believe.
    pub(super) fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// Has new leaves signed by this pair, and all there are replaced, unless it signs already.
    pub(super) fn sign_with(&self, signer: Signer) {
        let Ca::Embedded(ca) = &*self.ca else { return };
        let now = ca.signer();
        if now.certificate == signer.certificate && now.above == signer.above {
            return;
        }
        tracing::info!(until = %signer.not_after, "another certificate signs now; all leaves are replaced");
        ca.sign_with(signer);
        self.signers.send_modify(|signers| *signers += 1);
    }

    /// What is wrong now with the files that this follows, for operators.
    pub fn problems(&self) -> Vec<String> {
        let problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        problems
            .iter()
            .flat_map(|(what, texts)| texts.iter().map(move |text| format!("{what}: {text}")))
            .collect()
    }

    /// Replaces what was wrong; what is new is logged.
    pub(super) fn set_problems(&self, what: &'static str, now: &[String]) {
        let mut problems = self.problems.lock().unwrap_or_else(PoisonError::into_inner);
        let before = problems.insert(what, now.to_owned()).unwrap_or_default();
        for problem in now.iter().filter(|problem| !before.contains(problem)) {
            tracing::error!("{what}: {problem}");
        }
        if now.is_empty() && !before.is_empty() {
            tracing::info!("{what} is in order again");
        }
        self.looks.send_replace(());
    }

    /// Tells when the files that are followed have been looked at, and what is found there is in force.
    pub fn looks(&self) -> watch::Receiver<()> {
        self.looks.subscribe()
    }

    /// How many certificates are listed as revoked.
    pub fn revoked(&self) -> usize {
        self.trust.revoked()
    }

    /// The roots that are believed, and the certificate that signs where it is none of them.
    pub fn authorities(&self) -> Vec<AuthorityInfo> {
        let roots = self.trust.roots();
        let signing = match &*self.ca {
            Ca::Embedded(ca) => Some(ca.signer().certificate.clone()),
            Ca::Remote(_) | Ca::Spiffe(_) => None,
        };
        let is_root = |signing: &CertificateDer<'_>| roots.all.iter().any(|root| root.der == *signing);
        let signing =
            signing.as_ref().filter(|signing| !is_root(signing)).map(|signing| ("signing", signing));
        let all = roots.all.iter().map(|root| ("root", &root.der)).chain(signing);
        all.filter_map(|(role, certificate)| AuthorityInfo::of(role, certificate)).collect()
    }

    /// The same authority, issuing leaves of this life from now on.
    #[must_use]
    pub fn with_leaf_policy(self, policy: LeafPolicy) -> Self {
        Self { policy, ..self }
    }

    /// A connection to the authority, where it is one elsewhere, and the token that shows who this agent is.
    ///
    /// # Errors
    /// A sentence that says why there is none.
    pub async fn call(&self) -> std::result::Result<(SendRequest<Body>, Zeroizing<String>), String> {
        match &*self.ca {
            Ca::Remote(ca) => ca.call().await,
            Ca::Embedded(_) | Ca::Spiffe(_) => {
                Err("there is no controller (--ca-address) to tell key sets".to_owned())
            }
        }
    }

    /// The trust domain whose identities it issues.
    pub fn trust_domain(&self) -> &Arc<str> {
        &self.trust_domain
    }

    /// The signing handle of one identity: certified on first use, renewed in the background while held.
    ///
    /// # Errors
    /// [`Kind::TlsFailure`] when `id` is of another trust domain, or the authority cannot sign or has not answered yet: it
    /// is still being asked then, and the next caller finds what it said.
    pub async fn identity(&self, id: &SpiffeId) -> Result<Arc<WorkloadIdentity>> {
        let patience = if self.ca.trouble().is_some() { Duration::ZERO } else { PATIENCE };
        self.identity_within(id, patience).await
    }

    /// The same for who would rather wait, this long.
    ///
    /// # Errors
    /// As for [`Self::identity`].
    pub async fn identity_within(&self, id: &SpiffeId, patience: Duration) -> Result<Arc<WorkloadIdentity>> {
        if id.trust_domain != self.trust_domain {
            let ours = &self.trust_domain;
            return Err(Error::new(
                Kind::TlsFailure,
                format!("cannot certify {id}: the trust domain of this mesh is {ours}"),
            ));
        }
        let place = self.slot(id);
        let late = || match (self.ca.trouble(), place.failure()) {
            (Some(reason), _) => Error::new(Kind::TlsFailure, no_certificate(id, &*self.ca, &reason)),
            (None, Some(failure)) => failure,
            (None, None) => {
                Error::new(Kind::TlsFailure, no_certificate(id, &*self.ca, &"it has not answered yet"))
            }
        };
        let Ok(handle) = tokio::time::timeout(patience, place.lock()).await else { return Err(late()) };
        if let Some(identity) = handle.upgrade()
            && !identity.is_expired()
        {
            return Ok(identity);
        }
        let mut asked = place.fill(self.issuer(id).fill(handle, Urgency::Now));
        match tokio::time::timeout(patience, &mut asked).await {
            Ok(Ok(filled)) => filled,
            // What comes in this very moment is in the channel, and must not be lost for the next asker.
            Err(_) => {
                asked.close();
                asked.try_recv().unwrap_or_else(|_| Err(late()))
            }
            Ok(Err(_)) => Err(late()),
        }
    }

    /// Begins to certify an identity that will be asked for soon. Those that are needed now go before it.
    pub fn prefetch(&self, id: &SpiffeId) {
        if id.trust_domain != self.trust_domain || self.ca.is_at_hand() || self.ca.trouble().is_some() {
            return;
        }
        let place = self.slot(id);
        // What failed is asked for by who needs it.
        if place.failure().is_none()
            && let Some(handle) = place.try_lock()
            && handle.strong_count() == 0
        {
            drop(place.fill(self.issuer(id).fill(handle, Urgency::Later)));
        }
    }

    /// The certificates in use, by identity.
    pub fn certificates(&self) -> Vec<CertificateInfo> {
        let slots: Vec<Slot> = self.lock().values().cloned().collect();
        let in_use = |slot: Slot| Some(slot.try_lock()?.upgrade()?.certificate());
        let mut certificates: Vec<_> = slots.into_iter().filter_map(in_use).collect();
        certificates.sort_by(|a, b| a.identity.cmp(&b.identity));
        certificates
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<SpiffeId, Slot>> {
        // Nothing in the critical sections can leave the map half changed.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot(&self, id: &SpiffeId) -> Slot {
        let mut slots = self.lock();
        if let Some(slot) = slots.get(id) {
            return slot.clone();
        }
        slots.retain(|_, slot| slot.is_used());
        slots.entry(id.clone()).or_default().clone()
    }

    fn issuer(&self, id: &SpiffeId) -> Issuer {
        Issuer {
            id: id.clone(),
            trust_domain: Arc::clone(&self.trust_domain),
            ca: Arc::clone(&self.ca),
            trust: Arc::clone(&self.trust),
            early: Early::new(self.signers.subscribe(), self.policy.lifetime),
            policy: self.policy,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::Instant;
    use tokio_util::task::AbortOnDropHandle;

    use super::{
        super::{
            renewal::{RETRY_FIRST, due_in, keep_renewed},
            workload::Current,
        },
        *,
    };

    type TestResult = std::result::Result<(), Box<dyn std::error::Error>>;

    fn id(name: &str) -> std::result::Result<SpiffeId, super::super::SpiffeIdError> {
        format!("spiffe://cluster.local/ns/default/sa/{name}").parse()
    }

    fn authority() -> std::result::Result<Authority, CaError> {
        Authority::in_memory("cluster.local")
    }

    #[tokio::test]
    async fn one_certificate_for_all_who_ask_at_once() -> TestResult {
        let authority = Arc::new(authority()?);
        let mut asking = tokio::task::JoinSet::new();
        for _ in 0..32 {
            let (authority, id) = (Arc::clone(&authority), id("reviews")?);
            asking.spawn(async move { authority.identity(&id).await });
        }
        let mut handles = Vec::new();
        while let Some(handle) = asking.join_next().await {
            handles.push(handle??);
        }
        assert!(handles.iter().all(|handle| Arc::ptr_eq(handle, &handles[0])));
        assert_eq!(authority.certificates(), [handles[0].certificate()]);
        Ok(())
    }

    #[tokio::test]
    async fn what_nobody_holds_is_forgotten() -> TestResult {
        let authority = authority()?;
        let first = authority.identity(&id("reviews")?).await?;
        let serial = first.certificate().serial;
        drop(first);
        assert!(authority.certificates().is_empty());
        let other = authority.identity(&id("ratings")?).await?;
        assert_eq!(authority.lock().len(), 1, "the slot of a dropped handle stays");
        assert_ne!(authority.identity(&id("reviews")?).await?.certificate().serial, serial);
        drop(other);
        Ok(())
    }

    #[tokio::test]
    async fn another_trust_domain_is_refused() -> TestResult {
        let foreign = "spiffe://other.example/ns/default/sa/reviews".parse()?;
        let Err(error) = authority()?.identity(&foreign).await else { return Err("certified".into()) };
        assert!(error.detail.contains("the trust domain of this mesh is cluster.local"), "{error}");
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn renewed_in_time_again_and_again() -> TestResult {
        let identity = authority()?.identity(&id("reviews")?).await?;
        let mut renewals = identity.renewals();
        let mut serials = vec![identity.certificate().serial];
        let start = Instant::now();
        for _ in 0..3 {
            renewals.changed().await?;
            serials.push(identity.certificate().serial);
        }
        let life = LeafPolicy::default().lifetime;
        let each = start.elapsed() / 3;
        assert!(each > life * 2 / 3 && each < life * 3 / 4, "renewed every {each:?}");
        serials.sort();
        serials.dedup();
        assert_eq!(serials.len(), 4);
        Ok(())
    }

    #[tokio::test(start_paused = true)]
    async fn kept_while_renewal_fails() -> TestResult {
        let authority = authority()?;
        let (ca, policy, id) = (Arc::clone(&authority.ca), authority.policy, id("reviews")?);
        let credential = ca.certify(&id, policy, Urgency::Now).await?;
        let current = Current::new(credential, &authority.trust_domain, &authority.trust)?;
        let (first, shown) = (current.info().clone(), current.shown());
        // A handle without a renewal of its own: the one under test is driven below.
        let idle = AbortOnDropHandle::new(tokio::spawn(std::future::ready(())));
        let domain = Arc::clone(&authority.trust_domain);
        let identity = Arc::new(WorkloadIdentity::new(id.clone(), domain, current, idle));
        let (tries, held, kept) = (Arc::new(AtomicU32::new(0)), Arc::downgrade(&identity), first.clone());
        let counted = Arc::clone(&tries);
        let certify = move || {
            let still = held.upgrade().map(|held| (held.certificate(), held.server_config().is_ok()));
            assert_eq!(still, Some((kept.clone(), true)));
            let (ca, id, count) = (Arc::clone(&ca), id.clone(), counted.fetch_add(1, Ordering::Relaxed));
            async move {
                if count < 5 {
                    return Err(Error::new(Kind::TlsFailure, "away"));
                }
                ca.certify(&id, policy, Urgency::Now).await
            }
        };
        let mut renewals = identity.renewals();
        let early = Early::new(authority.signers.subscribe(), policy.lifetime);
        tokio::select! {
            () = keep_renewed(Arc::downgrade(&identity), (first.clone(), shown), (None, early), certify) => return Err("it gave up".into()),
            renewed = renewals.changed() => renewed?,
        }
        assert_eq!(tries.load(Ordering::Relaxed), 6);
        assert_ne!(identity.certificate(), first);
        Ok(())
    }

    #[tokio::test]
    async fn an_expired_certificate_is_never_used() -> TestResult {
        let expired = LeafPolicy { lifetime: Duration::ZERO, backdate: Duration::from_hours(2) };
        let authority = authority()?.with_leaf_policy(expired);
        let Err(error) = authority.identity(&id("reviews")?).await else { return Err("used".into()) };
        assert!(error.detail.contains("expired at"), "{error}");

        let authority = authority.with_leaf_policy(LeafPolicy::default());
        let identity = authority.identity(&id("reviews")?).await?;
        identity.replace(authority.ca.certify(&identity.id, expired, Urgency::Now).await?)?;
        assert!(identity.is_expired());
        assert!(identity.server_config().is_err() && identity.client_config(&[], &[]).is_err());
        let renewed = authority.identity(&identity.id).await?;
        assert!(Arc::ptr_eq(&renewed, &identity) && !renewed.is_expired());
        Ok(())
    }

    #[test]
    fn due_at_seven_tenths_within_the_jitter() -> TestResult {
        let now = OffsetDateTime::now_utc();
        let hours = |count: f64| Duration::from_secs_f64(count * 3600.0);
        // However far it is dated back.
        let (not_before, not_after) = (now - hours(1.0), now + hours(20.0));
        let certificate =
            CertificateInfo { identity: id("a")?, serial: String::new(), not_before, not_after };
        assert_eq!(due_in(&certificate, now, 0.5), hours(14.0));
        assert_eq!(due_in(&certificate, now, 0.0), hours(13.5));
        assert_eq!(due_in(&certificate, now, 1.0), hours(14.5));
        assert_eq!(due_in(&certificate, now + hours(10.0), 0.5), hours(7.0));
        assert_eq!(due_in(&certificate, now + hours(30.0), 0.5), RETRY_FIRST);
        Ok(())
    }
}
