//! Authorities and lists of what is revoked, made by hand for state directories and `--crl` files.
//!
//! Promises: files come into place whole; times are those of now. Never a part of the agent. Tested by the tests that use
//! it.

use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _, path::Path};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod,
    KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use time::{Duration, OffsetDateTime};

/// A key and its certificate, in PEM.
#[derive(Debug)]
pub struct Authority {
    /// The certificate.
    pub certificate: String,
    /// The key.
    pub key: String,
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - Duration::HOUR, now + Duration::DAY);
    params
}

/// A server of these names, which whoever has its certificate believes.
pub fn server(names: &[&str]) -> Result<Authority> {
    let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let made = rcgen::generate_simple_self_signed(names)?;
    Ok(Authority { certificate: made.cert.pem(), key: made.signing_key.serialize_pem() })
}

impl Authority {
    /// A root.
    pub fn root(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let certificate = params(name).self_signed(&key)?.pem();
        Ok(Self { certificate, key: key.serialize_pem() })
    }

    /// One that the other has signed.
    pub fn below(&self, name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let certificate = params(name).signed_by(&key, &self.issuer()?)?.pem();
        Ok(Self { certificate, key: key.serialize_pem() })
    }

    /// What signs in a state directory.
    pub fn of_state_dir(dir: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = dir.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        Ok(Self { certificate: read("ca-cert.pem")?, key: read("ca-key.pem")? })
    }

    /// Its list of revoked certificates, by their serial numbers in hex, good for a day.
    pub fn revokes<S: AsRef<str>>(&self, serials: &[S]) -> Result<String> {
        let now = OffsetDateTime::now_utc();
        let revoked = |hex: &S| -> Result<RevokedCertParams> {
            Ok(RevokedCertParams {
                serial_number: SerialNumber::from(bytes(hex.as_ref())?),
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            })
        };
        let list = CertificateRevocationListParams {
            this_update: now - Duration::HOUR,
            next_update: now + Duration::DAY,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect::<Result<_>>()?,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        Ok(list.signed_by(&self.issuer()?)?.pem()?)
    }

    /// What signs with it.
    pub fn issuer(&self) -> Result<Issuer<'static, KeyPair>> {
        let key = KeyPair::from_pem(&self.key).context("the authority's key")?;
        Issuer::from_ca_cert_pem(&self.certificate, key).context("the authority's certificate")
    }
}

fn bytes(hex: &str) -> Result<Vec<u8>> {
    let even = if hex.len().is_multiple_of(2) { hex.to_owned() } else { format!("0{hex}") };
    let byte = |at| u8::from_str_radix(even.get(at..at + 2).unwrap_or_default(), 16);
    (0..even.len()).step_by(2).map(byte).collect::<Result<_, _>>().context("a serial number in hex")
}

/// Writes a file that nobody else may read, in one step.
pub fn put(path: &Path, contents: &str) -> Result<()> {
    let hidden = path.with_extension("new");
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&hidden);
    file.and_then(|mut file| file.write_all(contents.as_bytes()))
        .and_then(|()| fs::rename(&hidden, path))
        .with_context(|| format!("writing {}", path.display()))
}
