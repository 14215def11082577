//! Directories that fit, and all the ways in which one does not.

use std::os::unix::fs::PermissionsExt as _;

use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, PKCS_RSA_SHA256, RsaKeySize,
};
use rustls_pki_types::pem::PemObject as _;

use super::*;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;
type TestResult = Outcome<()>;

const DOMAIN: &str = "cluster.local";

/// A certificate with its key.
struct Made {
    params: CertificateParams,
    key: KeyPair,
    certificate: Certificate,
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = OffsetDateTime::now_utc() - time::Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + time::Duration::days(30);
    params
}

fn root(name: &str) -> Outcome<Made> {
    let (params, key) = (params(name), KeyPair::generate()?);
    let certificate = params.self_signed(&key)?;
    Ok(Made { params, key, certificate })
}

impl Made {
    fn signs(&self, params: CertificateParams, key: KeyPair) -> Outcome<Made> {
        let certificate = params.signed_by(&key, &Issuer::from_params(&self.params, &self.key))?;
        Ok(Made { params, key, certificate })
    }
}

/// A directory with an intermediate of `root`'s, of this key.
fn directory(root: &Made, params: CertificateParams, key: KeyPair) -> Outcome<(tempfile::TempDir, Made)> {
    let dir = tempfile::tempdir()?;
    let intermediate = root.signs(params, key)?;
    write(dir.path(), KEY, &intermediate.key.serialize_pem())?;
    write(dir.path(), CERTIFICATE, &intermediate.certificate.pem())?;
    write(dir.path(), CHAIN, &(intermediate.certificate.pem() + &root.certificate.pem()))?;
    write(dir.path(), ROOTS, &root.certificate.pem())?;
    Ok((dir, intermediate))
}

fn write(dir: &Path, name: &str, text: &str) -> io::Result<()> {
    fs::write(dir.join(name), text)?;
    let mode = if name == KEY { 0o600 } else { 0o644 };
    fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode))
}

fn why(dir: &Path) -> String {
    EmbeddedCa::plugged_in(dir, DOMAIN).map_or_else(|error| error.to_string(), |_| "it was accepted".into())
}

#[test]
fn an_intermediate_is_sent_behind_the_leaf_and_roots_are_the_bundle() -> TestResult {
    let (root, other) = (root("root")?, root("the next root")?);
    for key in [
        KeyPair::generate()?,
        KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384)?,
        KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?,
    ] {
        let (dir, intermediate) = directory(&root, params("intermediate"), key)?;
        write(dir.path(), ROOTS, &(root.certificate.pem() + &other.certificate.pem()))?;
        let ca = EmbeddedCa::plugged_in(dir.path(), DOMAIN)?;
        assert_eq!(ca.bundle(), [root.certificate.der().clone(), other.certificate.der().clone()]);
        let id = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
        let issued = ca.issue(&id, &KeyPair::generate()?, LeafPolicy::default())?;
        assert_eq!(issued.chain[1..], [intermediate.certificate.der().clone()]);
        // It is all there without cert-chain.pem, where one step leads to the root.
        fs::remove_file(dir.path().join(CHAIN))?;
        EmbeddedCa::plugged_in(dir.path(), DOMAIN)?;
    }
    Ok(())
}

#[test]
fn a_leaf_ends_no_later_than_any_certificate_it_hangs_on() -> TestResult {
    let root = root("root")?;
    let mut short = params("intermediate");
    short.not_after = OffsetDateTime::now_utc() + time::Duration::hours(2);
    let (dir, _) = directory(&root, short.clone(), KeyPair::generate()?)?;
    let ca = EmbeddedCa::plugged_in(dir.path(), DOMAIN)?;
    let id = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
    let issued = ca.issue(&id, &KeyPair::generate()?, LeafPolicy::default())?;
    assert_eq!(issued.info.not_after.unix_timestamp(), short.not_after.unix_timestamp());
    Ok(())
}

