//! Whom a rule believes and whom not, by handshakes on loopback.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType, SerialNumber,
};
use rustls::{ServerConfig, server::WebPkiClientVerifier};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use time::{Duration, OffsetDateTime};

use super::*;
use crate::{identity::pki::list, state::snapshot::ClientCertificate};

/// Serial number of every certificate that is made here.
const SERIAL: &[u8] = &[7];

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Issuer {
    authority_named("authority")
}

/// Lists are told from one another by the names of their authorities.
fn authority_named(name: &str) -> Issuer {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// A certificate of these names and its key, in PEM.
fn certified(issuer: &Issuer, names: Vec<SanType>) -> ClientCertificate {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.serial_number = Some(SerialNumber::from_slice(SERIAL));
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, issuer).unwrap();
    let bytes = |pem: String| Arc::from(pem.into_bytes());
    ClientCertificate { chain: bytes(certificate.pem()), key: bytes(key.serialize_pem()) }
}

/// What the client is to believe, by default that authority and the name of the server.
fn terms(root: &Issuer) -> TlsTerms {
    TlsTerms {
        server: "a.example".into(),
        names: Vec::new(),
        roots: Some(Arc::from(root.pem().into_bytes())),
        revoked: None,
        anybody: false,
        shows: None,
    }
}

/// A server's side of TLS, with a certificate for a host, an address and an identity.
fn server(issuer: &Issuer, asks: Option<&Issuer>, alpn: &[&[u8]]) -> TlsAcceptor {
    let names = vec![
        SanType::DnsName("a.example".try_into().unwrap()),
        SanType::IpAddress([192, 0, 2, 1].into()),
        SanType::URI("spiffe://elsewhere/ns/a/sa/b".try_into().unwrap()),
    ];
    let shows = certified(issuer, names);
    let provider = Arc::new(default_provider());
    let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap();
    let config = match asks {
        None => config.with_no_client_auth(),
        Some(root) => {
            let mut roots = RootCertStore::empty();
            roots.add(root.der().clone()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            config.with_client_cert_verifier(verifier.build().unwrap())
        }
    };
    let key = PrivateKeyDer::from_pem_slice(&shows.key).unwrap();
    let mut config = config.with_single_cert(certificates(&shows.chain).unwrap(), key).unwrap();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// Whether the two come to an understanding: a byte of the server, for it may look at the client late.
async fn understand(server: &TlsAcceptor, terms: TlsTerms, protocol: Protocol) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let serving = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = server.accept(stream).await?;
        stream.write_all(b"a").await?;
        stream.shutdown().await
    };
    let asking = async {
        let stream = TcpStream::connect(at).await.unwrap();
        let mut stream = handshake(&ClientTls::new(terms), protocol, stream).await?;
        let told = stream.read_u8().await;
        told.map(|_| ()).map_err(|error| Error::new(Kind::TlsFailure, error.to_string()))
    };
    let (asked, _) = tokio::join!(asking, serving);
    asked
}

#[tokio::test]
async fn the_server_has_to_be_whom_the_rule_means() {
    let (root, other) = (authority(), authority());
    let server = server(&root, None, &[]);
    let named = |names: &[&str]| TlsTerms {
        server: "b.example".into(),
        names: names.iter().map(|name| Arc::from(*name)).collect(),
        ..terms(&root)
    };
    let anybody = TlsTerms { server: "b.example".into(), anybody: true, ..terms(&other) };
    let table = [
        ("its name", terms(&root), true),
        ("another name", named(&[]), false),
        ("another authority", terms(&other), false),
        ("no matter whom", anybody, true),
        ("one of several names", named(&["c.example", "a.example"]), true),
        ("an identity", named(&["spiffe://elsewhere/ns/a/sa/b"]), true),
        ("an address", named(&["192.0.2.1"]), true),
        ("another identity", named(&["spiffe://elsewhere/ns/a/sa/c"]), false),
        ("other names", named(&["b.example", "192.0.2.2"]), false),
        ("of another authority", TlsTerms { roots: terms(&other).roots, ..named(&["a.example"]) }, false),
    ];
    for (what, terms, expected) in table {
        let came = understand(&server, terms, Protocol::Opaque).await;
        assert_eq!(came.is_ok(), expected, "{what}: {came:?}");
        assert!(came.map_err(|error| error.kind).err().is_none_or(|kind| kind == Kind::TlsFailure));
    }
}

