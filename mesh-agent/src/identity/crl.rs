//! Lists of revoked certificates (RFC 5280, section 5), read from a file.
//!
//! Promises: a file is taken whole or not at all, and what is said of one that cannot be taken names the list and the
//! reason. A list says something of its own issuer's certificates alone; what it says is believed only with the issuer's
//! signature, which is checked where a certificate is listed ([`Trust`](super::trust::Trust)). Tested below, and in
//! handshakes by `tunnel/tests`.

use std::{fmt, fs, path::Path};

use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime, pem::PemObject};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, OwnedCertRevocationList, RevocationOptions,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::prelude::{CertificateRevocationList as Parsed, FromDer};

use super::trust::{CLOCK_SKEW, unix};

/// The lists of one file.
#[derive(Default)]
pub(super) struct RevocationLists {
    lists: Vec<List>,
}

struct List {
    parsed: CertRevocationList<'static>,
    /// For people.
    issuer: String,
    revoked: usize,
    /// By when its issuer has promised the next one (`nextUpdate`).
    next: Option<UnixTime>,
    der: CertificateRevocationListDer<'static>,
}

impl RevocationLists {
    /// Reads a file with one DER list, or any number of PEM blocks `X509 CRL`: none means that nothing is revoked.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub(super) fn read(path: &Path) -> Result<Self, String> {
        let bytes =
            fs::read(path).map_err(|error| format!("cannot read the CRL {}: {error}", path.display()))?;
        Self::parse(&bytes).map_err(|reason| format!("the CRL {} {reason}", path.display()))
    }

    /// The same from memory.
    #[cfg(test)]
    pub(super) fn read_bytes(bytes: &[u8]) -> Result<Self, String> {
        Self::parse(bytes)
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        // DER begins with a SEQUENCE; no text does.
        if bytes.first() == Some(&0x30) {
            let list = List::of(CertificateRevocationListDer::from(bytes.to_vec()));
            return Ok(Self { lists: vec![list.map_err(|reason| format!("is not one in DER: {reason}"))?] });
        }
        let mut lists = Vec::new();
        for (number, der) in CertificateRevocationListDer::pem_slice_iter(bytes).enumerate() {
            let list = der.map_err(|error| error.to_string()).and_then(List::of);
            lists.push(list.map_err(|reason| format!("is unusable, list {}: {reason}", number + 1))?);
        }
        // A file cut short has a block without an end, or no block at all.
        if lists.is_empty() && bytes.iter().any(|byte| !byte.is_ascii_whitespace()) {
            return Err(
                "holds no list, neither PEM (`X509 CRL`) nor DER; an empty file would say that nothing \
                        is revoked"
                    .to_owned(),
            );
        }
        Ok(Self { lists })
    }

    /// Whether both are the same lists.
    pub(super) fn same(&self, other: &Self) -> bool {
        self.lists.iter().map(|list| &list.der).eq(other.lists.iter().map(|list| &list.der))
    }

    /// How many certificates are listed.
    pub(super) fn revoked(&self) -> usize {
        self.lists.iter().map(|list| list.revoked).sum()
    }

    /// What an operator has to be told of lists that are older than their issuers promised.
    pub(super) fn overdue(&self, now: UnixTime) -> Vec<String> {
        let overdue = self.lists.iter().filter(|list| list.is_overdue(now));
        let told = |list: &List| {
            let issuer = &list.issuer;
            format!(
                "the CRL of {issuer:?} is out of date (nextUpdate): its certificates are refused until a newer one is there"
            )
        };
        overdue.map(told).collect()
    }

    /// Calls `verify` with what is to be asked of these lists for a chain: nothing where none of them has anything to say
    /// of it, so that handshakes do not pay for lists that do not concern them. Without a `now` no list is out of date.
    pub(super) fn asked<T>(
        &self,
        chain: &[&CertificateDer<'_>],
        now: Option<UnixTime>,
        verify: impl FnOnce(Option<RevocationOptions<'_>>) -> T,
    ) -> T {
        if !self.concern(chain, now) {
            return verify(None);
        }
        let lists: Vec<&CertRevocationList<'_>> = self.lists.iter().map(|list| &list.parsed).collect();
        // Fails only without lists, and then none concerns anybody.
        let options = RevocationOptionsBuilder::new(&lists).map(|options| {
            let overdue = now.is_some_and(|now| self.lists.iter().any(|list| list.is_overdue(now)));
            let expiration = if overdue { ExpirationPolicy::Enforce } else { ExpirationPolicy::Ignore };
            options.with_status_policy(UnknownStatusPolicy::Allow).with_expiration_policy(expiration).build()
        });
        verify(options.ok())
    }

    /// Whether one of a chain is listed, or its issuer's list is overdue.
    pub(super) fn concern(&self, chain: &[&CertificateDer<'_>], now: Option<UnixTime>) -> bool {
        !self.lists.is_empty() && chain.iter().any(|certificate| self.concerns(certificate, now))
    }

    /// What cannot be read is verification's to refuse.
    fn concerns(&self, certificate: &CertificateDer<'_>, now: Option<UnixTime>) -> bool {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else { return false };
        self.lists.iter().filter(|list| list.parsed.issuer() == certificate.issuer()).any(|list| {
            now.is_some_and(|now| list.is_overdue(now))
                || !matches!(list.parsed.find_serial(certificate.serial()), Ok(None))
        })
    }
}

impl List {
    fn of(der: CertificateRevocationListDer<'static>) -> Result<Self, String> {
        let list = OwnedCertRevocationList::from_der(&der).map_err(|error| error.to_string())?;
        let (_, parsed) = Parsed::from_der(&der).map_err(|error| error.to_string())?;
        Ok(Self {
            parsed: list.into(),
            issuer: parsed.issuer().to_string(),
            revoked: parsed.iter_revoked_certificates().count(),
            next: parsed.next_update().map(|at| unix(at.to_datetime())),
            der,
        })
    }

    /// A clock that is ahead of the issuer's makes no list out of date.
    fn is_overdue(&self, now: UnixTime) -> bool {
        self.next.is_some_and(|next| next.as_secs() + CLOCK_SKEW.as_secs() < now.as_secs())
    }
}

impl fmt::Debug for RevocationLists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RevocationLists").field("revoked", &self.revoked()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::Issuer;
    use time::OffsetDateTime;

    use super::{
        super::{ca::self_signed, key::SecretKey, pki::list},
        *,
    };

    type TestResult = Result<(), Box<dyn std::error::Error>>;

    fn lists(bytes: &[u8]) -> Result<usize, String> {
        RevocationLists::parse(bytes).map(|lists| lists.revoked())
    }

    #[test]
    fn one_list_several_or_none() -> TestResult {
        let key = SecretKey::generate()?;
        let root = self_signed("cluster.local", &key, OffsetDateTime::now_utc())?;
        let issuer = Issuer::from_ca_cert_der(root.der(), key)?;
        let tomorrow = OffsetDateTime::now_utc() + time::Duration::DAY;
        let (one, two) = (list(&issuer, &[&[1]], tomorrow)?, list(&issuer, &[&[2], &[3]], tomorrow)?);
        assert_eq!(lists(one.der()), Ok(1));
        let both = format!("{}{}", one.pem()?, two.pem()?);
        assert_eq!(lists(both.as_bytes()), Ok(3));
        assert_eq!((lists(b""), lists(b"\n")), (Ok(0), Ok(0)));

        let half = both.get(..both.len() - 60).unwrap_or_default();
        for bad in [half.as_bytes(), b"nothing", &one.der()[..40], root.pem().as_bytes()] {
            let refused = lists(bad);
            assert!(refused.is_err(), "{refused:?}");
        }
        Ok(())
    }

    #[test]
    fn a_list_is_overdue_when_no_clock_can_be_to_blame() -> TestResult {
        let key = SecretKey::generate()?;
        let root = self_signed("cluster.local", &key, OffsetDateTime::now_utc())?;
        let issuer = Issuer::from_ca_cert_der(root.der(), key)?;
        let next = OffsetDateTime::now_utc() + time::Duration::DAY;
        let lists = RevocationLists::parse(list(&issuer, &[], next)?.der())?;
        assert!(lists.overdue(unix(next + CLOCK_SKEW)).is_empty());
        let told = lists.overdue(unix(next + CLOCK_SKEW + time::Duration::SECOND));
        assert!(matches!(&told[..], [one] if one.contains("out of date")), "{told:?}");
        Ok(())
    }
}
