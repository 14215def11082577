//! The life of one certificate: made, and replaced in time, again and again, for as long as somebody holds its handle.
//!
//! Promises: what is due is asked for until it comes, the old one staying in use meanwhile; a certificate that is withdrawn,
//! or that the authority has replaced by itself, does not wait for its time. When to renew runs on tokio's clock, whether a
//! certificate is valid on the wall clock. Tested by the unit tests of `authority.rs`.

use std::{
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};

use time::OffsetDateTime;
use tokio::{
    sync::{OwnedMutexGuard, watch},
    time::Instant,
};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Shown, SpiffeId, Trust,
    ca::{Ca, CertificateInfo, Credential, LeafPolicy, Urgency},
    early::Early,
    workload::{Current, WorkloadIdentity},
};
use crate::error::{Error, Kind, Result};

/// A certificate is renewed when this share of its life is over, in percent: 30 % (7 h of 24 h) are left for an
/// authority that is away. Istio renews at 50 %.
const RENEW_AT_PERCENT: u32 = 70;
/// Renewals are spread over this share of the life, in percent, so that pods started together do not ask together.
const JITTER_PERCENT: u32 = 5;
/// First wait after a failed renewal; doubled after each failure.
pub(super) const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait after a failed renewal.
const RETRY_MOST: Duration = Duration::from_mins(1);
/// How often the wall clock is looked at while waiting: it may run ahead of ours when the machine was suspended.
const WALL_CLOCK_CHECK: Duration = Duration::from_mins(10);

/// Tells when the authority has something new of itself, where it does.
type Changes = Option<watch::Receiver<u64>>;

/// What it takes to certify one identity, for as long as that lasts.
#[derive(Debug)]
pub(super) struct Issuer {
    pub id: SpiffeId,
    pub trust_domain: Arc<str>,
    pub ca: Arc<Ca>,
    pub trust: Arc<Trust>,
    /// Made before the certificate is, so that no change is missed.
    pub early: Early,
    pub policy: LeafPolicy,
}

impl Issuer {
    /// A certificate for the slot, whose handle may be there and expired.
    pub async fn fill(
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

    fn begin(self, credential: Credential, changes: Changes) -> Result<Arc<WorkloadIdentity>> {
        let Self { id, trust_domain, ca, trust, early, policy } = self;
        let current = Current::new(credential, &trust_domain, &trust)?;
        let (first, shown) = (current.info().clone(), current.shown());
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
            let renewal = keep_renewed(Weak::clone(handle), (first, shown), (changes, early), certify);
            let renewal = AbortOnDropHandle::new(tokio::spawn(renewal));
            WorkloadIdentity::new(id, trust_domain, current, renewal)
        }))
    }
}

/// Replaces the certificate of `handle` in time, when it is withdrawn, and whenever the authority has something new, again and
/// again, until nobody holds the handle.
pub(super) async fn keep_renewed<F, Fut>(
    handle: Weak<WorkloadIdentity>,
    (mut certificate, mut shown): (CertificateInfo, Arc<Shown>),
    (mut changes, mut early): (Changes, Early),
    mut certify: F,
) where
    F: FnMut() -> Fut + Send,
    Fut: Future<Output = Result<Credential>> + Send,
{
    loop {
        let mut due = tokio::select! {
            () = wait_until_due(&certificate) => true,
            () = early.due(&shown) => true,
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
                    (certificate, shown) = (identity.certificate(), identity.shown());
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
async fn changed(changes: &mut Changes) {
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

/// How long after it was received (`now`) a certificate should be renewed; `spread` in 0..1 places it within the jitter.
/// Counted from then on, for its beginning is dated back.
pub(super) fn due_in(certificate: &CertificateInfo, now: OffsetDateTime, spread: f64) -> Duration {
    let life = certificate.not_after - now;
    let due = life * RENEW_AT_PERCENT / 100 + (life * JITTER_PERCENT / 100) * (spread - 0.5);
    // A life of next to nothing must not make a busy loop.
    Duration::try_from(due).unwrap_or_default().max(RETRY_FIRST)
}
