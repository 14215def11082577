//! The webhook as an API server asks it.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{net::SocketAddr, path::Path};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use hyper::client::conn::http1 as client;
use rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider, version::TLS13};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::*;
use crate::{
    identity::EmbeddedCa,
    source::{Source, directory, kubernetes::tests::fake::Fake},
};

const NAME: &str = "mesh-controller.mesh-system.svc";
const SERVICE: &str = "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {ports: [{port: 80}]}}";

fn virtual_service(spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.istio.io/v1beta1", "kind": "VirtualService",
        "metadata": {"name": "v", "namespace": "default", "managedFields": [{"manager": "kubectl"}]}, "spec": spec,
    })
}

fn to(destination: &Value) -> Value {
    virtual_service(&json!({"hosts": ["a"], "http": [{"route": [{"destination": destination}]}]}))
}

fn wrong() -> Value {
    virtual_service(
        &json!({"hosts": ["a"], "http": [{"timeout": "soon", "route": [{"destination": {"host": "a"}}]}]}),
    )
}

fn review(operation: &str, object: &Value, before: &Value) -> Value {
    json!({
        "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
        "request": {
            "uid": "705ab4f5", "operation": operation, "userInfo": {"username": "jane"}, "object": object, "oldObject": before,
            "kind": {"group": "networking.istio.io", "version": "v1beta1", "kind": "VirtualService"},
            "resource": {"group": "networking.istio.io", "version": "v1beta1", "resource": "virtualservices"},
            "name": "v", "namespace": "default", "options": null, "dryRun": false,
        },
    })
}

/// The response to a question, without warnings.
fn judged(review: &Value) -> Value {
    let judged = review::judge(review.to_string().as_bytes()).unwrap();
    let answer = serde_json::to_value(judged.answer(Vec::new())).unwrap();
    assert_eq!(
        (&answer["apiVersion"], &answer["kind"]),
        (&json!("admission.k8s.io/v1"), &json!("AdmissionReview"))
    );
    assert_eq!(answer["response"]["uid"], "705ab4f5");
    answer["response"].clone()
}

#[test]
fn what_is_wrong_is_refused_with_field_and_message() {
    let good = to(&json!({"host": "a"}));
    for operation in ["CREATE", "UPDATE"] {
        let refused = judged(&review(operation, &wrong(), &good));
        assert_eq!(refused["allowed"], false, "{refused}");
        let status = &refused["status"];
        let message = status["message"].as_str().unwrap();
        assert!(message.starts_with("spec.http[0].timeout: "), "{message}");
        assert_eq!((&status["code"], &status["reason"]), (&json!(422), &json!("Invalid")));
        assert_eq!(status["details"]["causes"][0]["field"], "spec.http[0].timeout");
        assert_eq!(judged(&review(operation, &good, &wrong()))["allowed"], true);
    }
}

#[test]
fn each_field_that_is_wrong_is_a_cause_of_its_own() {
    let mut twice = wrong();
    let first = twice["spec"]["http"][0].clone();
    twice["spec"]["http"].as_array_mut().unwrap().push(first);
    let refused = judged(&review("CREATE", &twice, &Value::Null));
    let causes = refused["status"]["details"]["causes"].as_array().unwrap();
    let fields: Vec<_> = causes.iter().map(|cause| &cause["field"]).collect();
    assert_eq!(fields, ["spec.http[0].timeout", "spec.http[1].timeout"]);
    let message = refused["status"]["message"].as_str().unwrap();
    assert!(message.contains("; spec.http[1].timeout: "), "{message}");
}

#[test]
fn what_matters_to_nobody_is_never_refused() {
    let nothing = Value::Null;
    assert_eq!(judged(&review("DELETE", &nothing, &wrong()))["allowed"], true);
    let mut of_status = review("UPDATE", &wrong(), &to(&json!({"host": "a"})));
    of_status["request"]["subResource"] = json!("status");
    assert_eq!(judged(&of_status)["allowed"], true);
    for (api_version, kind) in [
        ("apps/v1", "Deployment"),
        ("networking.istio.io/v1", "Sidecar"),
        ("networking.istio.io/v9", "VirtualService"),
    ] {
        let object =
            json!({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}, "spec": {"hosts": 7}});
        assert_eq!(judged(&review("CREATE", &object, &nothing))["allowed"], true, "{api_version} {kind}");
    }
}

