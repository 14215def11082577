//! What the `tls` of a server comes to: Secrets of the pod's namespace are looked up, and files, where the source has read any;
//! what is not there, or cannot be read, is said.
//!
//! Promises that a server without a certificate shows none: it is never served in the clear, nor with another's. Tested in
//! `tests/gateways/tls.rs`.

use std::sync::{Arc, OnceLock};

use rustls::{InconsistentKeys, RootCertStore, crypto::aws_lc_rs::default_provider, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem::PemObject as _};

use crate::state::{
    compile::client_tls::{file, secret_of},
    resource::{Objects, client_tls::Credential, gateway::Terms},
    snapshot::{ServerTls, ServerTlsMode, ServerTlsRead, ServerTlsTerms},
};

/// What is wrong with what is named.
pub(super) struct Wrong {
    /// Which field names it.
    pub field: &'static str,
    /// The kind of what is not there; `None`: it is there, and no use.
    pub missing: Option<&'static str>,
    /// Why.
    pub why: String,
}

/// What a part of a credential is called in a Secret, and the field that names its file.
#[derive(Clone, Copy)]
struct Part {
    field: &'static str,
    called: &'static str,
}

const CERTIFICATE: Part = Part { field: "serverCertificate", called: "the certificate (tls.crt)" };
const KEY: Part = Part { field: "privateKey", called: "the key (tls.key)" };
const ROOTS: Part = Part { field: "caCertificates", called: "the certificates of authorities (ca.crt)" };
const REVOKED: Part = Part { field: "caCrl", called: "the lists of what is revoked (ca.crl)" };

/// TLS of a server, and what is wrong with it. What says the same as before stays the same, with what has been made of it.
pub(super) fn of(
    objects: &Objects,
    namespace: &str,
    terms: &Terms,
    before: Option<&Arc<ServerTls>>,
) -> (Arc<ServerTls>, Option<Wrong>) {
    let credential = credential(objects, namespace, terms);
    let (found, wrong) = match credential {
        Ok(credential) => (credential, None),
        Err(wrong) => (Credential::default(), Some(wrong)),
    };
    let written = ServerTlsTerms {
        mode: terms.mode,
        chain: found.certificate,
        key: found.key,
        roots: found.roots,
        revoked: found.revoked,
        names: terms.names.clone(),
        least: terms.least,
        most: terms.most,
        ciphers: terms.ciphers.clone(),
    };
    let same = before.filter(|before| before.terms == written && before.read.is_ok());
    if let (Some(same), None) = (same, &wrong) {
        return (Arc::clone(same), None);
    }
    let read = match wrong {
        Some(wrong) => Err(wrong),
        None => read(&written).map_err(|(part, why)| {
            let field = if terms.credential.is_some() { "credentialName" } else { part.field };
            Wrong { field, missing: None, why: format!("{}: {why}", part.called) }
        }),
    };
    let (read, wrong) = match read {
        Ok(read) => (Ok(read), None),
        Err(wrong) => (Err(wrong.why.as_str().into()), Some(wrong)),
    };
    (Arc::new(ServerTls { terms: written, read, made: OnceLock::new() }), wrong)
}

/// What is named for a server, as far as its mode has a use for it.
fn credential(objects: &Objects, namespace: &str, terms: &Terms) -> Result<Credential, Wrong> {
    if terms.mode == ServerTlsMode::IstioMutual {
        return Ok(Credential::default());
    }
    let Some(name) = &terms.credential else { return files(objects, terms) };
    let missing = |why| Wrong { field: "credentialName", missing: Some("Secret"), why };
    let found = secret_of(objects, namespace, name).map_err(missing)?;
    let secret = format!("Secret {namespace}/{name}");
    if found.certificate.is_none() || found.key.is_none() {
        return Err(missing(format!("{secret} has no certificate and key (tls.crt, tls.key)")));
    }
    if !terms.asks_clients() {
        return Ok(Credential { roots: None, revoked: None, ..found });
    }
    if found.roots.is_none() {
        let why = format!(
            "{secret} has no certificate of an authority (ca.crt), nor has {namespace}/{name}-cacert"
        );
        return Err(missing(why));
    }
    Ok(found)
}

fn files(objects: &Objects, terms: &Terms) -> Result<Credential, Wrong> {
    let of = |part: Part| {
        let found = terms.file(part.field).map(|path| file(objects, path)).transpose();
        found.map_err(|why| Wrong { field: part.field, missing: Some("File"), why })
    };
    Ok(Credential { certificate: of(CERTIFICATE)?, key: of(KEY)?, roots: of(ROOTS)?, revoked: of(REVOKED)? })
}

/// Reads PEM: which part is no use, and why, where one is not.
fn read(terms: &ServerTlsTerms) -> Result<ServerTlsRead, (Part, String)> {
    let certified = match (&terms.chain, &terms.key) {
        (Some(chain), Some(key)) => Some(certified(chain, key)?),
        _ => None,
    };
    let roots = terms.roots.as_deref().map(roots).transpose().map_err(|why| (ROOTS, why))?;
    let revoked = terms.revoked.as_deref().map(revoked).transpose().map_err(|why| (REVOKED, why))?;
    Ok(ServerTlsRead { certified, roots: roots.map(Arc::new), revoked: revoked.unwrap_or_default().into() })
}

fn certified(chain: &[u8], key: &[u8]) -> Result<Arc<CertifiedKey>, (Part, String)> {
    let chain = certificates(chain).map_err(|why| (CERTIFICATE, why))?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| (KEY, error.to_string()))?;
    let key =
        default_provider().key_provider.load_private_key(key).map_err(|error| (KEY, error.to_string()))?;
    let certified = CertifiedKey::new(chain, key);
    match certified.keys_match() {
        // Of some kinds of keys nobody can tell.
        Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(Arc::new(certified)),
        Err(rustls::Error::InconsistentKeys(_)) => {
            Err((KEY, "it is not the key of the certificate".to_owned()))
        }
        Err(error) => Err((CERTIFICATE, error.to_string())),
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let certificates = read.map_err(|error| error.to_string())?;
    if certificates.is_empty() { Err("there is no certificate".to_owned()) } else { Ok(certificates) }
}

fn roots(pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(roots)
}

/// One that says nothing of anybody would be taken for one that does.
fn revoked(pem: &[u8]) -> Result<Vec<CertificateRevocationListDer<'static>>, String> {
    let read = CertificateRevocationListDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
    let lists = read.map_err(|error| error.to_string())?;
    for list in &lists {
        webpki::OwnedCertRevocationList::from_der(list).map_err(|error| error.to_string())?;
    }
    if lists.is_empty() { Err("there is no list (`X509 CRL`)".to_owned()) } else { Ok(lists) }
}
