//! `tunnel` of a DestinationRule: bytes go through the endpoint, an HTTP proxy, to the rule's target, once the proxy has agreed;
//! wherever the proxy is, and however it is asked.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Result, ensure};
use futures_util::TryStreamExt as _;
use http_body_util::{BodyDataStream, BodyExt as _, Either, Empty, StreamBody};
use hyper::{
    Method, Request, Response, StatusCode, Version,
    body::{Bytes, Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use lab::{
    Pair, Pod,
    apps::{self, RawEnd},
    eventually, metric, peer, require_root,
};
use rustls::pki_types::{PrivateKeyDer, pem::PemObject as _};
use tokio::{io::copy_bidirectional, net::TcpStream, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_util::io::{ReaderStream, StreamReader};

const ECHO: u16 = 9000;
const PROXY: u16 = 3128;
/// Where TLS is in front of it.
const TLS: u16 = 3129;
const TCP: u16 = 80;

/// Who has these as targets is refused.
const REFUSED: &str = "refused.example:1";
const TARGET: &str = "target.example:7000";

/// Method, target and version.
type Asked = (Method, String, Version);

/// An HTTP proxy in a pod, whose targets are all the echo of that pod.
struct Proxy {
    asked: Arc<Mutex<Vec<Asked>>>,
    _serving: JoinSet<()>,
}

impl Proxy {
    fn start(pod: &Pod) -> Result<Self> {
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let (of_pod, told) = (pod.clone(), Arc::clone(&asked));
        let serving = pod.serve_own(PROXY, move |stream| serve(stream, of_pod.clone(), Arc::clone(&told)))?;
        Ok(Self { asked, _serving: serving })
    }

    /// Everything since the last time.
    fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.asked.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn serve(stream: TcpStream, pod: Pod, told: Arc<Mutex<Vec<Asked>>>) {
    let answer = service_fn(move |request| {
        let answer = answer(request, &pod, &told);
        async move { Ok::<_, Infallible>(answer) }
    });
    // What is wrong with one shows at the client, whose bytes do not come back.
    let _ = auto::Builder::new(TokioExecutor::new())
        .serve_connection_with_upgrades(TokioIo::new(stream), answer)
        .await;
}

type Answer = Response<Either<Empty<Bytes>, http_body_util::combinators::BoxBody<Bytes, std::io::Error>>>;

fn answer(mut request: Request<Incoming>, pod: &Pod, told: &Mutex<Vec<Asked>>) -> Answer {
    let host = request.headers().get("host").and_then(|host| host.to_str().ok());
    let target =
        request.uri().authority().map_or_else(|| host.unwrap_or_default().to_owned(), ToString::to_string);
    let is_refused = target == REFUSED;
    let asked = (request.method().clone(), target, request.version());
    told.lock().unwrap_or_else(PoisonError::into_inner).push(asked);
    let echo = peer::dial(pod, SocketAddr::from((Ipv4Addr::LOCALHOST, ECHO)));
    let (false, Ok(mut echo)) = (is_refused, echo) else {
        let mut refusal = Response::new(Either::Left(Empty::new()));
        *refusal.status_mut() = StatusCode::FORBIDDEN;
        return refusal;
    };
    if request.method() == Method::CONNECT {
        tokio::spawn(async move {
            if let Ok(bytes) = hyper::upgrade::on(&mut request).await {
                let _ = copy_bidirectional(&mut TokioIo::new(bytes), &mut echo).await;
            }
        });
        return Response::new(Either::Left(Empty::new()));
    }
    let (back, mut to) = echo.into_split();
    tokio::spawn(async move {
        let body = BodyDataStream::new(request.into_body()).map_err(std::io::Error::other);
        tokio::io::copy(&mut StreamReader::new(body), &mut to).await
    });
    let body = StreamBody::new(ReaderStream::new(back).map_ok(Frame::data));
    Response::new(Either::Right(body.boxed()))
}

fn rule(host: &str, ask: &str, target: &str, version: Version) -> String {
    rule_with(host, ask, target, version, "")
}

/// The same, with more of a `trafficPolicy`.
fn rule_with(host: &str, ask: &str, target: &str, version: Version, more: &str) -> String {
    let (name, port) = target.split_once(':').unwrap_or_default();
    let upgrade = if version == Version::HTTP_2 { "UPGRADE" } else { "DEFAULT" };
    format!(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: {host}, namespace: default }}
spec:
  host: {host}
  trafficPolicy:
    connectionPool: {{ http: {{ h2UpgradePolicy: {upgrade} }}, tcp: {{ connectTimeout: 0.5s }} }}
    {more}
    tunnel: {{ protocol: {ask}, targetHost: {name}, targetPort: {port} }}
"
    )
}

#[tokio::test]
async fn bytes_go_through_a_proxy_that_has_agreed() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("proxied").await?;
    let out = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    let near = pair.a.pod("near").label("app", "near").start().await?;
    for (name, pod) in [("out", &out), ("far", &far), ("near", &near)] {
        pod.serve(apps::tcp_echo(ECHO)).await?;
        let proxy = Proxy::start(pod)?;
        let service = pair.lab.service(name).selector("app", name).port("tcp", TCP, PROXY).apply()?;
        pair.settled().await?;
        if name != "out" {
            pod.enrolled().await?;
        }
        let at = service.at(TCP);
        for (ask, method) in [("CONNECT", Method::CONNECT), ("POST", Method::POST)] {
            for version in [Version::HTTP_11, Version::HTTP_2] {
                pair.apply("rule.yaml", &rule(name, ask, TARGET, version)).await?;
                let bytes = pair.client.tcp(at, 300_000, &[]).await?;
                ensure!(bytes.intact && bytes.received == 300_000, "{name} {ask} {version:?}: {bytes:?}");
                let asked = proxy.asked();
                ensure!(asked == [(method.clone(), TARGET.to_owned(), version)], "{name}: {asked:?}");

                pair.apply("rule.yaml", &rule(name, ask, REFUSED, version)).await?;
                let refused = pair.client.raw(at).send("a").expect("a").run().await?;
                ensure!(refused.received.0.is_empty(), "{name} {ask} {version:?}: {refused:?}");
                ensure!(matches!(refused.end, RawEnd::Closed | RawEnd::Reset), "{name}: {refused:?}");
                let asked = proxy.asked();
                ensure!(asked == [(method.clone(), REFUSED.to_owned(), version)], "{name}: {asked:?}");
            }
        }
    }
    is_logged(&pair, &format!("(POST {REFUSED}): it answers 403 Forbidden")).await?;
    pair.finish().await
}

/// What was chosen on each connection.
type Spoken = Arc<Mutex<Vec<String>>>;

/// Begins TLS in front of the proxy, for whoever comes; gives what is to be spoken in it (ALPN).
fn front(pod: &Pod) -> Result<(JoinSet<()>, Spoken)> {
    let key = rcgen::KeyPair::generate()?;
    let certificate = rcgen::CertificateParams::new(vec!["proxy".to_owned()])?.self_signed(&key)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            PrivateKeyDer::from_pem_slice(key.serialize_pem().as_bytes())?,
        )?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let spoken = Spoken::default();
    let (told, of_pod) = (Arc::clone(&spoken), pod.clone());
    let serving = pod.serve_own(TLS, move |stream| {
        let (acceptor, pod, told) = (acceptor.clone(), of_pod.clone(), Arc::clone(&told));
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else { return };
            let alpn = stream.get_ref().1.alpn_protocol().map(String::from_utf8_lossy);
            told.lock().unwrap_or_else(PoisonError::into_inner).push(alpn.unwrap_or_default().into_owned());
            if let Ok(mut proxy) = peer::dial(&pod, (Ipv4Addr::LOCALHOST, PROXY).into()) {
                let _ = copy_bidirectional(&mut stream, &mut proxy).await;
            }
        }
    })?;
    Ok((serving, spoken))
}