#[test]
fn what_was_wrong_before_may_go_and_change_where_it_does_not_matter() {
    let mut labelled = wrong();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    labelled["metadata"]["finalizers"] = json!(["f"]);
    let allowed = judged(&review("UPDATE", &labelled, &wrong()));
    assert_eq!(allowed["allowed"], true, "{allowed}");
    assert!(allowed["warnings"][0].as_str().unwrap().starts_with("spec.http[0].timeout: "), "{allowed}");
    let mut going = wrong();
    going["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    assert_eq!(judged(&review("UPDATE", &going, &to(&json!({"host": "a"}))))["allowed"], true);
    let mut annotated = wrong();
    annotated["metadata"]["annotations"] = json!({"mesh.io/fault-by-header": "true"});
    assert_eq!(judged(&review("UPDATE", &annotated, &wrong()))["allowed"], false);
}

#[test]
fn a_name_that_is_still_to_be_made_is_no_mistake() {
    let mut object = to(&json!({"host": "a"}));
    object["metadata"] = json!({"generateName": "v-", "namespace": "default"});
    assert_eq!(judged(&review("CREATE", &object, &Value::Null))["allowed"], true);
}

#[test]
fn what_is_no_question_gets_a_reason() {
    let mut another = review("CREATE", &wrong(), &Value::Null);
    another["apiVersion"] = json!("admission.k8s.io/v1beta1");
    let mut empty = another.clone();
    empty["apiVersion"] = json!("admission.k8s.io/v1");
    empty["request"] = Value::Null;
    let objectless = review("CREATE", &Value::Null, &Value::Null);
    for (body, why) in [
        (String::new(), "the body is no AdmissionReview"),
        ("{".to_owned(), "the body is no AdmissionReview"),
        ("[]".to_owned(), "the body is no AdmissionReview"),
        (another.to_string(), "only AdmissionReview of admission.k8s.io/v1"),
        (empty.to_string(), "has no request"),
        (objectless.to_string(), "has no object"),
    ] {
        let error = review::judge(body.as_bytes()).unwrap_err();
        assert!(error.contains(why), "{error}");
    }
    assert!(review::judge(&[0xff, 0xfe]).is_err());
}

/// The webhook beside a directory of manifests.
struct World {
    dir: tempfile::TempDir,
    ca: Arc<EmbeddedCa>,
    source: Source,
    address: SocketAddr,
    stop: CancellationToken,
    serving: JoinHandle<()>,
}

impl World {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.yaml"), SERVICE).unwrap();
        let ca = Arc::new(EmbeddedCa::in_memory("cluster.local").unwrap());
        let source = directory(dir.path().into(), Settings::default()).await.unwrap();
        let certificate = ServerCertificate::new(Arc::clone(&ca), vec![NAME.into()], PROTOCOLS).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), CancellationToken::new());
        let webhook = Webhook::new(source.inquiry.clone(), Settings::default());
        let serving = tokio::spawn(webhook.serve(listener, certificate, stop.clone()));
        Self { dir, ca, source, address, stop, serving }
    }

    async fn connect(&self, protocol: &str) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(self.ca.bundle());
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_root_certificates(roots);
        let mut config = config.with_no_client_auth();
        config.alpn_protocols = vec![protocol.as_bytes().to_vec()];
        let stream = TcpStream::connect(self.address).await.unwrap();
        TlsConnector::from(Arc::new(config)).connect(NAME.try_into().unwrap(), stream).await.unwrap()
    }

    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> (StatusCode, String) {
        let stream = self.connect("http/1.1").await;
        let (mut sender, connection) = client::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", NAME)
            .body(Full::<Bytes>::from(body))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let (status, body) = (response.status(), response.into_body().collect().await.unwrap().to_bytes());
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn ask(&self, review: &Value) -> Value {
        let (status, body) = self.send(Method::POST, PATH, review.to_string().into()).await;
        assert_eq!(status, StatusCode::OK, "{body}");
        serde_json::from_str::<Value>(&body).unwrap()["response"].clone()
    }
}

#[tokio::test]
async fn what_is_taken_without_effect_is_warned_of() {
    let world = World::start().await;
    let good = world.ask(&review("CREATE", &to(&json!({"host": "a"})), &Value::Null)).await;
    assert_eq!((&good["allowed"], &good["warnings"]), (&json!(true), &json!([])));
    let subset = world.ask(&review("CREATE", &to(&json!({"host": "a", "subset": "v9"})), &Value::Null)).await;
    assert_eq!(subset["allowed"], true, "{subset}");
    let warning = subset["warnings"][0].as_str().unwrap();
    assert!(
        warning.starts_with("spec.http[0].route[0].destination.subset: no DestinationRule defines"),
        "{warning}"
    );
    // What is there by then counts.
    let rule = "{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a, subsets: [{name: v9}]}}";
    std::fs::write(world.dir.path().join("b.yaml"), rule).unwrap();
    let mut source = world.source.snapshots.clone();
    source.wait_for(|snapshot| snapshot.revision > 1).await.unwrap();
    let subset = world.ask(&review("CREATE", &to(&json!({"host": "a", "subset": "v9"})), &Value::Null)).await;
    assert_eq!(subset["warnings"], json!([]), "{subset}");
    let refused = world.ask(&review("CREATE", &wrong(), &Value::Null)).await;
    assert_eq!(refused["allowed"], false);
    world.stop.cancel();
    world.serving.await.unwrap();
}

