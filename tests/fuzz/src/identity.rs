//! Who somebody is: SPIFFE ids as text, and the one in a certificate.

use mesh_agent::identity::{SpiffeId, certified_identity};
use rustls_pki_types::CertificateDer;

/// Whatever is read as an identity is written as it stood, and names nothing that could be taken for another: policies
/// compare what is written.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    if let Ok(text) = str::from_utf8(input)
        && let Ok(id) = text.parse::<SpiffeId>()
    {
        check(&id);
        assert_eq!(id.to_string(), text, "it has one spelling");
    }
    // A chain that has been verified can say anything of whom it certifies.
    if let Some(id) = certified_identity(&CertificateDer::from(input)) {
        check(&id);
    }
}

fn check(id: &SpiffeId) {
    for part in [&id.trust_domain, &id.namespace, &id.service_account] {
        assert!(!part.is_empty() && !part.contains(['/', '*', ':', '%', ' ']), "{id}");
    }
    assert_eq!(id.to_string().parse().as_ref(), Ok(id), "it can be read again");
}