#[tokio::test]
async fn what_is_spoken_with_a_proxy_is_said_in_tls() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("proxied-tls").await?;
    let out = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    out.serve(apps::tcp_echo(ECHO)).await?;
    let proxy = Proxy::start(&out)?;
    let (serving, spoken) = front(&out)?;
    let service = pair.lab.service("out").selector("app", "out").port("tcp", TCP, TLS).apply()?;
    let tls = "tls: { mode: SIMPLE, sni: proxy, insecureSkipVerify: true }";
    for (ask, method) in [("CONNECT", Method::CONNECT), ("POST", Method::POST)] {
        for (version, alpn) in [(Version::HTTP_11, "http/1.1"), (Version::HTTP_2, "h2")] {
            pair.apply("rule.yaml", &rule_with("out", ask, TARGET, version, tls)).await?;
            let bytes = pair.client.tcp(service.at(TCP), 100_000, &[]).await?;
            ensure!(bytes.intact && bytes.received == 100_000, "{ask} {version:?}: {bytes:?}");
            let asked = proxy.asked();
            ensure!(asked == [(method.clone(), TARGET.to_owned(), version)], "{asked:?}");
            let spoken = std::mem::take(&mut *spoken.lock().unwrap_or_else(PoisonError::into_inner));
            ensure!(spoken == [alpn], "{ask} {version:?}: {spoken:?}");
        }
    }
    drop(serving);
    pair.finish().await
}

