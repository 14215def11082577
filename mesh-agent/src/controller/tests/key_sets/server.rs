//! A server of key sets, which answers as it is told.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{Response, header::LOCATION};
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::PrivatePkcs8KeyDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

/// A key set with one key of this name.
pub fn keys(name: &str) -> String {
    let x = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";
    format!(r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","kid":"{name}","x":"{x}"}}]}}"#)
}

#[derive(Clone)]
enum Answer {
    Text(u16, String),
    Redirect(String),
}

#[derive(Default)]
struct Shared {
    answers: Mutex<HashMap<String, Answer>>,
    connections: AtomicUsize,
}

pub struct Server {
    shared: Arc<Shared>,
    base: String,
    port: u16,
}

impl Server {
    pub async fn start() -> Self {
        Self::listen(None).await
    }

    /// One with TLS for `localhost`, and its root as PEM.
    pub async fn start_tls() -> (Self, String) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let tls = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        (Self::listen(Some(TlsAcceptor::from(Arc::new(tls)))).await, made.cert.pem())
    }

    async fn listen(tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let base = if tls.is_some() {
            format!("https://localhost:{port}")
        } else {
            format!("http://127.0.0.1:{port}")
        };
        let shared = Arc::new(Shared::default());
        let served = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                served.connections.fetch_add(1, Ordering::Relaxed);
                let (shared, tls) = (Arc::clone(&served), tls.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serve(shared, stream).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(shared, stream).await;
                            }
                        }
                    }
                });
            }
        });
        Self { shared, base, port }
    }

    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    pub const fn port(&self) -> u16 {
        self.port
    }

    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    pub fn answer(&self, path: &str, status: u16, body: &str) {
        let answer = Answer::Text(status, body.to_owned());
        self.shared.answers.lock().unwrap().insert(path.to_owned(), answer);
    }

    pub fn redirect(&self, path: &str, to: &str) {
        self.shared.answers.lock().unwrap().insert(path.to_owned(), Answer::Redirect(to.to_owned()));
    }
}

/// Its end is the client's affair. A path that nothing is said of is never answered.
async fn serve<S>(shared: Arc<Shared>, stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let answer = service_fn(async |request: http::Request<hyper::body::Incoming>| {
        let found = shared.answers.lock().unwrap().get(request.uri().path()).cloned();
        let response = match found {
            None => std::future::pending().await,
            Some(Answer::Text(status, body)) => {
                Response::builder().status(status).body(Full::new(Bytes::from(body)))
            }
            Some(Answer::Redirect(to)) => {
                Response::builder().status(302).header(LOCATION, to).body(Full::default())
            }
        };
        Ok::<_, Infallible>(response.unwrap())
    });
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
}
