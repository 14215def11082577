//! Fetching one key set.
//!
//! Promises: the address that was looked at is the one that is connected to; every redirect is a new fetch with the same
//! rules, and a few are followed; no more than a mebibyte is read, within the time that the rule gives; what comes back is a
//! key set. Sends nothing of the mesh's. Tested in `tests.rs` beside it.

mod address;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, Uri, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject as _};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, lookup_host},
};
use tokio_rustls::TlsConnector;

pub use self::address::Addresses;
use crate::state::snapshot::KeySet;

/// Largest document that is read, bytes: a hundred keys with their certificates are below 300 KiB.
const LARGEST: usize = 1 << 20;

/// How many redirects are followed.
const REDIRECTS: usize = 3;

/// Fetches key sets.
#[derive(Clone)]
pub struct Fetcher {
    addresses: Addresses,
    tls: Arc<ClientConfig>,
}

/// Why a key set is not there.
pub type Fetched = Result<Arc<KeySet>, String>;

impl Fetcher {
    /// One that believes the system's roots, and those of a PEM file.
    ///
    /// # Errors
    /// Where the file cannot be read or has no certificate, and where there are no roots at all.
    pub fn new(addresses: Addresses, more_roots: Option<&PathBuf>) -> io::Result<Self> {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(system.certs);
        if let Some(file) = more_roots {
            let bad =
                |error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", file.display()));
            let before = roots.len();
            for certificate in CertificateDer::pem_file_iter(file).map_err(|error| bad(&error))? {
                let certificate = certificate.map_err(|error| bad(&error))?;
                roots.add(certificate).map_err(|error| bad(&error))?;
            }
            if roots.len() == before {
                return Err(bad(&"it holds no certificate"));
            }
        }
        let tls = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?;
        let tls = Arc::new(tls.with_root_certificates(roots).with_no_client_auth());
        Ok(Self { addresses, tls })
    }

    /// The key set at a URI, within this time.
    ///
    /// # Errors
    /// What failed, in words.
    pub async fn fetch(&self, uri: &str, timeout: Duration) -> Fetched {
        match tokio::time::timeout(timeout, self.follow(uri)).await {
            Ok(fetched) => fetched,
            Err(_) => Err(format!("it was not there within {timeout:?}")),
        }
    }

    async fn follow(&self, uri: &str) -> Fetched {
        let mut uri: Uri = uri.parse().map_err(|error| format!("it is no URI: {error}"))?;
        for _ in 0..=REDIRECTS {
            let response = self.get(&uri).await?;
            let status = response.status();
            if status.is_redirection() {
                uri = redirected(&uri, &response)?;
                continue;
            }
            if status != http::StatusCode::OK {
                return Err(format!("{uri} answered {status}"));
            }
            let body = Limited::new(response.into_body(), LARGEST).collect().await;
            let body = body.map_err(|error| format!("reading {uri} (at most {LARGEST} bytes): {error}"))?;
            let text = String::from_utf8(body.to_bytes().into()).map_err(|_| format!("{uri} is no text"))?;
            return KeySet::parse(&text).map(Arc::new).map_err(|why| format!("{uri} {why}"));
        }
        Err(format!("more than {REDIRECTS} redirects, the last to {uri}"))
    }

    async fn get(&self, uri: &Uri) -> Result<Response<Incoming>, String> {
        let (host, port, secure) = place(uri)?;
        let stream = self.connect(host, port).await?;
        let request = Request::get(uri.path_and_query().map_or("/", |target| target.as_str()))
            .header(header::HOST, uri.authority().map_or(host, |authority| authority.as_str()))
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, "mesh-agent")
            .body(Empty::<Bytes>::new())
            .map_err(|error| format!("{uri}: {error}"))?;
        if !secure {
            return send(stream, request).await.map_err(|error| format!("{uri}: {error}"));
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| format!("{host:?} is not a host"))?;
        let tls = TlsConnector::from(Arc::clone(&self.tls)).connect(name, stream).await;
        let tls = tls.map_err(|error| format!("the TLS handshake with {host}:{port} failed: {error}"))?;
        send(tls, request).await.map_err(|error| format!("{uri}: {error}"))
    }

    /// A connection to the first address that may be fetched from and answers.
    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, String> {
        let found = lookup_host((host, port)).await.map_err(|error| format!("resolving {host}: {error}"))?;
        let mut why = format!("{host} has no address");
        for address in found {
            if let Some(refused) = self.addresses.refuses(address.ip()) {
                why = format!("{host} is at {}, from where nothing is fetched: {refused}", address.ip());
                continue;
            }
            match dial(address).await {
                Ok(stream) => return Ok(stream),
                Err(error) => why = format!("connecting to {host} at {address}: {error}"),
            }
        }
        Err(why)
    }
}

async fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    TcpStream::connect(address).await
}

/// Host, port, and whether it is TLS.
fn place(uri: &Uri) -> Result<(&str, u16, bool), String> {
    let secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        _ => return Err(format!("{uri} is not an http or https URI")),
    };
    let host = uri.host().ok_or_else(|| format!("{uri} names no host"))?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    Ok((host, uri.port_u16().unwrap_or(if secure { 443 } else { 80 }), secure))
}

async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> hyper::Result<Response<Incoming>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with the response, or with who waits for it.
    tokio::spawn(connection);
    sender.send_request(request).await
}

/// Where a redirect leads: never from TLS to none.
fn redirected(from: &Uri, response: &Response<Incoming>) -> Result<Uri, String> {
    let location = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
    let location = location.ok_or_else(|| format!("{from} redirects to nowhere"))?;
    let bad = || format!("{from} redirects to {location:?}");
    let to: Uri = location.parse().map_err(|_| bad())?;
    let mut parts = to.into_parts();
    if parts.authority.is_none() {
        (parts.scheme, parts.authority) = (from.scheme().cloned(), from.authority().cloned());
    }
    let to = Uri::from_parts(parts).map_err(|_| bad())?;
    if from.scheme_str() == Some("https") && to.scheme_str() != Some("https") {
        return Err(format!("{from} redirects to {to}, which is not https"));
    }
    Ok(to)
}
