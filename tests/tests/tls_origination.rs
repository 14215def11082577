//! `tls` of a DestinationRule: the agent begins TLS towards what is outside the mesh, for apps that know nothing of it, and
//! never speaks in the clear where it should; what is in the mesh stays with the mesh's own TLS.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, apps, metric, peer,
    pki::{Authority, put},
    require_root,
};
use rcgen::{CertificateParams, Issuer, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::aws_lc_rs::default_provider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::json;
use tokio::{io::copy_bidirectional, net::TcpStream, task::JoinSet};
use tokio_rustls::TlsAcceptor;

const APP: u16 = 8080;
const ECHO: u16 = 9000;
/// Where TLS is in front of the app, and of the echo.
const TLS_APP: u16 = 8443;
const TLS_ECHO: u16 = 9443;

/// Serial number of every certificate made here.
const SERIAL: u64 = 7;

const HTTP: u16 = 80;
const HTTP2: u16 = 81;
const TCP: u16 = 82;

/// A certificate for a name and its key, in PEM.
fn leaf(authority: &Authority, name: &str) -> Result<(String, String)> {
    let issuer = Issuer::from_ca_cert_pem(&authority.certificate, KeyPair::from_pem(&authority.key)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.serial_number = Some(SERIAL.into());
    let certificate = params.signed_by(&key, &issuer)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

/// What a server knows of its clients: the name it was asked for by, what is spoken, whether a certificate was shown.
type Seen = (Option<String>, Option<String>, bool);

/// Ends TLS in a pod, and hands what is inside to a port of the pod.
struct Front {
    seen: Arc<Mutex<Vec<Seen>>>,
    _serving: Vec<JoinSet<()>>,
}

impl Front {
    fn start(pod: &Pod, ports: &[(u16, u16)], shown: &(String, String), clients: &Authority) -> Result<Self> {
        let provider = Arc::new(default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(clients.certificate.as_bytes())?)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from_pem_slice(shown.0.as_bytes())?],
                PrivateKeyDer::from_pem_slice(shown.1.as_bytes())?,
            )?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let (acceptor, seen) = (TlsAcceptor::from(Arc::new(config)), Arc::<Mutex<Vec<Seen>>>::default());
        let mut serving = Vec::new();
        for &(port, behind) in ports {
            let (of_pod, acceptor, seen) = (pod.clone(), acceptor.clone(), Arc::clone(&seen));
            serving.push(pod.serve_own(port, move |stream| {
                let (pod, acceptor, seen) = (of_pod.clone(), acceptor.clone(), Arc::clone(&seen));
                // What is refused, the tests look at from the other side.
                async move { drop(serve(&pod, stream, &acceptor, behind, &seen).await) }
            })?);
        }
        Ok(Self { seen, _serving: serving })
    }

    /// Everything since the last time.
    fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn serve(
    pod: &Pod,
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    behind: u16,
    seen: &Mutex<Vec<Seen>>,
) -> Result<()> {
    let mut stream = acceptor.accept(stream).await?;
    let session = stream.get_ref().1;
    let alpn = session.alpn_protocol().map(|alpn| String::from_utf8_lossy(alpn).into_owned());
    let of_client = (session.server_name().map(str::to_owned), alpn, session.peer_certificates().is_some());
    seen.lock().unwrap_or_else(PoisonError::into_inner).push(of_client);
    let mut app = peer::dial(pod, ([127, 0, 0, 1], behind).into())?;
    copy_bidirectional(&mut stream, &mut app).await?;
    Ok(())
}

fn rule(host: &str, tls: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: {host}, namespace: default }}
spec: {{ host: {host}, trafficPolicy: {{ tls: {{ {tls} }} }} }}
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {{ name: {host}, namespace: default }}
spec: {{ hosts: [{host}], http: [{{ retries: {{ attempts: 0 }}, route: [{{ destination: {{ host: {host} }} }}] }}] }}
"
    )
}

/// Secrets as `kubectl create secret` makes them.
fn secrets(root: &Authority, other: &Authority, shown: &(String, String)) -> String {
    let secret = |name: &str, data: serde_json::Value| {
        json!({ "apiVersion": "v1", "kind": "Secret", "metadata": { "name": name, "namespace": "default" },
                "stringData": data })
        .to_string()
    };
    [
        secret("roots", json!({ "ca.crt": root.certificate })),
        secret("others", json!({ "ca.crt": other.certificate })),
        secret("client", json!({ "ca.crt": root.certificate, "tls.crt": shown.0, "tls.key": shown.1 })),
    ]
    .join("\n---\n")
}

