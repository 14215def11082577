//! Whom to believe: the mesh's roots and the lists of what is revoked.
//!
//! Promises: one value for all handles of an agent, replaced as a whole, so that what changes holds for the next
//! handshake of each; who keeps a connection is told ([`Trust::changes`]) and asks again. A peer's certificate is never
//! believed past its end; one whose time has not begun is believed up to [`CLOCK_SKEW`] early, for its signer's clock may
//! be ahead of ours, and it gains no time by that. Reading takes no lock. Tested below, and in handshakes by
//! `tunnel/tests`.

use std::{borrow::Cow, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use rustls::{CertRevocationListError, CertificateError, OtherError, crypto::WebPkiSupportedAlgorithms};
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use time::OffsetDateTime;
use tokio::sync::watch;
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::crl::RevocationLists;

/// How far two clocks of the mesh may be apart. Leaves are backdated by it, and what is dated by another clock is taken up
/// to so much early; no end of a certificate ever moves.
pub(super) const CLOCK_SKEW: Duration = Duration::from_mins(10);

/// Which end of a connection a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Usage {
    /// The end that has dialled.
    Client,
    /// The end that has accepted.
    Server,
}

/// A root certificate that is believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Root {
    pub der: CertificateDer<'static>,
    pub not_after: OffsetDateTime,
    anchor: TrustAnchor<'static>,
}

impl Root {
    /// # Errors
    /// What is wrong with the certificate.
    pub(super) fn of(der: CertificateDer<'static>) -> Result<Self, String> {
        let anchor = anchor_from_trusted_cert(&der).map_err(|error| error.to_string())?.to_owned();
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
        if !parsed.is_ca() {
            return Err("it is not the certificate of an authority (basicConstraints CA)".to_owned());
        }
        let not_after = parsed.validity().not_after.to_datetime();
        Ok(Self { der, not_after, anchor })
    }
}

/// Roots believed together.
#[derive(Debug)]
pub(super) struct Roots {
    pub all: Vec<Root>,
    anchors: Vec<TrustAnchor<'static>>,
    /// When the first of them ends.
    until: UnixTime,
}

impl Roots {
    /// Nobody is believed: the authority is still to say whom.
    pub(super) fn none() -> Self {
        Self::new([])
    }

    /// Each of them counts once.
    pub(super) fn new(roots: impl IntoIterator<Item = Root>) -> Self {
        let mut all: Vec<Root> = Vec::new();
        for root in roots {
            if !all.contains(&root) {
                all.push(root);
            }
        }
        let anchors = all.iter().map(|root| root.anchor.clone()).collect();
        let until = all.iter().map(|root| unix(root.not_after)).min_by_key(UnixTime::as_secs);
        Self { all, anchors, until: until.unwrap_or(UnixTime::since_unix_epoch(Duration::ZERO)) }
    }

    /// Those whose time has not ended: path validation does not look at the dates of a root.
    fn anchors(&self, now: UnixTime) -> Cow<'_, [TrustAnchor<'static>]> {
        if now.as_secs() <= self.until.as_secs() {
            return Cow::Borrowed(&self.anchors);
        }
        let valid = self.all.iter().filter(|root| now.as_secs() <= unix(root.not_after).as_secs());
        valid.map(|root| root.anchor.clone()).collect()
    }
}

/// The roots and the lists in force.
#[derive(Debug)]
pub struct Trust {
    roots: ArcSwap<Roots>,
    lists: ArcSwap<RevocationLists>,
    /// Grows with each change.
    changes: watch::Sender<u64>,
}

impl Trust {
    pub(super) fn new(roots: Roots) -> Arc<Self> {
        let (roots, lists) = (ArcSwap::from_pointee(roots), ArcSwap::default());
        Arc::new(Self { roots, lists, changes: watch::Sender::new(0) })
    }

