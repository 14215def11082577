//! Tokens shown to an API server in this process: what it says is what counts.

use std::{convert::Infallible, fs, sync::Arc};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rustls::{ServerConfig, crypto::aws_lc_rs::default_provider, sign::SingleCertAndKey, version::TLS13};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::Code;

use super::{Outcome, REVIEWS, TestResult, csr, limits, refusal, world_of};
use crate::{
    controller::{ApiServer, Callers, Reviews},
    identity::{CertificateRequest, EmbeddedCa, LeafPolicy},
};

/// What the API server makes of a token.
fn status(token: &str) -> Value {
    let user = |name: &str| {
        json!({ "username": name, "uid": "1", "groups": ["system:authenticated"],
                "extra": { "authentication.kubernetes.io/node-name": ["a"] } })
    };
    let agent = user("system:serviceaccount:mesh-system:mesh-agent");
    match token {
        "agent" => json!({ "authenticated": true, "user": agent, "audiences": ["istio-ca"] }),
        "unbound" => json!({ "authenticated": true, "audiences": ["istio-ca"],
                             "user": { "username": "system:serviceaccount:mesh-system:mesh-agent" } }),
        "another audience" => json!({ "authenticated": true, "user": agent, "audiences": ["vault"] }),
        "no audience" => json!({ "authenticated": true, "user": agent }),
        "a person" => json!({ "authenticated": true, "user": user("admin"), "audiences": ["istio-ca"] }),
        "expired" => json!({ "authenticated": false, "user": {}, "error": "token has expired" }),
        _ => json!({ "user": {} }),
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let asked: Value = serde_json::from_slice(&body).unwrap_or_default();
    let token = asked["spec"]["token"].as_str().unwrap_or_default();
    let as_it_should = parts.method == Method::POST
        && parts.uri.path() == "/apis/authentication.k8s.io/v1/tokenreviews"
        && parts.headers.get("authorization").is_some_and(|value| value == "Bearer ours")
        && asked["apiVersion"] == "authentication.k8s.io/v1"
        && asked["kind"] == "TokenReview"
        && asked["spec"]["audiences"] == json!(["istio-ca"]);
    let mut response = Response::new(Full::default());
    if !as_it_should || token == "forbidden" {
        *response.status_mut() = StatusCode::FORBIDDEN;
    } else if token == "garbage" {
        *response.body_mut() = Full::from("<html>");
    } else {
        *response.status_mut() = StatusCode::CREATED;
        let review = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
                             "metadata": {}, "spec": asked["spec"], "status": status(token) });
        *response.body_mut() = Full::from(review.to_string());
    }
    Ok(response)
}

/// A running API server, and what a controller has to know of it.
async fn api() -> Outcome<(tempfile::TempDir, ApiServer)> {
    let dir = tempfile::tempdir()?;
    let ca = EmbeddedCa::open(dir.path(), "cluster.local")?;
    let key = ca.issue_server(&["127.0.0.1".to_owned()], LeafPolicy::default())?.key;
    let tls = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
    let (tls, listener) = (TlsAcceptor::from(Arc::new(tls)), TcpListener::bind("127.0.0.1:0").await?);
    let api = ApiServer {
        host: "127.0.0.1".to_owned(),
        port: listener.local_addr()?.port(),
        roots: dir.path().join("ca-cert.pem"),
        token: dir.path().join("ours"),
    };
    fs::write(&api.token, "ours\n")?;
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                if let Ok(stream) = tls.accept(stream).await {
                    // Its end is the client's affair.
                    let _ = http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service_fn(answer))
                        .await;
                }
            });
        }
    });
    Ok((dir, api))
}

fn callers(api: &ApiServer) -> Callers {
    Callers::Reviewed(Reviews::new(api.clone(), "istio-ca"))
}

#[tokio::test]
async fn whom_the_api_server_names_gets_what_its_node_runs() -> TestResult {
    let (dir, api) = api().await?;
    let world = world_of(tempfile::tempdir()?, limits(), callers(&api))?;
    let key = rcgen::KeyPair::generate()?;
    let request = CertificateRequest::impersonating(REVIEWS.into(), csr(&key, vec![])?, 0);
    world.ask("agent", &request).await?;
    let (code, reason) = refusal(world.ask("unbound", &request).await)?;
    assert_eq!(code, Code::PermissionDenied);
    assert!(reason.contains("its token names no node"), "{reason}");
    drop(dir);
    Ok(())
}

#[tokio::test]
async fn all_others_are_refused_and_told_why() -> TestResult {
    let (dir, api) = api().await?;
    let stopped = ApiServer { port: 1, ..api.clone() };
    let strange = tempfile::tempdir()?;
    EmbeddedCa::open(strange.path(), "cluster.local")?;
    let unknown = ApiServer { roots: strange.path().join("ca-cert.pem"), ..api.clone() };
    let nobody = ApiServer { token: dir.path().join("missing"), ..api.clone() };
    let request = CertificateRequest::impersonating(REVIEWS.into(), String::new(), 0);
    for (api, token, code, expected) in [
        (&api, "another audience", Code::Unauthenticated, "for another audience than \"istio-ca\""),
        (&api, "no audience", Code::Unauthenticated, "for another audience than \"istio-ca\""),
        (&api, "a person", Code::Unauthenticated, "is of \"admin\", which is no service account"),
        (&api, "expired", Code::Unauthenticated, "does not take the token: token has expired"),
        (&api, "unknown", Code::Unauthenticated, "does not take the token: it gives no reason"),
        (&api, "forbidden", Code::Unavailable, "may this controller create tokenreviews?"),
        (&api, "garbage", Code::Unavailable, "its answer is no TokenReview"),
        (&stopped, "agent", Code::Unavailable, "127.0.0.1:1 cannot be asked about the token: connecting"),
        (&unknown, "agent", Code::Unavailable, "TLS: invalid peer certificate"),
        (&nobody, "agent", Code::Unavailable, "missing: No such file"),
    ] {
        let world = world_of(tempfile::tempdir()?, limits(), callers(api))?;
        let (found, reason) = refusal(world.ask(token, &request).await)?;
        assert_eq!(found, code, "{token}: {reason}");
        assert!(reason.contains(expected), "{token}: {reason}");
    }
    Ok(())
}
