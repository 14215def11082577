//! Issues and renews the certificates of this agent's workloads.
//!
//! One key and certificate per identity however many ask at once; renewed in the background for as long as
//! somebody holds the handle, kept while renewal fails, never used once expired. When to renew runs on tokio's
//! clock, whether a certificate is valid on the wall clock. Tested by the unit tests below.

use std::{
    collections::HashMap,
    future::Future,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use time::OffsetDateTime;
use tokio::{
    sync::{OwnedMutexGuard, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    CaError, SpiffeId,
    ca::{Ca, CertificateInfo, Credential, EmbeddedCa, LeafPolicy, Urgency, no_certificate},
    remote::{RemoteCa, RemoteCaConfig},
    slot::Slot,
    spiffe::is_trust_domain,
    workload::{Current, WorkloadIdentity},
    workload_api::WorkloadApi,
};
use crate::error::{Error, Kind, Result};

/// A certificate is renewed when this share of its life is over, in percent: 30 % (7 h of 24 h) are left for an
/// authority that is away. Istio renews at 50 %.
const RENEW_AT_PERCENT: u32 = 70;
/// Renewals are spread over this share of the life, in percent, so that pods started together do not ask together.
const JITTER_PERCENT: u32 = 5;
/// First wait after a failed renewal; doubled after each failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait after a failed renewal.
const RETRY_MOST: Duration = Duration::from_mins(1);
/// How often the wall clock is looked at while waiting: it may run ahead of ours when the machine was suspended.
const WALL_CLOCK_CHECK: Duration = Duration::from_mins(10);

/// How long an asker waits for a certificate: an authority elsewhere may take its time, and pods that have theirs, and
/// policies, must not wait for it.
const PATIENCE: Duration = Duration::from_millis(500);
/// Issues and renews certificates; one per agent.
#[derive(Debug)]
pub struct Authority {
    trust_domain: Arc<str>,
    ca: Arc<Ca>,
    policy: LeafPolicy,
    /// One per identity ever asked for, dropped when nobody holds it; the inner lock makes issuing single.
    slots: Mutex<HashMap<SpiffeId, Slot>>,
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
        Ok(Self::new(trust_domain, Ca::Embedded(ca), LeafPolicy::default()))
    }

    /// An authority whose root ends with this process.
    ///
    /// # Errors
    /// When the root cannot be made.
    pub fn in_memory(trust_domain: &str) -> std::result::Result<Self, CaError> {
        let ca = EmbeddedCa::in_memory(trust_domain)?;
        Ok(Self::new(trust_domain, Ca::Embedded(ca), LeafPolicy::default()))
    }

    /// An authority reached over the network. It is not asked before somebody needs a certificate.
    ///
    /// # Errors
    /// When the trust domain or the server's name cannot be one.
    pub fn remote(config: RemoteCaConfig, trust_domain: &str) -> std::result::Result<Self, CaError> {
        if !is_trust_domain(trust_domain) {
            return Err(CaError::TrustDomain(trust_domain.to_owned()));
        }
        Ok(Self::new(trust_domain, Ca::Remote(RemoteCa::new(config)?), LeafPolicy::default()))
    }

    /// The certificates of a SPIFFE Workload API, followed from now on. Takes a tokio runtime.
    ///
    /// # Errors
    /// When the trust domain cannot be one.
    pub fn spiffe(socket: PathBuf, trust_domain: &str) -> std::result::Result<Self, CaError> {
        if !is_trust_domain(trust_domain) {
            return Err(CaError::TrustDomain(trust_domain.to_owned()));
        }
        Ok(Self::new(trust_domain, Ca::Spiffe(WorkloadApi::follow(socket)), LeafPolicy::default()))
    }

    fn new(trust_domain: &str, ca: Ca, policy: LeafPolicy) -> Self {
        Self { trust_domain: trust_domain.into(), ca: Arc::new(ca), policy, slots: Mutex::default() }
    }

    /// The same authority, issuing leaves of this life from now on.
    #[must_use]
    pub fn with_leaf_policy(self, policy: LeafPolicy) -> Self {
        Self { policy, ..self }
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
            policy: self.policy,
        }
    }
}

/// What it takes to certify one identity, for as long as that lasts.
#[derive(Debug)]
struct Issuer {
    id: SpiffeId,
    trust_domain: Arc<str>,
    ca: Arc<Ca>,
    policy: LeafPolicy,
}

impl Issuer {
    /// A certificate for the slot, whose handle may be there and expired.
    async fn fill(
        self,
        mut slot: OwnedMutexGuard<Weak<WorkloadIdentity>>,
        urgency: Urgency,
    ) -> Result<Arc<WorkloadIdentity>> {
        // Heard from before the certificate is there, so that no change is missed.
        let changes = self.ca.changes();
        let credential = self.ca.certify(&self.id, self.policy, urgency).await?;
        if let Some(identity) = slot.upgrade() {
            identity.replace(credential)?;
            return Ok(identity);
        }
        let identity = self.begin(credential, changes)?;
        *slot = Arc::downgrade(&identity);
        Ok(identity)
    }

