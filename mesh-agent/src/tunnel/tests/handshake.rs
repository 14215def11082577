//! Who gets through, and what those who do not are told.

use std::net::SocketAddr;

use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs::default_provider, verify_tls13_signature},
    server::WebPkiClientVerifier,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::identity::server_name;

type Fallible<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// An authority in files, so that a test can sign what the authority never would.
struct Forge {
    authority: Authority,
    issuer: Issuer<'static, KeyPair>,
    _dir: tempfile::TempDir,
}

impl Forge {
    fn new() -> Fallible<Self> {
        let dir = tempfile::tempdir()?;
        let authority = Authority::open(dir.path(), "cluster.local")?;
        let key = KeyPair::from_pem(&std::fs::read_to_string(dir.path().join("ca-key.pem"))?)?;
        let root = std::fs::read_to_string(dir.path().join("ca-cert.pem"))?;
        Ok(Self { authority, issuer: Issuer::from_ca_cert_pem(&root, key)?, _dir: dir })
    }

    fn leaf(&self, uris: &[&str], valid: [i64; 2]) -> Fallible<Leaf> {
        let mut params = CertificateParams::default();
        for uri in uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
        }
        let now = OffsetDateTime::now_utc();
        params.not_before = now + time::Duration::hours(valid[0]);
        params.not_after = now + time::Duration::hours(valid[1]);
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.issuer)?;
        Ok((vec![leaf.der().clone()], key.serialize_der().try_into()?))
    }
}