#[test]
fn two_steps_to_the_root_take_the_chain() -> TestResult {
    let root = root("root")?;
    let middle = root.signs(params("middle"), KeyPair::generate()?)?;
    let (dir, lower) = directory(&middle, params("lower"), KeyPair::generate()?)?;
    write(dir.path(), ROOTS, &root.certificate.pem())?;
    write(dir.path(), CHAIN, &(lower.certificate.pem() + &middle.certificate.pem()))?;
    let ca = EmbeddedCa::plugged_in(dir.path(), DOMAIN)?;
    let id = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
    assert_eq!(ca.issue(&id, &KeyPair::generate()?, LeafPolicy::default())?.chain.len(), 3);
    fs::remove_file(dir.path().join(CHAIN))?;
    let reason = why(dir.path());
    assert!(reason.contains("does not lead to root-cert.pem by way of cert-chain.pem"), "{reason}");
    Ok(())
}

#[test]
fn a_root_may_be_plugged_in_itself() -> TestResult {
    let (dir, root) = (tempfile::tempdir()?, root("root")?);
    write(dir.path(), KEY, &root.key.serialize_pem())?;
    for name in [CERTIFICATE, ROOTS] {
        write(dir.path(), name, &root.certificate.pem())?;
    }
    let ca = EmbeddedCa::plugged_in(dir.path(), DOMAIN)?;
    let id = "spiffe://cluster.local/ns/default/sa/reviews".parse()?;
    assert_eq!(ca.issue(&id, &KeyPair::generate()?, LeafPolicy::default())?.chain.len(), 1);
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> TestResult {
    let root = root("root")?;
    let (dir, intermediate) = directory(&root, params("intermediate"), KeyPair::generate()?)?;
    let (path, good) = (dir.path(), intermediate.certificate.pem());
    let mut no_ca = params("leaf");
    no_ca.is_ca = IsCa::ExplicitNoCa;
    let mut old = params("old");
    old.not_after = OffsetDateTime::now_utc() - time::Duration::minutes(1);
    let mut young = params("young");
    young.not_before = OffsetDateTime::now_utc() + time::Duration::hours(1);
    let again = || KeyPair::from_pem(&intermediate.key.serialize_pem());
    let of_ours =
        |params| Ok::<_, Box<dyn std::error::Error>>(root.signs(params, again()?)?.certificate.pem());
    let stranger = self::root("stranger")?;
    let key = intermediate.key.serialize_pem();
    for (name, text, restored, expected) in [
        (CERTIFICATE, stranger.certificate.pem(), &good, "is not the certificate of the key in ca-key.pem"),
        (CERTIFICATE, of_ours(no_ca)?, &good, "may not certify (basicConstraints CA)"),
        (CERTIFICATE, of_ours(old)?, &good, "expired at"),
        (CERTIFICATE, of_ours(young)?, &good, "is not valid before"),
        (CERTIFICATE, "no PEM".to_owned(), &good, "holds no PEM certificate"),
        (KEY, "no key".to_owned(), &key, "is not a private key"),
        (ROOTS, stranger.certificate.pem(), &root.certificate.pem(), "does not lead to root-cert.pem"),
        (ROOTS, String::new(), &root.certificate.pem(), "holds no PEM certificate"),
        (
            CHAIN,
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n".into(),
            &good,
            "no certificate",
        ),
    ] {
        write(path, name, &text)?;
        let reason = why(path);
        assert!(
            reason.contains(expected) && reason.contains(&path.display().to_string()),
            "{name}: {reason}"
        );
        write(path, name, restored)?;
        assert_eq!(why(path), "it was accepted", "{name}");
    }
    fs::set_permissions(path.join(KEY), fs::Permissions::from_mode(0o644))?;
    assert!(why(path).contains("may be read by everybody (mode 0644)"), "{}", why(path));
    fs::remove_file(path.join(KEY))?;
    assert!(why(path).contains("cannot read") && why(path).contains(KEY), "{}", why(path));
    assert!(CertificateDer::from_pem_file(path.join(CERTIFICATE)).is_ok());
    Ok(())
}
