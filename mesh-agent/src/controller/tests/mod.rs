//! The service asked directly: who gets which certificate, and what everybody else is told.

mod key_sets;
mod token_review;
mod tokens;
mod wire;

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use rcgen::{
    CertificateParams, DistinguishedName, IsCa, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
    PKCS_ECDSA_P521_SHA512, PKCS_ED25519, PKCS_RSA_SHA256, PublicKeyData as _, RsaKeySize, SanType,
    SignatureAlgorithm,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use time::OffsetDateTime;
use tokio::sync::watch;
use tonic::{Code, Status};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{Accounts, Callers, CertificateService, Limits, TokenFor, TokenKey, Tokens};
use crate::{
    config::ServiceAccountName,
    identity::{CertificateRequest, CertificateResponse, EmbeddedCa, LeafPolicy},
    state::snapshot::{Authentication, CapturePolicy, Snapshot, Workload},
};

type TestResult = Result<(), Box<dyn std::error::Error>>;
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// Seconds by which a beginning is dated back.
fn backdate() -> i64 {
    LeafPolicy::default().backdate.as_secs().cast_signed()
}

const REVIEWS: &str = "spiffe://cluster.local/ns/default/sa/reviews";

/// An enrolled pod of account `name` on this node, at an address of its own.
fn pod(name: &str, node: &str, ip: [u8; 4]) -> Outcome<Workload> {
    Ok(Workload {
        namespace: "default".into(),
        name: name.into(),
        ips: vec![ip.into()],
        node: Some(node.into()),
        identity: format!("spiffe://cluster.local/ns/default/sa/{name}").parse()?,
        labels: [].into(),
        view: None,
        enrolled: true,
        netns: None,
        announced: false,
        capture: CapturePolicy::default(),
        authorization: Arc::default(),
        authentication: Authentication::default(),
        workload_name: name.into(),
        canonical_service: name.into(),
        canonical_revision: "latest".into(),
    })
}

fn snapshot(revision: u64, pods: Vec<Workload>) -> Arc<Snapshot> {
    let workloads = pods.into_iter().map(|pod| (pod.ips[0], Arc::new(pod))).collect();
    Arc::new(Snapshot { revision, workloads, ..Snapshot::default() })
}

fn limits() -> Limits {
    Limits {
        lifetime: Duration::from_hours(24),
        max_lifetime: Duration::from_hours(48),
        requests_per_second: 1,
        burst: 100,
    }
}

struct World {
    dir: tempfile::TempDir,
    service: CertificateService,
    configuration: watch::Sender<Arc<Snapshot>>,
}

/// Reviews runs on node `a`, ratings on `b`, and `outside` is on `a` and not enrolled.
fn world(limits: Limits) -> Outcome<World> {
    world_at(tempfile::tempdir()?, limits)
}

fn world_at(dir: tempfile::TempDir, limits: Limits) -> Outcome<World> {
    let tokens = Tokens::open(dir.path(), "cluster.local", "istio-ca")?;
    world_of(dir, limits, Callers::Signed(Box::new(tokens)))
}

fn world_of(dir: tempfile::TempDir, limits: Limits, callers: Callers) -> Outcome<World> {
    let outside = Workload { enrolled: false, ..pod("outside", "a", [10, 0, 0, 3])? };
    let pods = vec![pod("reviews", "a", [10, 0, 0, 1])?, pod("ratings", "b", [10, 0, 0, 2])?, outside];
    let (configuration, snapshots) = watch::channel(snapshot(1, pods));
    let ca = Arc::new(EmbeddedCa::open(dir.path(), "cluster.local")?);
    let account = |name: &str| name.parse::<ServiceAccountName>();
    let agents = Accounts::new([account("mesh-system/mesh-agent")?], [account("edge/gateway")?]);
    let service = CertificateService::new(ca, "cluster.local", callers, agents, snapshots, limits);
    Ok(World { dir, service, configuration })
}

fn token(dir: &Path, account: &str, node: &str) -> Outcome<String> {
    let account = account.parse()?;
    let whom = TokenFor {
        trust_domain: "cluster.local",
        audience: "istio-ca",
        account: &account,
        node,
        duration: Duration::from_hours(1),
    };
    Ok(TokenKey::open(dir)?.issue(&whom, OffsetDateTime::now_utc())?)
}

fn csr(key: &KeyPair, names: Vec<SanType>) -> Outcome<String> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names;
    Ok(params.serialize_request(key)?.pem()?)
}

fn uri(name: &str) -> Outcome<SanType> {
    Ok(SanType::URI(name.try_into()?))
}

fn peer() -> SocketAddr {
    ([192, 0, 2, 1], 40000).into()
}

