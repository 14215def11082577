//! For tests: a root, what is between it and leaves, and lists of what is revoked, of any time.

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationList, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyUsagePurpose, RevokedCertParams, SanType,
    SerialNumber, SigningKey,
};
use rustls_pki_types::CertificateDer;
use time::{Duration, OffsetDateTime};

use super::key::SecretKey;

/// An authority that a test signs with.
pub(super) struct Authority {
    pub certificate: CertificateDer<'static>,
    pub issuer: Issuer<'static, SecretKey>,
}

fn params(name: &str, times: [OffsetDateTime; 2]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    [params.not_before, params.not_after] = times;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.use_authority_key_identifier_extension = true;
    params
}

impl Authority {
    /// A root of this name, valid for a day around now.
    pub fn root(name: &str) -> Result<Self, rcgen::Error> {
        let now = OffsetDateTime::now_utc();
        Self::root_of(name, [now - Duration::DAY, now + Duration::DAY])
    }

    /// A root of any time.
    pub fn root_of(name: &str, times: [OffsetDateTime; 2]) -> Result<Self, rcgen::Error> {
        let key = SecretKey::generate()?;
        let certificate = params(name, times).self_signed(&key)?.der().clone();
        Ok(Self { issuer: Issuer::from_ca_cert_der(&certificate, key)?, certificate })
    }

    /// An authority below this one, with the key in PEM.
    pub fn below(&self, name: &str) -> Result<(Self, zeroize::Zeroizing<String>), rcgen::Error> {
        let (key, now) = (SecretKey::generate()?, OffsetDateTime::now_utc());
        let pem = key.to_pem();
        let params = params(name, [now - Duration::DAY, now + Duration::DAY]);
        let certificate = params.signed_by(&key, &self.issuer)?.der().clone();
        Ok((Self { issuer: Issuer::from_ca_cert_der(&certificate, key)?, certificate }, pem))
    }

    /// A leaf with this serial number.
    pub fn leaf(
        &self,
        serial: u64,
        times: [OffsetDateTime; 2],
    ) -> Result<CertificateDer<'static>, rcgen::Error> {
        let mut params = params("leaf", times);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into()?)];
        params.serial_number = Some(SerialNumber::from(serial));
        Ok(params.signed_by(&SecretKey::generate()?, &self.issuer)?.der().clone())
    }
}

/// A list of these serial numbers, good until `next`.
pub(crate) fn list(
    issuer: &Issuer<'_, impl SigningKey>,
    serials: &[&[u8]],
    next: OffsetDateTime,
) -> Result<CertificateRevocationList, rcgen::Error> {
    let this_update = next - Duration::WEEK;
    let revoked = |serial: &&[u8]| RevokedCertParams {
        serial_number: SerialNumber::from(serial.to_vec()),
        revocation_time: this_update,
        reason_code: None,
        invalidity_date: None,
    };
    CertificateRevocationListParams {
        this_update,
        next_update: next,
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    }
    .signed_by(issuer)
}

/// The bytes of a serial number in hex.
pub(crate) fn serial(hex: &str) -> Result<Vec<u8>, std::num::ParseIntError> {
    let even = if hex.len().is_multiple_of(2) { hex.to_owned() } else { format!("0{hex}") };
    (0..even.len()).step_by(2).map(|at| u8::from_str_radix(&even[at..at + 2], 16)).collect()
}
