//! Certificate requests (PKCS #10, RFC 2986): only the key is taken from one, after it has signed the request.
//!
//! Keys as Istio takes them: ECDSA P-256 and P-384, RSA of 2048 bits and more, and Ed25519. Tested in `tests/`.

use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PublicKeyData as _, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
    public_key::PublicKey,
};

/// Longest request looked at, in bytes of PEM: one of RSA 4096 takes 2 KiB.
const LONGEST: usize = 16 * 1024;
/// RSA keys, in bits.
const RSA_BITS: std::ops::RangeInclusive<usize> = 2048..=8192;

/// What a request says.
#[derive(Debug)]
pub(super) struct Requested {
    pub key: SubjectPublicKeyInfo,
    /// The kind of the key, for people.
    pub kind: String,
    /// Its names, of which only one URI may be.
    pub names: Vec<String>,
}

/// Reads a request and verifies that it is signed by the key that is in it.
pub(super) fn read(pem: &str) -> Result<Requested, String> {
    if pem.len() > LONGEST {
        return Err(format!("the certificate request is longer than {LONGEST} bytes"));
    }
    let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
        .map_err(|error| format!("the certificate request is no PEM (CERTIFICATE REQUEST): {error}"))?;
    let (rest, request) = X509CertificationRequest::from_der(&der)
        .map_err(|error| format!("the certificate request cannot be read: {error}"))?;
    if !rest.is_empty() {
        return Err("bytes follow the certificate request".to_owned());
    }
    let info = &request.certification_request_info.subject_pki;
    let key = SubjectPublicKeyInfo::from_der(info.raw)
        .map_err(|error| format!("keys of this kind are not certified: {error}"))?;
    // Before the signature, which cannot be verified for each kind of key.
    let kind = kind(&key, &info.parsed().map_err(|error| format!("the key cannot be read: {error}"))?)?;
    request
        .verify_signature()
        .map_err(|_| "the certificate request is not signed by the key it is for".to_owned())?;
    Ok(Requested { key, kind, names: names(&request)? })
}

fn kind(key: &SubjectPublicKeyInfo, parsed: &PublicKey<'_>) -> Result<String, String> {
    let algorithm = key.algorithm();
    if let PublicKey::RSA(rsa) = parsed {
        let bits = rsa.key_size();
        return if RSA_BITS.contains(&bits) {
            Ok(format!("RSA {bits}"))
        } else {
            let (least, most) = (RSA_BITS.start(), RSA_BITS.end());
            Err(format!("an RSA key of {bits} bits is not certified: it has to have {least} to {most}"))
        };
    }
    let kinds = [
        (&PKCS_ECDSA_P256_SHA256, "ECDSA P-256"),
        (&PKCS_ECDSA_P384_SHA384, "ECDSA P-384"),
        (&PKCS_ED25519, "Ed25519"),
    ];
    let known = kinds.iter().find(|(kind, _)| *kind == algorithm);
    known.map(|(_, name)| (*name).to_owned()).ok_or_else(|| {
        "keys of this kind are not certified: take ECDSA P-256 or P-384, RSA of 2048 bits or more, or Ed25519".to_owned()
    })
}

fn names(request: &X509CertificationRequest<'_>) -> Result<Vec<String>, String> {
    let mut names = Vec::new();
    for extension in request.requested_extensions().into_iter().flatten() {
        match extension {
            ParsedExtension::SubjectAlternativeName(san) => {
                names.extend(san.general_names.iter().map(|name| match name {
                    GeneralName::URI(uri) => (*uri).to_owned(),
                    other => format!("{other:?}"),
                }));
            }
            ParsedExtension::BasicConstraints(basic) if basic.ca => {
                return Err("certificates of authorities are not issued (basicConstraints CA)".to_owned());
            }
            _ => {}
        }
    }
    Ok(names)
}