impl World {
    async fn ask(&self, token: &str, request: &CertificateRequest) -> Result<CertificateResponse, Status> {
        self.service.create(peer(), Some(&format!("Bearer {token}")), request).await
    }

    /// As the agent of this node, for this identity, with an ordinary key.
    async fn ask_for(&self, node: &str, identity: &str) -> Outcome<Result<CertificateResponse, Status>> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let request = CertificateRequest::impersonating(identity.into(), csr(&key, vec![uri(identity)?])?, 0);
        let token = token(self.dir.path(), "mesh-system/mesh-agent", node)?;
        Ok(self.ask(&token, &request).await)
    }
}

fn refusal(answer: Result<CertificateResponse, Status>) -> Outcome<(Code, String)> {
    match answer {
        Ok(_) => Err("a certificate was issued".into()),
        Err(status) => Ok((status.code(), status.message().to_owned())),
    }
}

#[tokio::test]
async fn an_agent_gets_the_identities_of_its_node() -> TestResult {
    let world = world(limits())?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let request = CertificateRequest::impersonating(REVIEWS.into(), csr(&key, vec![uri(REVIEWS)?])?, 3600);
    let token = token(world.dir.path(), "mesh-system/mesh-agent", "a")?;
    let response = world.ask(&token, &request).await?;
    let [leaf, root] = &response.cert_chain[..] else { return Err("not a leaf and a root".into()) };
    let (leaf, root) =
        (CertificateDer::from_pem_slice(leaf.as_bytes())?, CertificateDer::from_pem_slice(root.as_bytes())?);
    assert_eq!(root.as_ref(), CertificateDer::from_pem_file(world.dir.path().join("ca-cert.pem"))?.as_ref());
    let ((_, leaf), (_, root)) = (X509Certificate::from_der(&leaf)?, X509Certificate::from_der(&root)?);
    leaf.verify_signature(Some(root.public_key()))?;
    assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
    let names = &leaf.subject_alternative_name()?.ok_or("no name")?.value.general_names;
    assert!(matches!(names[..], [GeneralName::URI(REVIEWS)]), "{names:?}");
    let life = leaf.validity().not_after.timestamp() - leaf.validity().not_before.timestamp();
    assert_eq!(life, 3600 + backdate());
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn nobody_else_gets_them() -> TestResult {
    let world = world(limits())?;
    for (node, name, expected) in [
        ("b", "reviews", "no enrolled pod of that identity runs on node b"),
        ("a", "ratings", "no enrolled pod of that identity runs on node a"),
        ("a", "outside", "no enrolled pod of that identity runs on node a"),
        ("c", "reviews", "no enrolled pod of that identity runs on node c"),
    ] {
        let id = format!("spiffe://cluster.local/ns/default/sa/{name}");
        let (code, reason) = refusal(world.ask_for(node, &id).await?)?;
        assert_eq!(code, Code::PermissionDenied);
        let whole = format!("mesh-system/mesh-agent on node {node} may not have {id}: {expected}");
        assert_eq!(reason, whole);
    }
    let (code, reason) = refusal(world.ask_for("a", "spiffe://other.example/ns/default/sa/reviews").await?)?;
    assert_eq!(code, Code::PermissionDenied);
    assert!(reason.contains("of another trust domain than cluster.local"), "{reason}");
    let (code, _) = refusal(world.ask_for("a", "spiffe://cluster.local/reviews").await?)?;
    assert_eq!(code, Code::InvalidArgument);
    Ok(())
}

#[tokio::test]
async fn only_agents_ask_for_others() -> TestResult {
    let world = world(limits())?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let token = token(world.dir.path(), "default/ratings", "a")?;
    let request = CertificateRequest::impersonating(REVIEWS.into(), csr(&key, vec![])?, 0);
    let (code, reason) = refusal(world.ask(&token, &request).await)?;
    assert_eq!(code, Code::PermissionDenied);
    assert_eq!(
        reason,
        format!("default/ratings on node a may not have {REVIEWS}: it is no agent (--agent-accounts)")
    );
    // Its own it may have, whether it names it or not.
    let own = "spiffe://cluster.local/ns/default/sa/ratings";
    let unnamed = CertificateRequest { csr: csr(&key, vec![])?, validity_duration: 0, metadata: None };
    let named = CertificateRequest::impersonating(own.into(), csr(&key, vec![])?, 0);
    for request in [unnamed, named] {
        let response = world.ask(&token, &request).await?;
        let leaf = CertificateDer::from_pem_slice(response.cert_chain[0].as_bytes())?;
        assert_eq!(crate::identity::single_identity(&leaf)?.to_string(), own);
    }
    Ok(())
}

#[tokio::test]
async fn agents_and_gateways_are_told_the_key_sets_and_gateways_have_no_identity_but_their_own() -> TestResult
{
    let world = world(limits())?;
    for (account, may) in [("mesh-system/mesh-agent", true), ("edge/gateway", true), ("edge/other", false)] {
        let bearer = format!("Bearer {}", token(world.dir.path(), account, "a")?);
        match world.service.may_watch(peer(), Some(&bearer)).await {
            Ok(()) => assert!(may, "{account}"),
            Err(status) => {
                assert!(!may && status.code() == Code::PermissionDenied, "{account}: {status}");
                assert!(status.message().contains("--gateway-accounts"), "{status}");
            }
        }
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let request = CertificateRequest::impersonating(REVIEWS.into(), csr(&key, vec![])?, 0);
    let token = token(world.dir.path(), "edge/gateway", "a")?;
    let (code, reason) = refusal(world.ask(&token, &request).await)?;
    assert_eq!((code, reason.contains("it is no agent")), (Code::PermissionDenied, true), "{reason}");
    Ok(())
}

#[tokio::test]
async fn callers_without_a_good_token_are_told_why() -> TestResult {
    let world = world(limits())?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let request = CertificateRequest::impersonating(REVIEWS.into(), csr(&key, vec![])?, 0);
    let other = tempfile::tempdir()?;
    let foreign = format!("Bearer {}", token(other.path(), "mesh-system/mesh-agent", "a")?);
    for (header, expected) in [
        (None, "no bearer token"),
        (Some("Basic YTpi"), "is not a bearer token"),
        (Some("Bearer"), "is not a bearer token"),
        (Some("Bearer x"), "cannot be read"),
        (Some(foreign.as_str()), "not signed by this controller's key"),
    ] {
        let (code, reason) = refusal(world.service.create(peer(), header, &request).await)?;
        assert_eq!(code, Code::Unauthenticated);
        assert!(reason.contains(expected), "{header:?}: {reason}");
    }
    Ok(())
}

#[tokio::test]
async fn keys_are_taken_as_istio_takes_them() -> TestResult {
    let world = world(limits())?;
    let token = token(world.dir.path(), "mesh-system/mesh-agent", "a")?;
    let ask = async |csr: String| {
        world.ask(&token, &CertificateRequest::impersonating(REVIEWS.into(), csr, 0)).await
    };
    let taken: [(&SignatureAlgorithm, &str); 3] =
        [(&PKCS_ECDSA_P256_SHA256, "P-256"), (&PKCS_ECDSA_P384_SHA384, "P-384"), (&PKCS_ED25519, "Ed25519")];
    for (algorithm, name) in taken {
        let answer = ask(csr(&KeyPair::generate_for(algorithm)?, vec![])?).await;
        assert!(answer.is_ok(), "{name}: {answer:?}");
    }
    let rsa = KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?;
    ask(csr(&rsa, vec![uri(REVIEWS)?])?).await?;
    Ok(())
}

#[tokio::test]
async fn requests_are_for_the_identity_and_no_longer_than_allowed() -> TestResult {
    let world = world(limits())?;
    let token = token(world.dir.path(), "mesh-system/mesh-agent", "a")?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let ask = async |csr: String, seconds| {
        world.ask(&token, &CertificateRequest::impersonating(REVIEWS.into(), csr, seconds)).await
    };
    let other = uri("spiffe://cluster.local/ns/default/sa/ratings")?;
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let good = csr(&key, vec![uri(REVIEWS)?])?;
    let (begin, middle) = good.split_at(good.len() / 2);
    for (text, seconds, expected) in [
        (
            csr(&key, vec![uri(REVIEWS)?, other.clone()])?,
            0,
            "names spiffe://cluster.local/ns/default/sa/ratings",
        ),
        (csr(&key, vec![other])?, 0, "names spiffe://cluster.local/ns/default/sa/ratings"),
        (
            csr(&key, vec![SanType::DnsName("istiod.istio-system.svc".try_into()?)])?,
            0,
            "istiod.istio-system.svc",
        ),
        (authority.serialize_request(&key)?.pem()?, 0, "certificates of authorities are not issued"),
        (csr(&KeyPair::generate_for(&PKCS_ECDSA_P521_SHA512)?, vec![])?, 0, "keys of this kind"),
        (String::new(), 0, "no PEM"),
        ("x".repeat(20_000), 0, "longer than"),
        (format!("{begin}{}", middle.replacen('A', "B", 1)), 0, "certificate request"),
        (good.clone(), 48 * 3600 + 1, "for 172800 seconds at most"),
    ] {
        let (code, reason) = refusal(ask(text, seconds).await)?;
        assert_eq!(code, Code::InvalidArgument, "{reason}");
        assert!(reason.contains(expected), "{expected}: {reason}");
    }
    for (asked, given) in [(0, 24 * 3600), (-5, 24 * 3600), (48 * 3600, 48 * 3600)] {
        let response = ask(good.clone(), asked).await?;
        let leaf = CertificateDer::from_pem_slice(response.cert_chain[0].as_bytes())?;
        let validity = X509Certificate::from_der(&leaf)?.1.validity().clone();
        assert_eq!(validity.not_after.timestamp() - validity.not_before.timestamp(), given + backdate());
    }
    Ok(())
}

#[tokio::test]
async fn a_request_signed_by_another_key_is_refused() -> TestResult {
    let world = world(limits())?;
    let token = token(world.dir.path(), "mesh-system/mesh-agent", "a")?;
    let [one, other] = [(), ()].map(|()| KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256));
    let (one, other) = (one?, other?);
    // The same request but for the key in it.
    let der = rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(csr(&one, vec![])?.as_bytes())?;
    let mut bytes = der.to_vec();
    let (ours, theirs) = (one.public_key_raw(), other.public_key_raw());
    let at = bytes.windows(ours.len()).position(|window| window == ours).ok_or("no key in the request")?;
    bytes[at..at + theirs.len()].copy_from_slice(theirs);
    let pem = super::certificates::pem("CERTIFICATE REQUEST", &bytes);
    let request = CertificateRequest::impersonating(REVIEWS.into(), pem, 0);
    let (code, reason) = refusal(world.ask(&token, &request).await)?;
    assert_eq!(code, Code::InvalidArgument);
    assert!(reason.contains("not signed by the key it is for"), "{reason}");
    Ok(())
}

#[test]
fn a_request_changed_in_any_byte_is_refused_or_reads_the_same() -> TestResult {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let good = csr(&key, vec![uri(REVIEWS)?])?;
    let der = rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(good.as_bytes())?;
    let mut refused = 0;
    for at in 0..der.len() {
        for bits in [0x01, 0x80, 0xff] {
            let mut bytes = der.to_vec();
            bytes[at] ^= bits;
            match super::csr::read(&super::certificates::pem("CERTIFICATE REQUEST", &bytes)) {
                Ok(read) => {
                    assert_eq!(
                        read.key.subject_public_key_info(),
                        key.subject_public_key_info(),
                        "byte {at}"
                    );
                    assert_eq!(read.names, [REVIEWS], "byte {at}");
                }
                Err(_) => refused += 1,
            }
        }
    }
    assert!(refused > der.len() * 2, "{refused} of {} were refused", der.len() * 3);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn who_asks_too_often_waits_and_others_do_not() -> TestResult {
    let world = world(Limits { burst: 2, ..limits() })?;
    for _ in 0..2 {
        world.ask_for("a", REVIEWS).await??;
    }
    let (code, reason) = refusal(world.ask_for("a", REVIEWS).await?)?;
    assert_eq!(code, Code::ResourceExhausted);
    assert_eq!(
        reason,
        "mesh-system/mesh-agent on node a asks for more than 1 certificates a second (2 at once)"
    );
    world.ask_for("b", "spiffe://cluster.local/ns/default/sa/ratings").await??;
    tokio::time::advance(Duration::from_secs(1)).await;
    world.ask_for("a", REVIEWS).await??;

    // Without a token it is the address that counts, and those who have one do not suffer.
    let request = CertificateRequest::default();
    let codes = async || world.service.create(peer(), None, &request).await.map_err(|status| status.code());
    for expected in [Code::Unauthenticated, Code::Unauthenticated, Code::ResourceExhausted] {
        assert_eq!(codes().await, Err(expected));
    }
    tokio::time::advance(Duration::from_secs(1)).await;
    world.ask_for("a", REVIEWS).await??;
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_the_agent_has_read_of_first_is_waited_for() -> TestResult {
    let world = world(limits())?;
    let id = "spiffe://cluster.local/ns/default/sa/new";
    let asked = world.ask_for("a", id);
    let pods = vec![pod("new", "a", [10, 0, 0, 9])?];
    let arrives = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        world.configuration.send(snapshot(2, pods))
    };
    let (answer, sent) = tokio::join!(asked, arrives);
    sent?;
    answer??;
    // What has gone since is no longer given.
    assert_eq!(refusal(world.ask_for("a", REVIEWS).await?)?.0, Code::PermissionDenied);
    Ok(())
}