/// A pod outside the mesh with an app and an echo, both with TLS in front of them too.
async fn outside(pair: &Pair) -> Result<Pod> {
    let pod = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    pod.serve(apps::http(APP)).await?;
    pod.serve(apps::tcp_echo(ECHO)).await?;
    Ok(pod)
}

#[tokio::test]
async fn apps_that_know_no_tls_reach_servers_that_know_nothing_else() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("originate").await?;
    let (root, other) = (Authority::root("server")?, Authority::root("other")?);
    let pod = outside(&pair).await?;
    let ports = [(TLS_APP, APP), (TLS_ECHO, ECHO)];
    let front = Front::start(&pod, &ports, &leaf(&root, "shop.example")?, &other)?;
    let service = pair.lab.service("out").selector("app", "out");
    let service =
        service.port("http", HTTP, TLS_APP).port("http2", HTTP2, TLS_APP).port("tcp", TCP, TLS_ECHO);
    let service = service.apply()?;
    pair.apply("secrets.yaml", &secrets(&root, &other, &leaf(&other, "client.example")?)).await?;
    let name = Some("shop.example".to_owned());

    pair.apply("rule.yaml", &rule("out", "mode: SIMPLE, sni: shop.example, credentialName: roots")).await?;
    for (port, version, alpn) in [(HTTP, "HTTP/1.1", "http/1.1"), (HTTP2, "HTTP/2.0", "h2")] {
        for times in [1, 2] {
            let answer = pair.client.http_get(&service.url(port, "/"), &[]).await?;
            ensure!(answer.status == 200, "{answer:?}");
            let echo = answer.echo()?;
            ensure!((&*echo.version, echo.request) == (version, times), "{echo:?}");
        }
        // Both requests over one connection.
        ensure!(front.seen() == [(name.clone(), Some(alpn.to_owned()), false)], "{:?}", front.seen());
    }
    let bytes = pair.client.tcp(service.at(TCP), 100_000, &[]).await?;
    ensure!(bytes.intact && bytes.received == 100_000, "{bytes:?}");
    ensure!(front.seen() == [(name.clone(), None, false)]);

    // Who asks for more is shown more.
    pair.apply("rule.yaml", &rule("out", "mode: MUTUAL, sni: shop.example, credentialName: client")).await?;
    ensure!(pair.client.http_get(&service.url(HTTP, "/"), &[]).await?.status == 200);
    ensure!(front.seen() == [(name, Some("http/1.1".to_owned()), true)], "a connection of another rule");

    // Another server than the rule means gets nothing.
    for tls in [
        "mode: SIMPLE, sni: shop.example, credentialName: others",
        "mode: SIMPLE, sni: bank.example, credentialName: roots",
        "mode: SIMPLE, sni: shop.example, credentialName: roots, subjectAltNames: [bank.example]",
        "mode: SIMPLE, sni: shop.example, credentialName: missing",
        "mode: ISTIO_MUTUAL",
    ] {
        pair.apply("rule.yaml", &rule("out", tls)).await?;
        let before = pod.stats(APP).await?.paths.get("/never").copied();
        let answer = pair.client.http_get(&service.url(HTTP, "/never"), &[]).await?;
        ensure!(answer.status == 502, "{tls}: {answer:?}");
        let after = pod.stats(APP).await?.paths.get("/never").copied();
        ensure!(before.is_none() && after.is_none(), "{tls}: the app has seen it");
        let dialled = pair.client.raw(service.at(TCP)).send("a").run().await?;
        ensure!(dialled.received.0.is_empty(), "{tls}: {dialled:?}");
    }
    let metrics = pair.agent_a.metrics().await?;
    let labels = [("response_flags", "TLS_FAILURE"), ("reporter", "source"), ("response_code", "502")];
    ensure!((metric(&metrics, "istio_requests_total", &labels) - 5.0).abs() < f64::EPSILON, "{metrics}");
    drop(front);
    pair.finish().await
}