    fn begin(
        self,
        credential: Credential,
        changes: Option<watch::Receiver<u64>>,
    ) -> Result<Arc<WorkloadIdentity>> {
        let Self { id, trust_domain, ca, policy } = self;
        let current = Current::new(credential, &trust_domain)?;
        let first = current.info().clone();
        if first.not_after <= OffsetDateTime::now_utc() {
            let at = first.not_after;
            return Err(Error::new(
                Kind::TlsFailure,
                format!("the certificate just made for {id} expired at {at} already; check the clock"),
            ));
        }
        Ok(Arc::new_cyclic(|handle| {
            let renewed = id.clone();
            let certify = move || {
                let (ca, id) = (Arc::clone(&ca), renewed.clone());
                async move { ca.certify(&id, policy, Urgency::Later).await }
            };
            let renewal = tokio::spawn(keep_renewed(Weak::clone(handle), first, changes, certify));
            WorkloadIdentity::new(id, trust_domain, current, AbortOnDropHandle::new(renewal))
        }))
    }
}

/// Replaces the certificate of `handle` in time, and whenever the authority has something new, again and again, until nobody
/// holds the handle.
async fn keep_renewed<F, Fut>(
    handle: Weak<WorkloadIdentity>,
    first: CertificateInfo,
    mut changes: Option<watch::Receiver<u64>>,
    mut certify: F,
) where
    F: FnMut() -> Fut + Send,
    Fut: Future<Output = Result<Credential>> + Send,
{
    let mut certificate = first;
    loop {
        let mut due = tokio::select! {
            () = wait_until_due(&certificate) => true,
            () = changed(&mut changes) => false,
        };
        let mut retry = RETRY_FIRST;
        loop {
            let renewed = certify().await.and_then(|credential| {
                // With the same certificate there may be other roots; but it is no renewal.
                if due && credential.info.serial == certificate.serial {
                    return Err(Error::new(Kind::TlsFailure, "the same certificate was given again"));
                }
                Ok(credential)
            });
            let Some(identity) = handle.upgrade() else { return };
            match renewed.and_then(|credential| identity.replace(credential)) {
                Ok(()) => {
                    certificate = identity.certificate();
                    break;
                }
                Err(error) => {
                    let (id, until) = (&identity.id, certificate.not_after);
                    tracing::warn!(%id, %until, %error, ?retry, "certificate not renewed; the old one stays");
                }
            }
            drop(identity);
            tokio::select! {
                () = tokio::time::sleep(retry) => {}
                () = changed(&mut changes) => due = false,
            }
            retry = (retry * 2).min(RETRY_MOST);
        }
    }
}

/// Waits for the authority to tell of something new; for ever, where it never does.
async fn changed(changes: &mut Option<watch::Receiver<u64>>) {
    if let Some(told) = changes {
        if told.changed().await.is_ok() {
            return;
        }
        *changes = None;
    }
    std::future::pending::<()>().await;
}

async fn wait_until_due(certificate: &CertificateInfo) {
    let due_in = due_in(certificate, OffsetDateTime::now_utc(), fastrand::f64());
    let (due, due_by_wall) = (Instant::now() + due_in, OffsetDateTime::now_utc() + due_in);
    while Instant::now() < due && OffsetDateTime::now_utc() < due_by_wall {
        tokio::time::sleep_until(due.min(Instant::now() + WALL_CLOCK_CHECK)).await;
    }
}

/// How long until a certificate should be renewed; `spread` in 0..1 places it within the jitter.
fn due_in(certificate: &CertificateInfo, now: OffsetDateTime, spread: f64) -> Duration {
    let life = certificate.not_after - certificate.not_before;
    let jitter = (life * JITTER_PERCENT / 100) * (spread - 0.5);
    let due = certificate.not_before + life * RENEW_AT_PERCENT / 100 + jitter;
    // A life of next to nothing must not make a busy loop.
    Duration::try_from(due - now).unwrap_or_default().max(RETRY_FIRST)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

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
        let current = Current::new(ca.certify(&id, policy, Urgency::Now).await?, &authority.trust_domain)?;
        let first = current.info().clone();
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
        tokio::select! {
            () = keep_renewed(Arc::downgrade(&identity), first.clone(), None, certify) => return Err("it gave up".into()),
            renewed = renewals.changed() => renewed?,
        }
        assert_eq!(tries.load(Ordering::Relaxed), 6);
        assert_ne!(identity.certificate(), first);
        Ok(())
    }

    #[tokio::test]
    async fn an_expired_certificate_is_never_used() -> TestResult {
        let expired = LeafPolicy { lifetime: Duration::from_hours(1), backdate: Duration::from_hours(2) };
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
        let (not_before, not_after) = (now, now + hours(20.0));
        let certificate =
            CertificateInfo { identity: id("a")?, serial: String::new(), not_before, not_after };
        assert_eq!(due_in(&certificate, now, 0.5), hours(14.0));
        assert_eq!(due_in(&certificate, now, 0.0), hours(13.5));
        assert_eq!(due_in(&certificate, now, 1.0), hours(14.5));
        assert_eq!(due_in(&certificate, now + hours(10.0), 0.5), hours(4.0));
        assert_eq!(due_in(&certificate, now + hours(30.0), 0.5), RETRY_FIRST);
        Ok(())
    }
}
