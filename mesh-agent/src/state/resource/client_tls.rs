//! `tls` of a `DestinationRule`, and the Secrets that it names, checked.
//!
//! Files are refused: certificates come from Secrets. Tested by the table below.

use std::{fmt, sync::Arc};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use serde::Deserialize;

use super::field::{Checked, FieldError, NotYet};

/// `tls`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// `DISABLE`.
    Disable,
    /// `ISTIO_MUTUAL`.
    Mesh,
    /// `SIMPLE`.
    Simple(Terms),
    /// `MUTUAL`: the Secret has a certificate to show.
    Mutual(Terms),
}

/// What `SIMPLE` and `MUTUAL` say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// `sni`.
    pub sni: Option<String>,
    /// `subjectAltNames`.
    pub names: Vec<String>,
    /// `credentialName`.
    pub credential: Option<String>,
    /// `insecureSkipVerify`.
    pub anybody: bool,
}

/// What a Secret has for TLS, each in PEM.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credential {
    /// `tls.crt`, or `cert`.
    pub certificate: Option<Arc<[u8]>>,
    /// `tls.key`, or `key`.
    pub key: Option<Arc<[u8]>>,
    /// `ca.crt`, or `cacert`.
    pub roots: Option<Arc<[u8]>>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credential").finish_non_exhaustive()
    }
}