/// Who may ask the proxy for what is the proxy's own policy, which sees the request.
const CONNECT_ALONE: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: proxies, namespace: default }
spec:
  selector: { matchLabels: { role: proxy } }
  action: ALLOW
  rules: [{ to: [{ operation: { methods: [CONNECT] } }] }]
";

#[tokio::test]
async fn a_proxy_is_asked_as_its_policies_permit() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("proxied-policy").await?;
    let far = pair.b.pod("far").label("app", "far").label("role", "proxy").start().await?;
    let near = pair.a.pod("near").label("app", "near").label("role", "proxy").start().await?;
    pair.apply("policy.yaml", CONNECT_ALONE).await?;
    for (name, pod) in [("far", &far), ("near", &near)] {
        pod.serve(apps::tcp_echo(ECHO)).await?;
        let proxy = Proxy::start(pod)?;
        let service = pair.lab.service(name).selector("app", name).port("tcp", TCP, PROXY).apply()?;
        pair.apply("rule.yaml", &rule(name, "CONNECT", TARGET, Version::HTTP_11)).await?;
        pod.enrolled().await?;
        let bytes = pair.client.tcp(service.at(TCP), 100_000, &[]).await?;
        ensure!(bytes.intact && bytes.received == 100_000, "{name}: {bytes:?}");
        ensure!(proxy.asked().len() == 1, "{name}");
        pair.apply("rule.yaml", &rule(name, "POST", TARGET, Version::HTTP_11)).await?;
        let refused = pair.client.raw(service.at(TCP)).send("a").expect("a").run().await?;
        ensure!(refused.received.0.is_empty(), "{name}: {refused:?}");
        ensure!(proxy.asked().is_empty(), "{name}: it was asked all the same");
    }
    pair.finish().await
}

#[tokio::test]
async fn a_silent_proxy_is_given_up() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("proxied-silence").await?;
    let out = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    // Connections come about, and nobody reads them.
    let listener = out.netns().inside(|| Ok(std::net::TcpListener::bind(("0.0.0.0", PROXY))?))?;
    let service = pair.lab.service("out").selector("app", "out").port("tcp", TCP, PROXY).apply()?;
    for ask in ["CONNECT", "POST"] {
        pair.apply("rule.yaml", &rule("out", ask, TARGET, Version::HTTP_11)).await?;
        let refused = pair.client.raw(service.at(TCP)).send("a").expect("a").run().await?;
        ensure!(matches!(refused.end, RawEnd::Closed | RawEnd::Reset), "{ask}: {refused:?}");
        is_logged(&pair, &format!("({ask} {TARGET}): nothing within 500ms")).await?;
    }
    drop(listener);
    pair.finish().await
}

/// Twice in a row, and longer than the test takes.
const EJECTED: &str = "outlierDetection: { consecutive5xxErrors: 2, interval: 100ms, baseEjectionTime: 1h, \
                       maxEjectionPercent: 100, minHealthPercent: 0 }";

#[tokio::test]
async fn a_proxy_that_refuses_is_ejected() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("proxied-ejected").await?;
    let out = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    out.serve(apps::tcp_echo(ECHO)).await?;
    let proxy = Proxy::start(&out)?;
    let service = pair.lab.service("out").selector("app", "out").port("tcp", TCP, PROXY).apply()?;
    for (asked, target) in [TARGET, REFUSED].into_iter().enumerate() {
        pair.apply("rule.yaml", &rule_with("out", "CONNECT", target, Version::HTTP_11, EJECTED)).await?;
        for _ in 0..4 {
            pair.client.raw(service.at(TCP)).send("a").expect("a").run().await?;
        }
        let labels =
            [("cluster", "outbound|80||out.default.svc.cluster.local"), ("reason", "consecutive_5xx")];
        let ejected = metric(&pair.agent_a.metrics().await?, "mesh_endpoint_ejections_total", &labels);
        let times = proxy.asked().len();
        ensure!((times, ejected) == ([4, 2][asked], [0.0, 1.0][asked]), "{target}: {times}, {ejected}");
    }
    pair.finish().await
}

/// A refusal that says this.
async fn is_logged(pair: &Pair, words: &str) -> Result<()> {
    eventually("the log", async || {
        let lines = pair.agent_a.access_log();
        let told = |line: &&String| line.contains(words) && line.contains("flags=UF");
        ensure!(lines.iter().any(|line| told(&line)), "{}", lines.join("\n"));
        Ok(())
    })
    .await
}