type Leaf = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Believes any server.
#[derive(Debug)]
struct Gullible(Arc<CryptoProvider>);

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn gullible(leaf: Option<Leaf>, alpn: &[&[u8]]) -> Fallible<ClientConfig> {
    let provider = Arc::new(default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible(provider)));
    let mut config = match leaf {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

/// What the server says to a client that believes anything.
async fn judged(server: &WorkloadIdentity, client: ClientConfig) -> Fallible<Result<(SpiffeId, Wire)>> {
    let (dialled, accepted) = sockets().await?;
    let dial = async {
        let mut tls = TlsConnector::from(Arc::new(client)).connect(server_name(POD), dialled).await?;
        // The server's verdict on our certificate comes after our handshake.
        tls.read_u8().await
    };
    let serve = async { accept(accepted, server).await.map(|accepted| (accepted.peer, accepted.wire)) };
    Ok(tokio::join!(dial, serve).1)
}

fn refused<T: std::fmt::Debug>(outcome: Result<T>, kind: Kind, words: &str) {
    match outcome {
        Err(error) => assert!(error.kind == kind && error.detail.contains(words), "{error}"),
        Ok(value) => panic!("accepted: {value:?}"),
    }
}

#[tokio::test]
async fn both_ends_know_each_other_on_either_wire() -> TestResult {
    let pair = Pair::new().await?;
    for wire in [Wire::MeshH2, Wire::Hbone] {
        let (dialled, accepted) = sockets().await?;
        let expected = [spiffe("other"), pair.server.id.clone()];
        let dial = async {
            match wire {
                Wire::MeshH2 => connect(dialled, &pair.client, &expected).await,
                Wire::Hbone => connect_tunnels(dialled, &pair.client, &expected).await,
            }
        };
        let (connection, accepted) = tokio::join!(dial, accept(accepted, &pair.server));
        let (connection, Accepted { tls, peer, wire: agreed, .. }) = (connection?, accepted?);
        assert_eq!((connection.wire, agreed), (wire, wire));
        assert_eq!((&connection.peer, &peer), (&pair.server.id, &pair.client.id));
        assert!(connection.is_open());
        let session = tls.get_ref().1;
        assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
        assert_eq!(session.server_name(), None, "SNI was sent");
    }
    Ok(())
}

#[tokio::test]
async fn a_server_that_is_somebody_else_is_left() -> TestResult {
    let pair = Pair::new().await?;
    let (dialled, accepted) = sockets().await?;
    let expected = [spiffe("other")];
    let (dial, serve) =
        tokio::join!(connect(dialled, &pair.client, &expected), accept(accepted, &pair.server));
    refused(
        dial,
        Kind::IdentityMismatch,
        "sa/server, expected was spiffe://cluster.local/ns/default/sa/other",
    );
    refused(serve.map(|_| ()), Kind::TlsFailure, "it refused our certificate");
    Ok(())
}

#[tokio::test]
async fn a_server_of_another_root_is_left() -> TestResult {
    let (ours, theirs) = (Pair::new().await?, Pair::new().await?);
    let (dialled, accepted) = sockets().await?;
    let expected = [theirs.server.id.clone()];
    let (dial, _) = tokio::join!(connect(dialled, &ours.client, &expected), accept(accepted, &theirs.server));
    refused(dial, Kind::TlsFailure, "not of this mesh's root");
    Ok(())
}

#[tokio::test]
async fn clients_are_let_in_by_certificate_alone() -> TestResult {
    const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
    let forge = Forge::new()?;
    let server = forge.authority.identity(&spiffe("server")).await?;
    let h2: &[&[u8]] = &[b"h2"];
    let good = judged(&server, gullible(Some(forge.leaf(&[CLIENT], [-1, 1])?), h2)?).await?;
    assert_eq!(good.map_err(|error| error.detail), Ok((spiffe("client"), Wire::Hbone)));

    let foreign = Forge::new()?.leaf(&[CLIENT], [-1, 1])?;
    for (leaf, words) in [
        (None, "no client certificate"),
        (Some(foreign), "not of this mesh's root"),
        (Some(forge.leaf(&[CLIENT], [-2, -1])?), "has expired"),
        (Some(forge.leaf(&[CLIENT], [1, 2])?), "not valid yet"),
        (Some(forge.leaf(&["spiffe://other.example/ns/a/sa/b"], [-1, 1])?), "another trust domain"),
        (Some(forge.leaf(&[CLIENT, "spiffe://cluster.local/ns/a/sa/b"], [-1, 1])?), "2 URI names"),
        (Some(forge.leaf(&[], [-1, 1])?), "0 URI names"),
        (Some(forge.leaf(&["https://example.com/"], [-1, 1])?), "not of the form"),
    ] {
        refused(judged(&server, gullible(leaf, h2)?).await?, Kind::Unauthenticated, words);
    }
    for alpn in [&[][..], &[b"http/1.1".as_slice()]] {
        let leaf = forge.leaf(&[CLIENT], [-1, 1])?;
        refused(judged(&server, gullible(Some(leaf), alpn)?).await?, Kind::TlsFailure, "neither ALPN");
    }
    Ok(())
}

#[tokio::test]
async fn an_expired_server_is_left() -> TestResult {
    let forge = Forge::new()?;
    let client = forge.authority.identity(&spiffe("client")).await?;
    let server = spiffe("server");
    let (chain, key) = forge.leaf(&[&server.to_string()], [-2, -1])?;
    let (dial, _) = dial_server(&client, &server, RootCertStore::empty(), (chain, key)).await?;
    refused(dial, Kind::TlsFailure, "has expired");
    Ok(())
}

/// Dials a server that asks for a client certificate of `believed` (none asked for when empty).
async fn dial_server(
    client: &WorkloadIdentity,
    server: &SpiffeId,
    believed: RootCertStore,
    (chain, key): Leaf,
) -> Fallible<(Result<MeshConnection>, Option<tokio::task::JoinHandle<()>>)> {
    let provider = Arc::new(default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?;
    let builder = if believed.is_empty() {
        builder.with_no_client_auth()
    } else {
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(believed), provider).build()?;
        builder.with_client_cert_verifier(verifier)
    };
    let mut config = builder.with_single_cert(chain, key)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    let (dialled, accepted) = sockets().await?;
    let serving = tokio::spawn(async move {
        let _ = TlsAcceptor::from(Arc::new(config)).accept(accepted).await;
    });
    Ok((connect_tunnels(dialled, client, std::slice::from_ref(server)).await, Some(serving)))
}

#[tokio::test]
async fn a_server_that_refuses_us_after_the_handshake_is_named() -> TestResult {
    let forge = Forge::new()?;
    let client = forge.authority.identity(&spiffe("client")).await?;
    let server = spiffe("server");
    let leaf = forge.leaf(&[&server.to_string()], [-1, 1])?;
    let mut believed = RootCertStore::empty();
    believed.add(CertificateParams::new(vec![])?.self_signed(&KeyPair::generate()?)?.der().clone())?;
    let (dial, serving) = dial_server(&client, &server, believed, leaf).await?;
    let outcome = dial?.open_tunnel(ECHO, CLIENT).await.map(|_| ());
    refused(outcome, Kind::TlsFailure, "it refused us");
    serving.ok_or("no server")?.await?;
    Ok(())
}

/// What the server says to these bytes, and what it answers.
async fn sent(bytes: &[u8]) -> Fallible<(Result<()>, Vec<u8>)> {
    let pair = Pair::new().await?;
    let (mut dialled, accepted) = sockets().await?;
    let dial = async {
        dialled.write_all(bytes).await?;
        dialled.shutdown().await?;
        let mut answer = Vec::new();
        // A reset is as good an end as any.
        let _ = dialled.read_to_end(&mut answer).await;
        std::io::Result::Ok(answer)
    };
    let (answer, outcome) = tokio::join!(dial, accept(accepted, &pair.server));
    Ok((outcome.map(|_| ()), answer?))
}

#[tokio::test]
async fn plaintext_and_garbage_are_refused() -> TestResult {
    let (outcome, _) = sent(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await?;
    refused(outcome, Kind::TlsFailure, "not TLS");
    let (outcome, _) = sent(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    refused(outcome, Kind::TlsFailure, "not TLS");
    let (outcome, _) = sent(&[0; 64]).await?;
    refused(outcome, Kind::TlsFailure, "the TLS handshake with 127.0.0.1");
    let (outcome, _) = sent(b"").await?;
    refused(outcome, Kind::TlsFailure, "the TLS handshake with 127.0.0.1");
    Ok(())
}

#[tokio::test]
async fn tls_1_2_is_refused() -> TestResult {
    // A ClientHello of TLS 1.2: ECDHE-ECDSA with AES-128-GCM, secp256r1, one signature scheme.
    let extensions: &[u8] = &[0, 10, 0, 4, 0, 2, 0, 23, 0, 13, 0, 4, 0, 2, 4, 3, 0, 11, 0, 2, 1, 0];
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, u8::try_from(extensions.len())?]);
    hello.extend(extensions);
    let length = u8::try_from(hello.len())?;
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(hello);
    let (outcome, answer) = sent(&record).await?;
    refused(outcome, Kind::TlsFailure, "the TLS handshake with 127.0.0.1");
    // An alert record: fatal, protocol_version.
    assert_eq!((answer.first(), answer.get(5..)), (Some(&21), Some(&[2, 70][..])), "{answer:?}");
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_ten_seconds() -> TestResult {
    let pair = Pair::new().await?;
    let (dialled, accepted) = sockets().await?;
    let start = tokio::time::Instant::now();
    refused(accept(accepted, &pair.server).await.map(|_| ()), Kind::TlsFailure, "within 10 s");
    let connected = connect(dialled, &pair.client, &[]).await;
    assert!(connected.is_err());
    assert!(start.elapsed() >= std::time::Duration::from_secs(10));
    Ok(())
}

#[tokio::test]
async fn no_handle_shows_a_key() -> TestResult {
    let pair = Pair::new().await?;
    let node = Node::start(&pair.server, 1, echo).await?;
    let connection = node.connect(&pair).await?;
    let text = format!("{:?} {connection:?}", pair.client).to_lowercase();
    assert!(text.contains("sa/client") || text.contains("\"client\""), "{text}");
    assert!(!text.contains("key"), "{text}");
    let _: SocketAddr = connection.address();
    Ok(())
}

/// What was agreed on to derive keys from, as the server sees it.
async fn agreed_group(server: &WorkloadIdentity, client: ClientConfig) -> Fallible<String> {
    let (dialled, accepted) = sockets().await?;
    let dial = async { TlsConnector::from(Arc::new(client)).connect(server_name(POD), dialled).await };
    let (dialled, accepted) = tokio::join!(dial, accept(accepted, server));
    dialled?;
    let tls = accepted?.tls;
    let group = tls.get_ref().1.negotiated_key_exchange_group().ok_or("no group")?;
    Ok(format!("{:?}", group.name()))
}

#[tokio::test]
async fn keys_are_safe_from_quantum_computers_where_both_ends_know_how() -> TestResult {
    use rustls::crypto::aws_lc_rs::kx_group::{SECP256R1, X25519};
    let pair = Pair::new().await?;
    let expected = std::slice::from_ref(&pair.server.id);
    let ours = || pair.client.client_config(expected, &[b"h2"]).map(|config| ClientConfig::clone(&config));
    assert_eq!(agreed_group(&pair.server, ours()?).await?, "X25519MLKEM768");
    for (group, name) in [(X25519, "X25519"), (SECP256R1, "secp256r1")] {
        let mut config = ours()?;
        let provider = CryptoProvider { kx_groups: vec![group], ..default_provider() };
        let mut older = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Gullible(Arc::new(default_provider()))))
            .with_client_cert_resolver(Arc::clone(&config.client_auth_cert_resolver));
        older.alpn_protocols = std::mem::take(&mut config.alpn_protocols);
        assert_eq!(agreed_group(&pair.server, older).await?, name);
    }
    Ok(())
}
