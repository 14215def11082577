//! `tls` of a `DestinationRule`, and the Secrets and files that it names, checked.
//!
//! Never reads a file: which may be read is the source's to say (`source/named.rs`). Tested by the table below.

use std::{fmt, sync::Arc};

use k8s_openapi::{ByteString, api::core::v1::Secret};
use serde::Deserialize;

use super::field::{Checked, FieldError};

/// `tls`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// `DISABLE`.
    Disable,
    /// `ISTIO_MUTUAL`.
    Mesh,
    /// `SIMPLE`.
    Simple(Terms),
    /// `MUTUAL`: the Secret, or the files, have a certificate to show.
    Mutual(Terms),
}

impl Tls {
    /// What it says of TLS that the agent begins.
    pub fn terms(&self) -> Option<&Terms> {
        match self {
            Self::Disable | Self::Mesh => None,
            Self::Simple(terms) | Self::Mutual(terms) => Some(terms),
        }
    }
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
    /// Files, where there is no `credentialName`.
    pub files: Files,
    /// `insecureSkipVerify`.
    pub anybody: bool,
}

/// Files with PEM, each by its path as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Files {
    /// `clientCertificate`.
    pub certificate: Option<Arc<str>>,
    /// `privateKey`.
    pub key: Option<Arc<str>>,
    /// `caCertificates`.
    pub roots: Option<Arc<str>>,
    /// `caCrl`.
    pub revoked: Option<Arc<str>>,
}

impl Files {
    /// Those that are named, with the fields that name them.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, &Arc<str>)> {
        let all = [
            ("clientCertificate", &self.certificate),
            ("privateKey", &self.key),
            ("caCertificates", &self.roots),
            ("caCrl", &self.revoked),
        ];
        all.into_iter().filter_map(|(field, path)| Some((field, path.as_ref()?)))
    }
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
    /// `ca.crl`, or `crl`: certificates that are not believed any more.
    pub revoked: Option<Arc<[u8]>>,
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
            revoked: of(["ca.crl", "crl"]),
        }
    }
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
    ca_crl: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
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
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        let path = |text| filled(text).map(Arc::from);
        let files = Files {
            certificate: path(self.client_certificate),
            key: path(self.private_key),
            roots: path(self.ca_certificates),
            revoked: path(self.ca_crl),
        };
        let terms = Terms {
            sni: filled(self.sni),
            names: self.subject_alt_names,
            credential: filled(self.credential_name),
            files,
            anybody: self.insecure_skip_verify,
        };
        terms.check(self.mode)?;
        Ok(match self.mode {
            Mode::Disable => Tls::Disable,
            Mode::IstioMutual => Tls::Mesh,
            Mode::Simple => Tls::Simple(terms),
            Mode::Mutual => Tls::Mutual(terms),
        })
    }
}

impl Terms {
    fn check(&self, mode: Mode) -> Checked<()> {
        if let Some(sni) = &self.sni
            && (rustls_pki_types::DnsName::try_from(sni.as_str()).is_err())
        {
            return Err(FieldError::new("sni", format!("{sni:?} is no DNS name")));
        }
        if self.anybody && !self.names.is_empty() {
            let message = "subjectAltNames mean nothing where insecureSkipVerify is true";
            return Err(FieldError::new("subjectAltNames", message));
        }
        let credential = self.credential.as_ref().map(|_| "credentialName");
        let file = self.files.named().next().map(|(field, _)| field);
        let refused = |field: &str, message: &str| Err(FieldError::new(field, message));
        match (mode, credential.or(file)) {
            (Mode::IstioMutual, Some(field)) => {
                return refused(
                    field,
                    "ISTIO_MUTUAL shows the pod's own certificate and believes the mesh's",
                );
            }
            (Mode::Mutual, None) => {
                return refused(
                    "credentialName",
                    "is required where the mode is MUTUAL and no files are named",
                );
            }
            _ => {}
        }
        if let (Some(_), Some(field)) = (credential, file) {
            return refused(
                field,
                "is in the Secret already that credentialName names; write one of the two",
            );
        }
        if mode == Mode::Mutual && credential.is_none() {
            for (field, path) in
                [("clientCertificate", &self.files.certificate), ("privateKey", &self.files.key)]
            {
                if path.is_none() {
                    return refused(field, "is required where the mode is MUTUAL and no Secret is named");
                }
            }
        }
        Ok(())
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
        let terms =
            Terms { sni: None, names: Vec::new(), credential: None, files: Files::default(), anybody: false };
        let files = Files {
            certificate: Some("a.pem".into()),
            key: Some("b.pem".into()),
            roots: Some("c.pem".into()),
            revoked: Some("d.pem".into()),
        };
        let full = Terms {
            sni: Some("a.example".into()),
            names: vec!["b.example".into()],
            credential: Some("c".into()),
            files: Files::default(),
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
                Tls::Simple(Terms { anybody: true, ..terms.clone() }),
            ),
            (
                json!({"mode": "MUTUAL", "clientCertificate": "a.pem", "privateKey": "b.pem",
                       "caCertificates": "c.pem", "caCrl": "d.pem"}),
                Tls::Mutual(Terms { files, ..terms.clone() }),
            ),
            (
                json!({"mode": "SIMPLE", "caCrl": "d.pem"}),
                Tls::Simple(Terms {
                    files: Files { revoked: Some("d.pem".into()), ..Files::default() },
                    ..terms
                }),
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
            (json!({"mode": "MUTUAL", "clientCertificate": "a"}), "privateKey", "required"),
            (json!({"mode": "MUTUAL", "privateKey": "a"}), "clientCertificate", "required"),
            (json!({"mode": "MUTUAL", "caCertificates": "a"}), "clientCertificate", "required"),
            (
                json!({"mode": "SIMPLE", "credentialName": "a", "caCertificates": "b"}),
                "caCertificates",
                "one of",
            ),
            (json!({"mode": "MUTUAL", "credentialName": "a", "caCrl": "b"}), "caCrl", "one of the two"),
            (json!({"mode": "ISTIO_MUTUAL", "caCrl": "b"}), "caCrl", "own certificate"),
            (json!({"mode": "MUTUAL"}), "credentialName", "required"),
            (json!({"mode": "ISTIO_MUTUAL", "credentialName": "a"}), "credentialName", "own certificate"),
            (json!({"mode": "SIMPLE", "sni": "a b"}), "sni", "no DNS name"),
            (
                json!({"mode": "SIMPLE", "insecureSkipVerify": true, "subjectAltNames": ["a"]}),
                "subjectAltNames",
                "insecureSkipVerify",
            ),
            (json!({"mode": "SIMPLE", "caCrl": 1}), "caCrl", "invalid type"),
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
        let data = json!({"tls.crt": "b25l", "tls.key": "dHdv", "ca.crt": "c2l4", "ca.crl": "b25l"});
        let tls = secret(json!({ "data": data }));
        let text = json!({"cert": "one", "key": "two", "cacert": "six", "crl": "one"});
        let generic = secret(json!({ "stringData": text }));
        assert_eq!(tls, generic);
        assert_eq!((tls.key.as_deref(), tls.roots.as_deref()), (Some(&b"two"[..]), Some(&b"six"[..])));
        assert_eq!(tls.revoked.as_deref(), Some(&b"one"[..]));
        assert_eq!(format!("{tls:?}"), "Credential { .. }");
        assert_eq!(secret(json!({"data": {"password": "b25l"}})), Credential::default());
    }
}
