//! Mutual TLS 1.3 of the pair, with the cryptography of the agent.

use std::{path::Path, sync::Arc};

use anyhow::{Context as _, Result};
use lab::peer::Credulous;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::Resumption,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const ALPN: &[u8] = b"h2";

/// What a certificate and its key are read from, and who is believed.
struct Files {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

impl Files {
    fn read(dir: &Path) -> Result<Self> {
        let certificates = |name: &str| {
            let path = dir.join(name);
            let read = CertificateDer::pem_file_iter(&path)?.collect::<Result<Vec<_>, _>>();
            read.with_context(|| format!("reading {}", path.display()))
        };
        let mut roots = RootCertStore::empty();
        for root in certificates("ca.pem")? {
            roots.add(root)?;
        }
        let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).context("reading key.pem")?;
        Ok(Self { chain: certificates("cert.pem")?, key, roots: Arc::new(roots) })
    }
}

/// Shows its certificate, and believes a server with one of the same root.
pub fn connector(dir: &Path) -> Result<TlsConnector> {
    let Files { chain, key, roots } = Files::read(dir)?;
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let config = config.with_protocol_versions(&[&TLS13])?.with_root_certificates(roots);
    let mut config = config.with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Shows its certificate, and believes every server; no session is kept.
pub fn believer(dir: &Path, alpn: &[u8]) -> Result<Arc<ClientConfig>> {
    let certificates = CertificateDer::pem_file_iter(dir.join("cert.pem"))?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).context("reading key.pem")?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_protocol_versions(&[&TLS13])?;
    let config = config.dangerous().with_custom_certificate_verifier(Arc::new(Credulous(provider)));
    let mut config = config.with_client_auth_cert(certificates, key)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The same from the other side: a client without a certificate is refused.
pub fn acceptor(dir: &Path) -> Result<TlsAcceptor> {
    let Files { chain, key, roots } = Files::read(dir)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build()?;
    let config = ServerConfig::builder_with_provider(provider).with_protocol_versions(&[&TLS13])?;
    let mut config = config.with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