    /// Believes these roots, and no others, from now on; true when that is a change.
    pub(super) fn believe(&self, roots: Roots) -> bool {
        let changed = self.roots.load().all != roots.all;
        if changed {
            self.roots.store(Arc::new(roots));
            self.changed();
        }
        changed
    }

    /// Goes by these lists, and no others, from now on; true when that is a change.
    pub(super) fn revoke(&self, lists: RevocationLists) -> bool {
        let changed = !self.lists.load().same(&lists);
        if changed {
            self.lists.store(Arc::new(lists));
            self.changed();
        }
        changed
    }

    /// Tells of changes, those after this call.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The roots in force.
    pub(super) fn roots(&self) -> Arc<Roots> {
        self.roots.load_full()
    }

    /// How many certificates are listed as revoked.
    pub(super) fn revoked(&self) -> usize {
        self.lists.load().revoked()
    }

    fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Whether a chain (its leaf first) leads to a root, is in its time and is not revoked. Says nothing of names.
    pub(super) fn verify(&self, chain: Chain<'_>, now: UnixTime) -> Result<(), webpki::Error> {
        let (roots, lists) = (self.roots.load(), self.lists.load());
        let latest = now.as_secs() + CLOCK_SKEW.as_secs();
        let mut at = now;
        loop {
            match chain.verify(&roots, &lists, at, Some(at)) {
                // At the moment at which it begins it must be valid in every other way: nothing ends later for it.
                Err(webpki::Error::CertNotValidYet { not_before, .. })
                    if not_before.as_secs() > at.as_secs() && not_before.as_secs() <= latest =>
                {
                    at = not_before;
                }
                other => return other,
            }
        }
    }

    /// Whether a chain that has been verified at a moment, with these roots, would be so still as far as roots and lists go:
    /// neither its end nor a list that is out of date changes what is settled.
    pub(super) fn judge(&self, chain: Chain<'_>, at: UnixTime, known: &Roots) -> Option<Withdrawn> {
        let (roots, lists) = (self.roots.load(), self.lists.load());
        let fewer = !known.all.iter().all(|root| roots.all.contains(root));
        // Neither costs a signature.
        if !fewer && !lists.concern(&chain.all(), None) {
            return None;
        }
        match chain.verify(&roots, &lists, at, None) {
            Err(webpki::Error::CertRevoked) => Some(Withdrawn::Revoked),
            Err(_) if fewer => Some(Withdrawn::RootGone),
            _ => None,
        }
    }
}

/// Why a certificate that was believed is not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Withdrawn {
    /// It, or one above it, is listed as revoked.
    Revoked,
    /// The root above it is not believed any more.
    RootGone,
}

/// A certificate with those above it, as an end of a connection shows them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chain<'a> {
    pub leaf: &'a CertificateDer<'a>,
    pub intermediates: &'a [CertificateDer<'a>],
    pub usage: Usage,
    pub algorithms: &'a WebPkiSupportedAlgorithms,
}

impl<'a> Chain<'a> {
    fn all(&self) -> Vec<&'a CertificateDer<'a>> {
        std::iter::once(self.leaf).chain(self.intermediates).collect()
    }

    fn verify(
        &self,
        roots: &Roots,
        lists: &RevocationLists,
        at: UnixTime,
        lists_at: Option<UnixTime>,
    ) -> Result<(), webpki::Error> {
        let parsed = EndEntityCert::try_from(self.leaf)?;
        let anchors = roots.anchors(at);
        let usage = match self.usage {
            Usage::Client => KeyUsage::client_auth(),
            Usage::Server => KeyUsage::server_auth(),
        };
        lists.asked(&self.all(), lists_at, |revocation| {
            let (algorithms, above) = (self.algorithms.all, self.intermediates);
            parsed.verify_for_usage(algorithms, &anchors, above, at, usage, revocation, None).map(drop)
        })
    }
}