#[tokio::test]
async fn bad_requests_are_told_so_and_harm_nobody() {
    let world = World::start().await;
    for (method, path, body, status) in [
        (Method::POST, PATH, b"{".to_vec(), StatusCode::BAD_REQUEST),
        (Method::POST, PATH, vec![0xff; 16], StatusCode::BAD_REQUEST),
        (Method::POST, PATH, vec![b' '; LARGEST + 1], StatusCode::PAYLOAD_TOO_LARGE),
        (Method::GET, PATH, Vec::new(), StatusCode::METHOD_NOT_ALLOWED),
        (Method::POST, "/mutate", Vec::new(), StatusCode::NOT_FOUND),
    ] {
        let (answered, text) = world.send(method, path, body).await;
        assert_eq!(answered, status, "{text}");
        assert!(!text.trim().is_empty());
    }
    let over_http2 = world.connect("h2").await;
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(over_http2)).await.unwrap();
    tokio::spawn(connection);
    let body = Full::<Bytes>::from(review("CREATE", &wrong(), &Value::Null).to_string());
    let request = Request::post(format!("https://{NAME}{PATH}")).body(body).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), StatusCode::OK);
}

const CONFIGURATION: &str = "mesh-validation";
const GROUP: &str = "admissionregistration.k8s.io";
const PLURAL: &str = "validatingwebhookconfigurations";

fn bundles(fake: &Fake) -> Vec<String> {
    let configuration = fake.get_of(GROUP, PLURAL, "", CONFIGURATION).unwrap_or_default();
    let webhooks = configuration["webhooks"].as_array().cloned().unwrap_or_default();
    let bundle = |webhook: &Value| {
        let text = webhook["clientConfig"]["caBundle"].as_str().unwrap_or_default();
        String::from_utf8(BASE64_STANDARD.decode(text).unwrap()).unwrap()
    };
    webhooks.iter().map(bundle).collect()
}

fn install(fake: &Fake, bundle: Option<&str>) {
    let webhook = |name: &str| {
        let mut config = json!({"service": {"namespace": "mesh-system", "name": "mesh-controller"}});
        if let Some(bundle) = bundle {
            config["caBundle"] = BASE64_STANDARD.encode(bundle).into();
        }
        json!({"name": name, "clientConfig": config, "sideEffects": "None", "admissionReviewVersions": ["v1"]})
    };
    let webhooks = [webhook("a.mesh.io"), webhook("b.mesh.io")];
    let configuration = json!({
        "apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": CONFIGURATION}, "webhooks": webhooks,
    });
    fake.put(GROUP, PLURAL, configuration);
}

#[tokio::test]
async fn the_roots_are_kept_in_the_configuration_and_nothing_else_of_it_is_touched() {
    let fake = Fake::start().await;
    let dir = tempfile::tempdir().unwrap();
    let open = |dir: &Path| Arc::new(EmbeddedCa::open(dir, "cluster.local").unwrap());
    let ca = open(dir.path());
    let (client, kept) = (fake.cluster().client(), Arc::clone(&ca));
    let keeping = tokio::spawn(async move { keep_believed(client, CONFIGURATION, &kept).await });
    fake.until_asked("watch=true", 1).await;
    // None is made where there is none.
    assert_eq!(fake.asked("PATCH"), [""; 0]);
    let roots = ca.other_roots_than("").await;
    let both = |fake: &Fake| bundles(fake) == [roots.clone(), roots.clone()];
    install(&fake, None);
    fake.until(both).await;
    install(&fake, Some("somebody else's"));
    fake.until(both).await;
    let configuration = fake.get_of(GROUP, PLURAL, "", CONFIGURATION).unwrap();
    assert_eq!(configuration["webhooks"][1]["clientConfig"]["service"]["name"], "mesh-controller");
    assert_eq!(configuration["webhooks"][1]["sideEffects"], "None");
    // What is right is left alone.
    let patches = fake.asked("PATCH").len();
    assert_eq!(patches, 2, "{:?}", fake.asked("PATCH"));
    keeping.abort();
}
