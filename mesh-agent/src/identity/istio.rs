//! The messages of Istio's certificate service, as its `security/v1alpha1/ca.proto` has them on the wire.
//!
//! Only the fields that are used, with their numbers; others are passed over as protobuf has it. Tested by the
//! authority that is asked (`remote.rs`) and the one that is served (`controller/`).

use std::collections::HashMap;

/// Path of `istio.v1.auth.IstioCertificateService/CreateCertificate`.
pub(crate) const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// The key in the metadata under which a node's agent names the identity it asks for.
const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// `IstioCertificateRequest`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CertificateRequest {
    /// PEM of a PKCS #10 request.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// How long the certificate is to be valid, seconds; 0 leaves it to the authority.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// Whatever else the authority is to know.
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// `google.protobuf.Struct`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Struct {
    #[prost(map = "string, message", tag = "1")]
    fields: HashMap<String, Value>,
}

/// `google.protobuf.Value`, of which texts alone are read.
#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(string, optional, tag = "3")]
    string_value: Option<String>,
}

/// `IstioCertificateResponse`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CertificateResponse {
    /// PEM texts: the leaf, what it chains by, and last the roots. Each may hold several certificates.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}

impl CertificateRequest {
    /// A request in the name of another.
    pub fn impersonating(identity: String, csr: String, validity_duration: i64) -> Self {
        let value = Value { string_value: Some(identity) };
        let fields = HashMap::from([(IMPERSONATED_IDENTITY.to_owned(), value)]);
        Self { csr, validity_duration, metadata: Some(Struct { fields }) }
    }

    /// The identity asked for, where it is not the caller's own.
    pub fn impersonated(&self) -> Option<&str> {
        let value = self.metadata.as_ref()?.fields.get(IMPERSONATED_IDENTITY)?;
        value.string_value.as_deref().filter(|identity| !identity.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;

    #[test]
    fn the_wire_is_istios() -> Result<(), prost::DecodeError> {
        let request = CertificateRequest::impersonating("spiffe://x".into(), "csr".into(), 5);
        // Field numbers and wire types written out: 1 (text), 3 (varint), 4 (message) of a map of 1 to 2, of 3.
        let value = [&[0x1a, 10][..], b"spiffe://x"].concat();
        let entry = [&[0x0a, 20][..], b"ImpersonatedIdentity", &[0x12, value.len() as u8], &value].concat();
        let fields = [&[0x0a, entry.len() as u8][..], &entry].concat();
        let expected = [&[0x0a, 3][..], b"csr", &[0x18, 5, 0x22, fields.len() as u8], &fields].concat();
        assert_eq!(request.encode_to_vec(), expected);
        assert_eq!(CertificateRequest::decode(&expected[..])?, request);
        assert_eq!(request.impersonated(), Some("spiffe://x"));

        let mut foreign = request.clone();
        foreign.metadata = None;
        assert_eq!(foreign.impersonated(), None);
        let response = CertificateResponse { cert_chain: vec!["a".into(), "b".into()] };
        assert_eq!(response.encode_to_vec(), [0x0a, 1, b'a', 0x0a, 1, b'b']);
        Ok(())
    }
}