/// The same for rustls, which answers the peer with an alert that fits.
pub(crate) fn for_rustls(error: webpki::Error) -> rustls::Error {
    use webpki::Error as E;
    match error {
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding.into(),
        E::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }.into()
        }
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after }.into(),
        E::InvalidCertValidity => CertificateError::Expired.into(),
        E::UnknownIssuer => CertificateError::UnknownIssuer.into(),
        E::CertRevoked => CertificateError::Revoked.into(),
        E::CrlExpired { time, next_update } => {
            CertificateError::ExpiredRevocationListContext { time, next_update }.into()
        }
        E::InvalidSignatureForPublicKey => CertificateError::BadSignature.into(),
        E::IssuerNotCrlSigner => CertRevocationListError::IssuerInvalidForCrl.into(),
        E::InvalidCrlSignatureForPublicKey => CertRevocationListError::BadSignature.into(),
        other => CertificateError::Other(OtherError(Arc::new(other))).into(),
    }
}

/// Seconds since 1970; 0 for what lies before.
pub(super) fn unix(at: OffsetDateTime) -> UnixTime {
    UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(at.unix_timestamp()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use rustls::crypto::aws_lc_rs::default_provider;

    use super::{
        super::pki::{Authority, list},
        *,
    };

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    const MINUTE: time::Duration = time::Duration::MINUTE;

    fn trust(roots: &[&Authority]) -> Result<Arc<Trust>, String> {
        let roots: Result<Vec<_>, _> = roots.iter().map(|root| Root::of(root.certificate.clone())).collect();
        Ok(Trust::new(Roots::new(roots?)))
    }

    fn with<T>(
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        ask: impl FnOnce(Chain<'_>) -> T,
    ) -> T {
        let algorithms = default_provider().signature_verification_algorithms;
        ask(Chain { leaf, intermediates, usage: Usage::Client, algorithms: &algorithms })
    }

    #[test]
    fn a_beginning_may_be_ahead_of_our_clock_and_no_end_behind_it() -> TestResult {
        let root = Authority::root("root")?;
        let trust = trust(&[&root])?;
        let now = OffsetDateTime::now_utc();
        let leaf = root.leaf(1, [now, now + 60 * MINUTE])?;
        let at = |at: OffsetDateTime| with(&leaf, &[], |chain| trust.verify(chain, unix(at)));
        assert_eq!(at(now), Ok(()));
        assert_eq!(at(now - 10 * MINUTE + MINUTE), Ok(()), "our clock is nine minutes behind");
        let early = at(now - 11 * MINUTE);
        assert!(matches!(early, Err(webpki::Error::CertNotValidYet { .. })), "{early:?}");
        assert_eq!(at(now + 60 * MINUTE - MINUTE), Ok(()));
        let late = at(now + 60 * MINUTE + time::Duration::SECOND);
        assert!(matches!(late, Err(webpki::Error::CertExpired { .. })), "{late:?}");
        // One that is over before it counts.
        let short = root.leaf(2, [now + 5 * MINUTE, now + 4 * MINUTE])?;
        assert!(with(&short, &[], |chain| trust.verify(chain, unix(now))).is_err());
        Ok(())
    }

    #[test]
    fn a_root_counts_until_its_end_whatever_is_signed_under_it() -> TestResult {
        let now = OffsetDateTime::now_utc();
        let root = Authority::root_of("root", [now - 60 * MINUTE, now + MINUTE])?;
        let other = Authority::root("other")?;
        let trust = trust(&[&other, &root])?;
        let leaf = root.leaf(1, [now - MINUTE, now + 60 * MINUTE])?;
        let at = |at: OffsetDateTime| with(&leaf, &[], |chain| trust.verify(chain, unix(at)));
        assert_eq!(at(now), Ok(()));
        assert_eq!(at(now + 2 * MINUTE), Err(webpki::Error::UnknownIssuer));
        let theirs = other.leaf(1, [now - MINUTE, now + 60 * MINUTE])?;
        assert_eq!(with(&theirs, &[], |chain| trust.verify(chain, unix(now + 2 * MINUTE))), Ok(()));
        Ok(())
    }

    #[test]
    fn what_is_listed_is_refused_and_judged_again() -> TestResult {
        let root = Authority::root("root")?;
        let (between, _) = root.below("between")?;
        let trust = trust(&[&root])?;
        let now = OffsetDateTime::now_utc();
        let times = [now - MINUTE, now + 60 * MINUTE];
        let (listed, other) = (between.leaf(7, times)?, between.leaf(8, times)?);
        let above = [between.certificate.clone()];
        let verify = |leaf| with(leaf, &above, |chain| trust.verify(chain, unix(now)));
        let known = trust.roots();
        let judge = |leaf| with(leaf, &above, |chain| trust.judge(chain, unix(now), &known));
        assert_eq!((verify(&listed), judge(&listed)), (Ok(()), None));

        let tomorrow = now + time::Duration::DAY;
        let changes = trust.changes();
        let revoke = |list: rcgen::CertificateRevocationList| RevocationLists::read_bytes(list.der());
        assert!(trust.revoke(revoke(list(&between.issuer, &[&[7]], tomorrow)?)?));
        assert!(changes.has_changed()?);
        assert_eq!(verify(&listed), Err(webpki::Error::CertRevoked));
        assert_eq!(judge(&listed), Some(Withdrawn::Revoked));
        assert_eq!((verify(&other), judge(&other)), (Ok(()), None));

        // Somebody else's list, of the same name, revokes nothing and lets nobody in by it.
        let (impostor, _) = Authority::root("elsewhere")?.below("between")?;
        trust.revoke(revoke(list(&impostor.issuer, &[&[7]], tomorrow)?)?);
        assert_eq!(judge(&listed), None);
        assert_eq!(verify(&listed), Err(webpki::Error::InvalidCrlSignatureForPublicKey));

        // Out of date: nobody new, and what stands stays.
        trust.revoke(revoke(list(&between.issuer, &[], now - 60 * MINUTE)?)?);
        assert!(matches!(verify(&other), Err(webpki::Error::CrlExpired { .. })), "{:?}", verify(&other));
        assert_eq!(judge(&other), None);

        // One above it.
        let (_, parsed) = X509Certificate::from_der(&between.certificate)?;
        trust.revoke(revoke(list(&root.issuer, &[parsed.raw_serial()], tomorrow)?)?);
        assert_eq!(
            (verify(&other), judge(&other)),
            (Err(webpki::Error::CertRevoked), Some(Withdrawn::Revoked))
        );
        Ok(())
    }

    #[test]
    fn what_stands_on_a_root_that_goes_is_withdrawn_and_nothing_else() -> TestResult {
        let (old, new) = (Authority::root("old")?, Authority::root("new")?);
        let trust = trust(&[&old])?;
        let now = OffsetDateTime::now_utc();
        let times = [now - MINUTE, now + 60 * MINUTE];
        let (before, after) = (old.leaf(1, times)?, new.leaf(1, times)?);
        let known = trust.roots();
        let roots = |all: &[&Authority]| -> Result<Roots, String> {
            let all: Result<Vec<_>, _> = all.iter().map(|root| Root::of(root.certificate.clone())).collect();
            Ok(Roots::new(all?))
        };
        assert!(!trust.believe(roots(&[&old, &old])?), "the same roots are no change");
        assert!(trust.believe(roots(&[&old, &new])?));
        let both = trust.roots();
        let judge = |leaf, known: &Roots| with(leaf, &[], |chain| trust.judge(chain, unix(now), known));
        assert_eq!((judge(&before, &known), judge(&after, &both)), (None, None));
        assert!(trust.believe(roots(&[&new])?));
        assert_eq!((judge(&before, &known), judge(&after, &both)), (Some(Withdrawn::RootGone), None));
        Ok(())
    }
}
