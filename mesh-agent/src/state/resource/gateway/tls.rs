//! `tls` of a gateway's server.
//!
//! Never reads a file or a Secret: it names them. Tested in `tests.rs` beside it.

use std::sync::Arc;

use rustls::{SupportedCipherSuite, crypto::aws_lc_rs::cipher_suite as suites};
use serde::Deserialize;

use crate::state::{
    resource::{
        dns_name,
        field::{Checked, FieldError, NotYet, item, under},
    },
    snapshot::{ServerTlsMode, TlsVersion},
};

/// Suites of TLS 1.2 by the names that Istio has for them. Those without forward secrecy, and those of CBC, are not spoken.
const CIPHERS: [(&str, SupportedCipherSuite); 6] = [
    ("ECDHE-ECDSA-AES256-GCM-SHA384", suites::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384),
    ("ECDHE-ECDSA-AES128-GCM-SHA256", suites::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-ECDSA-CHACHA20-POLY1305", suites::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256),
    ("ECDHE-RSA-AES256-GCM-SHA384", suites::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384),
    ("ECDHE-RSA-AES128-GCM-SHA256", suites::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256),
    ("ECDHE-RSA-CHACHA20-POLY1305", suites::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256),
];

/// Those of TLS 1.3, which nobody chooses among (as in Envoy).
const OF_TLS13: [SupportedCipherSuite; 3] = [
    suites::TLS13_AES_256_GCM_SHA384,
    suites::TLS13_AES_128_GCM_SHA256,
    suites::TLS13_CHACHA20_POLY1305_SHA256,
];

/// `tls` of a server that speaks it.
#[derive(Debug, PartialEq)]
pub enum Tls {
    /// `PASSTHROUGH`, Istio's default.
    PassThrough,
    /// It ends at the gateway.
    Ends(Terms),
}

/// What is said of TLS that ends at the gateway.
#[derive(Debug, Clone, PartialEq)]
pub struct Terms {
    /// `mode`.
    pub mode: ServerTlsMode,
    /// `credentialName`: a Secret in the namespace of the gateway's pod.
    pub credential: Option<String>,
    /// Files, where there is no `credentialName`: fields and paths as they are written.
    pub files: Vec<(&'static str, Arc<str>)>,
    /// `subjectAltNames`.
    pub names: Vec<Arc<str>>,
    /// `minProtocolVersion`.
    pub least: TlsVersion,
    /// `maxProtocolVersion`.
    pub most: TlsVersion,
    /// `cipherSuites`, with those of TLS 1.3; none: all there are.
    pub ciphers: Vec<SupportedCipherSuite>,
}

/// As written.
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Wire {
    /// Where TLS ends, and whether clients prove who they are; `PASSTHROUGH` by default.
    mode: Option<Mode>,
    /// Of a plain port: every request is told to come again by HTTPS.
    #[serde(default)]
    https_redirect: bool,
    /// The Secret that has certificate and key, in the namespace of the gateway's pod.
    credential_name: Option<String>,
    server_certificate: Option<String>,
    private_key: Option<String>,
    ca_certificates: Option<String>,
    ca_crl: Option<String>,
    /// A client has to prove one of these names.
    #[serde(default)]
    subject_alt_names: Vec<String>,
    min_protocol_version: Option<Version>,
    max_protocol_version: Option<Version>,
    /// Suites of TLS 1.2, as OpenSSL calls them, in the order of preference.
    #[serde(default)]
    cipher_suites: Vec<String>,
    #[serde(rename = "credentialNames")]
    _credential_names: Option<NotYet>,
    #[serde(rename = "caCertCredentialName")]
    _ca_cert_credential_name: Option<NotYet>,
    #[serde(rename = "tlsCertificates")]
    _tls_certificates: Option<NotYet>,
    #[serde(rename = "verifyCertificateSpki")]
    _verify_certificate_spki: Option<NotYet>,
    #[serde(rename = "verifyCertificateHash")]
    _verify_certificate_hash: Option<NotYet>,
    #[serde(rename = "ecdhCurves")]
    _ecdh_curves: Option<NotYet>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
enum Mode {
    #[serde(rename = "PASSTHROUGH")]
    PassThrough,
    AutoPassthrough,
    Simple,
    Mutual,
    OptionalMutual,
    IstioMutual,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
enum Version {
    #[serde(rename = "TLS_AUTO")]
    Auto,
    #[serde(rename = "TLSV1_0")]
    V1_0,
    #[serde(rename = "TLSV1_1")]
    V1_1,
    #[serde(rename = "TLSV1_2")]
    V1_2,
    #[serde(rename = "TLSV1_3")]
    V1_3,
}

impl Version {
    fn check(self, default: TlsVersion) -> Checked<TlsVersion> {
        match self {
            Self::Auto => Ok(default),
            Self::V1_2 => Ok(TlsVersion::V1_2),
            Self::V1_3 => Ok(TlsVersion::V1_3),
            Self::V1_0 | Self::V1_1 => {
                Err(FieldError::new("", "TLS before 1.2 is not spoken: it is not safe any more"))
            }
        }
    }
}

impl Wire {
    /// Of a plain port: whether everybody is sent to HTTPS. Nothing else has a meaning there.
    pub fn check_plain(self) -> Checked<bool> {
        let redirects = self.https_redirect;
        match self.given().next() {
            Some(field) => {
                Err(FieldError::new(field, "only httpsRedirect has a meaning on a plain HTTP port"))
            }
            None => Ok(redirects),
        }
    }

    /// Of a port of TLS.
    pub fn check(self) -> Checked<Tls> {
        let refused = |field: &str, message: &str| Err(FieldError::new(field, message));
        if self.https_redirect {
            return refused(
                "httpsRedirect",
                "means nothing where TLS is spoken: write it for the plain HTTP port",
            );
        }
        let mode = match self.mode.unwrap_or(Mode::PassThrough) {
            Mode::AutoPassthrough => return refused("mode", "AUTO_PASSTHROUGH is not supported yet"),
            Mode::PassThrough => {
                return match self.given().find(|field| *field != "mode") {
                    Some(field) => refused(field, "means nothing where the mode is PASSTHROUGH"),
                    None => Ok(Tls::PassThrough),
                };
            }
            Mode::Simple => ServerTlsMode::Simple,
            Mode::Mutual => ServerTlsMode::Mutual,
            Mode::OptionalMutual => ServerTlsMode::OptionalMutual,
            Mode::IstioMutual => ServerTlsMode::IstioMutual,
        };
        let (least, most) = self.versions()?;
        let ciphers = ciphers(&self.cipher_suites)?;
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        let files = [
            ("serverCertificate", self.server_certificate),
            ("privateKey", self.private_key),
            ("caCertificates", self.ca_certificates),
            ("caCrl", self.ca_crl),
        ];
        let files = files.into_iter().filter_map(|(field, path)| Some((field, filled(path)?.into())));
        let terms = Terms {
            mode,
            credential: filled(self.credential_name),
            files: files.collect(),
            names: self.subject_alt_names.iter().map(|name| name.as_str().into()).collect(),
            least,
            most,
            ciphers,
        };
        terms.check()?;
        Ok(Tls::Ends(terms))
    }

    /// The fields that say something, but for `httpsRedirect`.
    fn given(&self) -> impl Iterator<Item = &'static str> {
        let filled = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        let all = [
            ("mode", self.mode.is_some()),
            ("credentialName", filled(&self.credential_name)),
            ("serverCertificate", filled(&self.server_certificate)),
            ("privateKey", filled(&self.private_key)),
            ("caCertificates", filled(&self.ca_certificates)),
            ("caCrl", filled(&self.ca_crl)),
            ("subjectAltNames", !self.subject_alt_names.is_empty()),
            ("minProtocolVersion", self.min_protocol_version.is_some_and(|version| version != Version::Auto)),
            ("maxProtocolVersion", self.max_protocol_version.is_some_and(|version| version != Version::Auto)),
            ("cipherSuites", !self.cipher_suites.is_empty()),
        ];
        all.into_iter().filter(|(_, given)| *given).map(|(field, _)| field)
    }

    fn versions(&self) -> Checked<(TlsVersion, TlsVersion)> {
        let version = |field, written: Option<Version>, default| {
            written.unwrap_or(Version::Auto).check(default).map_err(under(field))
        };
        let least = version("minProtocolVersion", self.min_protocol_version, TlsVersion::V1_2)?;
        let most = version("maxProtocolVersion", self.max_protocol_version, TlsVersion::V1_3)?;
        if least > most {
            return Err(FieldError::new(
                "minProtocolVersion",
                "is above maxProtocolVersion: no version is left",
            ));
        }
        Ok((least, most))
    }
}

fn ciphers(written: &[String]) -> Checked<Vec<SupportedCipherSuite>> {
    let mut ciphers = Vec::new();
    for (i, name) in written.iter().enumerate() {
        let wrong = |why: String| item("cipherSuites", i)(FieldError::new("", why));
        let known = CIPHERS.iter().find(|(known, _)| known == name);
        let Some((_, suite)) = known else {
            let all = CIPHERS.map(|(name, _)| name).join(", ");
            return Err(wrong(format!("{name:?} is not spoken; those of TLS 1.2 that are: {all}")));
        };
        if ciphers.contains(suite) {
            return Err(wrong(format!("{name} is there already")));
        }
        ciphers.push(*suite);
    }
    if !ciphers.is_empty() {
        ciphers.extend(OF_TLS13);
    }
    Ok(ciphers)
}

impl Terms {
    /// What this field names, if anything.
    pub fn file(&self, field: &str) -> Option<&Arc<str>> {
        self.files.iter().find(|(other, _)| *other == field).map(|(_, path)| path)
    }

    /// Whether clients are asked who they are, and authorities of theirs are named.
    pub fn asks_clients(&self) -> bool {
        matches!(self.mode, ServerTlsMode::Mutual | ServerTlsMode::OptionalMutual)
    }

    fn check(&self) -> Checked<()> {
        let refused = |field: &str, message: &str| Err(FieldError::new(field, message));
        let file = self.files.first().map(|(field, _)| *field);
        let credential = self.credential.as_ref().map(|_| "credentialName");
        if self.mode == ServerTlsMode::IstioMutual {
            return match credential.or(file) {
                Some(field) => {
                    refused(field, "ISTIO_MUTUAL shows the pod's own certificate and believes the mesh's")
                }
                None if self.most < TlsVersion::V1_3 => {
                    refused("maxProtocolVersion", "ISTIO_MUTUAL is spoken by TLS 1.3 alone")
                }
                None if !self.ciphers.is_empty() => refused("cipherSuites", "ISTIO_MUTUAL has its own"),
                None => Ok(()),
            };
        }
        if !self.asks_clients() && !self.names.is_empty() {
            return refused(
                "subjectAltNames",
                "means nothing where the mode is SIMPLE: clients are not asked who they are",
            );
        }
        if let Some(name) = &self.credential {
            dns_name(name).map_err(under("credentialName"))?;
            return match file {
                Some(field) => {
                    refused(field, "is in the Secret already that credentialName names; write one of the two")
                }
                None => Ok(()),
            };
        }
        let asked =
            [("serverCertificate", true), ("privateKey", true), ("caCertificates", self.asks_clients())];
        for (field, asked) in asked {
            match self.file(field) {
                None if asked && file.is_none() => {
                    return refused("credentialName", "is required where no files are named");
                }
                None if asked => {
                    return refused(field, "is required where no Secret is named by credentialName");
                }
                _ => {}
            }
        }
        let roots = ["caCertificates", "caCrl"].into_iter().find(|field| self.file(field).is_some());
        match roots.filter(|_| !self.asks_clients()) {
            Some(field) => {
                refused(field, "means nothing where the mode is SIMPLE: clients are not asked who they are")
            }
            None => Ok(()),
        }
    }
}