impl Credential {
    /// What a Secret has; nothing, for Secrets of other kinds.
    pub fn of(secret: Secret) -> Self {
        let Secret { data, string_data, .. } = secret;
        let (data, text) = (data.unwrap_or_default(), string_data.unwrap_or_default());
        let of = |names: [&str; 2]| {
            names.iter().find_map(|name| {
                // As the API server has it: what is written as text comes first.
                let text = text.get(*name).map(String::as_bytes);
                text.or_else(|| data.get(*name).map(|ByteString(bytes)| bytes.as_slice())).map(Arc::from)
            })
        };
        Self {
            certificate: of(["tls.crt", "cert"]),
            key: of(["tls.key", "key"]),
            roots: of(["ca.crt", "cacert"]),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wire {
    #[serde(default)]
    mode: Mode,
    sni: Option<String>,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    credential_name: Option<String>,
    #[serde(default)]
    insecure_skip_verify: bool,
    client_certificate: Option<String>,
    private_key: Option<String>,
    ca_certificates: Option<String>,
    #[serde(rename = "caCrl")]
    _ca_crl: Option<NotYet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Mode {
    #[default]
    Disable,
    Simple,
    Mutual,
    IstioMutual,
}

impl Wire {
    pub fn check(self) -> Checked<Tls> {
        let files = [
            ("clientCertificate", &self.client_certificate),
            ("privateKey", &self.private_key),
            ("caCertificates", &self.ca_certificates),
        ];
        let written = |file: &&(&str, &Option<String>)| file.1.as_ref().is_some_and(|path| !path.is_empty());
        if let Some((field, _)) = files.iter().find(written) {
            let message =
                "files are not read; put what is in it into a Secret, and name that by credentialName";
            return Err(FieldError::new(*field, message));
        }
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        let terms = Terms {
            sni: filled(self.sni),
            names: self.subject_alt_names,
            credential: filled(self.credential_name),
            anybody: self.insecure_skip_verify,
        };
        if let Some(sni) = &terms.sni
            && (rustls_pki_types::DnsName::try_from(sni.as_str()).is_err())
        {
            return Err(FieldError::new("sni", format!("{sni:?} is no DNS name")));
        }
        if terms.anybody && !terms.names.is_empty() {
            let message = "subjectAltNames mean nothing where insecureSkipVerify is true";
            return Err(FieldError::new("subjectAltNames", message));
        }
        match self.mode {
            Mode::Mutual if terms.credential.is_none() => {
                Err(FieldError::new("credentialName", "is required where the mode is MUTUAL"))
            }
            Mode::IstioMutual if terms.credential.is_some() => {
                Err(FieldError::new("credentialName", "ISTIO_MUTUAL shows the pod's own certificate"))
            }
            Mode::Disable => Ok(Tls::Disable),
            Mode::IstioMutual => Ok(Tls::Mesh),
            Mode::Simple => Ok(Tls::Simple(terms)),
            Mode::Mutual => Ok(Tls::Mutual(terms)),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(value: &Value) -> Checked<Tls> {
        crate::state::resource::field::deserialize::<Wire>(value)?.check()
    }

    #[test]
    fn every_mode_is_read() {
        let terms = Terms { sni: None, names: Vec::new(), credential: None, anybody: false };
        let full = Terms {
            sni: Some("a.example".into()),
            names: vec!["b.example".into()],
            credential: Some("c".into()),
            anybody: false,
        };
        let written = |mode: &str| json!({"mode": mode, "sni": "a.example", "subjectAltNames": ["b.example"], "credentialName": "c"});
        let table = [
            (json!({}), Tls::Disable),
            (json!({"mode": "DISABLE"}), Tls::Disable),
            (json!({"mode": "ISTIO_MUTUAL", "caCertificates": ""}), Tls::Mesh),
            (json!({"mode": "SIMPLE"}), Tls::Simple(terms.clone())),
            (
                json!({"mode": "SIMPLE", "insecureSkipVerify": true}),
                Tls::Simple(Terms { anybody: true, ..terms }),
            ),
            (written("SIMPLE"), Tls::Simple(full.clone())),
            (written("MUTUAL"), Tls::Mutual(full)),
        ];
        for (value, expected) in table {
            assert_eq!(read(&value).unwrap(), expected, "{value}");
        }
    }

    #[test]
    fn bad_rules_name_their_field() {
        let table = [
            (json!({"mode": "TLS"}), "mode", "unknown variant"),
            (json!({"mode": "SIMPLE", "caCertificates": "/a.pem"}), "caCertificates", "Secret"),
            (json!({"mode": "MUTUAL", "clientCertificate": "/a.pem"}), "clientCertificate", "Secret"),
            (json!({"mode": "MUTUAL", "privateKey": "/a.pem"}), "privateKey", "Secret"),
            (json!({"mode": "MUTUAL"}), "credentialName", "required"),
            (json!({"mode": "ISTIO_MUTUAL", "credentialName": "a"}), "credentialName", "own certificate"),
            (json!({"mode": "SIMPLE", "sni": "a b"}), "sni", "no DNS name"),
            (
                json!({"mode": "SIMPLE", "insecureSkipVerify": true, "subjectAltNames": ["a"]}),
                "subjectAltNames",
                "insecureSkipVerify",
            ),
            (json!({"mode": "SIMPLE", "caCrl": "/a.pem"}), "caCrl", "not supported yet"),
        ];
        for (value, field, message) in table {
            let error = read(&value).unwrap_err();
            assert_eq!(error.field, field, "{value}");
            assert!(error.message.contains(message), "{value}: {}", error.message);
        }
    }

    #[test]
    fn secrets_of_either_form_are_read_and_not_shown() {
        let secret = |value: Value| Credential::of(serde_json::from_value(value).unwrap());
        // base64 of "one", "two", "six"
        let tls = secret(json!({"data": {"tls.crt": "b25l", "tls.key": "dHdv", "ca.crt": "c2l4"}}));
        let generic = secret(json!({"stringData": {"cert": "one", "key": "two", "cacert": "six"}}));
        assert_eq!(tls, generic);
        assert_eq!((tls.key.as_deref(), tls.roots.as_deref()), (Some(&b"two"[..]), Some(&b"six"[..])));
        assert_eq!(format!("{tls:?}"), "Credential { .. }");
        assert_eq!(secret(json!({"data": {"password": "b25l"}})), Credential::default());
    }
}