#[tokio::test]
async fn where_tls_is_asked_for_nothing_is_said_in_the_clear() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("originateno").await?;
    let pod = outside(&pair).await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    far.serve(apps::http(APP)).await?;
    let service = pair.lab.service("out").selector("app", "out").port("http", HTTP, APP).apply()?;
    let in_mesh = pair.lab.service("far").selector("app", "far").port("http", HTTP, APP).apply()?;
    pair.settled().await?;
    far.enrolled().await?;
    ensure!(pair.client.http_get(&service.url(HTTP, "/"), &[]).await?.status == 200);
    let connections = pod.stats(APP).await?.connections;
    // The connection that is open already is no way around the rule.
    for tls in ["mode: SIMPLE, insecureSkipVerify: true", "mode: ISTIO_MUTUAL"] {
        pair.apply("rule.yaml", &rule("out", tls)).await?;
        let answer = pair.client.http_get(&service.url(HTTP, "/never"), &[]).await?;
        ensure!(answer.status == 502, "{tls}: {answer:?}");
    }
    let stats = pod.stats(APP).await?;
    ensure!(!stats.paths.contains_key("/never") && stats.connections == connections, "{stats:?}");

    // What is in the mesh is reached by its own TLS, whatever the rule says, and that is said.
    for tls in ["mode: DISABLE", "mode: SIMPLE", "mode: ISTIO_MUTUAL"] {
        pair.apply("rule.yaml", &rule("far", tls)).await?;
        let answer = pair.client.http_get(&in_mesh.url(HTTP, "/"), &[]).await?;
        ensure!(answer.status == 200, "{tls}: {answer:?}");
        let problems = pair.agent_a.config_dump().await?["problems"].to_string();
        let told = problems.contains("those in it are reached by its mutual TLS");
        ensure!(told == (tls != "mode: ISTIO_MUTUAL"), "{tls}: {problems}");
    }
    let host = in_mesh.host();
    let secured = |policy| {
        [("destination_service", &*host), ("reporter", "source"), ("connection_security_policy", policy)]
    };
    let metrics = pair.agent_a.metrics().await?;
    let count = |policy| metric(&metrics, "istio_requests_total", &secured(policy));
    ensure!((count("mutual_tls") - 3.0).abs() < f64::EPSILON && count("none") < 0.5, "{metrics}");
    pair.finish().await
}

#[tokio::test]
async fn certificates_in_files_are_followed_and_what_is_revoked_is_refused() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("originatefile").await?;
    let (root, other) = (Authority::root("server")?, Authority::root("other")?);
    let pod = outside(&pair).await?;
    let front = Front::start(&pod, &[(TLS_APP, APP)], &leaf(&root, "shop.example")?, &other)?;
    let service = pair.lab.service("out").selector("app", "out").port("http", HTTP, TLS_APP).apply()?;
    let certs = pair.lab.config_dir().join("certs");
    std::fs::create_dir(&certs)?;
    let shown = leaf(&other, "client.example")?;
    let none = root.revokes::<&str>(&[])?;
    for (name, content) in [
        ("ca.pem", &root.certificate),
        ("client.pem", &shown.0),
        ("client.key", &shown.1),
        ("crl.pem", &none),
    ] {
        put(&certs.join(name), content)?;
    }
    let files = "mode: MUTUAL, sni: shop.example, clientCertificate: certs/client.pem, privateKey: certs/client.key, \
                 caCertificates: certs/ca.pem, caCrl: certs/crl.pem";
    pair.apply("rule.yaml", &rule("out", files)).await?;
    let status =
        async || Ok::<_, anyhow::Error>(pair.client.http_get(&service.url(HTTP, "/"), &[]).await?.status);
    ensure!(status().await? == 200);
    let name = Some("shop.example".to_owned());
    let of_client = (name, Some("http/1.1".to_owned()), true);
    ensure!(front.seen() == std::slice::from_ref(&of_client));

    // What comes into a file later holds for what is asked next, over a new connection.
    let steps = [
        ("ca.pem", other.certificate.clone(), 502),
        ("ca.pem", root.certificate.clone(), 200),
        ("crl.pem", root.revokes(&["08"])?, 200),
        ("crl.pem", root.revokes(&["07"])?, 502),
        ("crl.pem", none.clone(), 200),
        ("client.key", other.key.clone(), 502),
        ("client.key", shown.1.clone(), 200),
    ];
    for (name, content, expected) in steps {
        put(&certs.join(name), &content)?;
        pair.settled().await?;
        let status = status().await?;
        ensure!(status == expected, "{name}: {status}");
        let seen = front.seen();
        ensure!(expected == 502 || seen == std::slice::from_ref(&of_client), "{name}: {seen:?}");
    }

    // What is not there, or not in the directory, is said, and nothing is asked of anybody.
    std::fs::remove_file(certs.join("crl.pem"))?;
    pair.settled().await?;
    ensure!(status().await? == 502);
    let problems = pair.agent_a.config_dump().await?["problems"].to_string();
    ensure!(problems.contains("certs/crl.pem") && problems.contains("is not there"), "{problems}");
    pair.apply("rule.yaml", &rule("out", "mode: SIMPLE, sni: shop.example, caCertificates: /etc/hosts"))
        .await?;
    ensure!(status().await? == 502);
    let problems = pair.agent_a.config_dump().await?["problems"].to_string();
    ensure!(problems.contains("is not inside"), "{problems}");
    drop(front);
    std::fs::remove_dir_all(&certs)?;
    pair.finish().await
}