#[tokio::test]
async fn whom_an_authority_has_revoked_is_not_believed() {
    let (root, other) = (authority_named("root"), authority_named("other"));
    let server = server(&root, None, &[]);
    let tomorrow = OffsetDateTime::now_utc() + Duration::DAY;
    let lists = |lists: &[(&Issuer, &[&[u8]], OffsetDateTime)]| {
        let pem = |(issuer, serials, next): &(&Issuer, &[&[u8]], OffsetDateTime)| {
            list(&***issuer, serials, *next).unwrap().pem().unwrap()
        };
        let text: String = lists.iter().map(pem).collect();
        TlsTerms { revoked: Some(Arc::from(text.into_bytes())), ..terms(&root) }
    };
    let yesterday = OffsetDateTime::now_utc() - Duration::DAY;
    let table = [
        ("others are", lists(&[(&root, &[&[8]], tomorrow)]), None),
        ("it is", lists(&[(&root, &[&[8], SERIAL], tomorrow)]), Some("is revoked (caCrl")),
        (
            "one of several lists",
            lists(&[(&other, &[], tomorrow), (&root, &[SERIAL], tomorrow)]),
            Some("is revoked"),
        ),
        ("its authority says nothing", lists(&[(&other, &[], tomorrow)]), Some("there is no list")),
        ("nor anything new", lists(&[(&root, &[], yesterday)]), Some("out of date")),
        ("anybody is believed", TlsTerms { anybody: true, ..lists(&[(&root, &[SERIAL], tomorrow)]) }, None),
    ];
    for (what, terms, expected) in table {
        let came = understand(&server, terms, Protocol::Http1).await;
        match (came, expected) {
            (Ok(()), None) => {}
            (Err(error), Some(text)) => {
                assert_eq!(error.kind, Kind::TlsFailure, "{what}");
                assert!(error.detail.contains(text), "{what}: {error}");
            }
            (came, _) => panic!("{what}: {came:?}"),
        }
    }
}

#[tokio::test]
async fn a_client_shows_what_the_rule_names() {
    let (root, clients) = (authority(), authority());
    let server = server(&root, Some(&clients), &[]);
    let shows = |issuer| TlsTerms { shows: Some(certified(issuer, Vec::new())), ..terms(&root) };
    assert!(understand(&server, terms(&root), Protocol::Http1).await.is_err(), "nothing is shown");
    assert!(understand(&server, shows(&root), Protocol::Http1).await.is_err(), "of another authority");
    let understood = understand(&server, shows(&clients), Protocol::Http1).await;
    assert!(understood.is_ok(), "{understood:?}");
}

#[tokio::test]
async fn what_is_spoken_is_agreed_upon() {
    let root = authority();
    let table: [(&[&[u8]], Protocol, bool); 6] = [
        (&[], Protocol::Http1, true),
        (&[], Protocol::Http2, false),
        (&[b"h2"], Protocol::Http2, true),
        (&[b"h2"], Protocol::Http1, false),
        (&[b"http/1.1", b"h2"], Protocol::Http2, true),
        (&[b"h2"], Protocol::Opaque, true),
    ];
    for (alpn, protocol, expected) in table {
        let came = understand(&server(&root, None, alpn), terms(&root), protocol).await;
        assert_eq!(came.is_ok(), expected, "{protocol:?} with {alpn:?}: {came:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_read_is_said() {
    let root = authority();
    let server = server(&root, None, &[]);
    let bytes = |text: &str| Some(Arc::<[u8]>::from(text.as_bytes()));
    let bad = ClientCertificate { key: Arc::from(*b"-"), ..certified(&root, Vec::new()) };
    let table = [
        (TlsTerms { roots: bytes("nothing"), ..terms(&root) }, "the roots: there is no certificate"),
        (TlsTerms { shows: Some(bad), ..terms(&root) }, "the client's key"),
        (TlsTerms { revoked: bytes("nothing"), ..terms(&root) }, "revoked: there is no list"),
    ];
    for (terms, expected) in table {
        let error = understand(&server, terms, Protocol::Http1).await.unwrap_err();
        assert!(error.detail.contains(expected), "{error}");
    }
}
