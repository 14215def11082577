//! From the server of an issuer by the controller to the agents.

use hyper::{
    client::conn::http2::{SendRequest, handshake},
    server::conn::http2,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::sync::watch;
use tonic::body::Body;

use super::*;
use crate::{
    controller::key_sets::KeySets,
    source::{
        key_sets::{Told, WATCH_KEY_SETS, follow, run},
        read_text,
    },
    state::{
        compile::{Settings, compile},
        snapshot::Snapshot,
    },
};

/// A configuration that names these key sets.
fn snapshot(uris: &[String], previous: Option<&Snapshot>) -> Arc<Snapshot> {
    let rules: Vec<String> =
        uris.iter().map(|uri| format!("{{issuer: a, jwksUri: '{uri}', timeout: 20s}}")).collect();
    let text = format!(
        "{{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {{name: a, namespace: b}}, \
         spec: {{jwtRules: [{}]}}}}",
        rules.join(", ")
    );
    let (objects, refused) = read_text(&text);
    assert_eq!(refused, []);
    Arc::new(compile(&objects, previous, &Settings::default()).0)
}

/// Waits until what is known of a URI is so.
async fn until(sets: &KeySets, uri: &str, is: impl Fn(&crate::controller::key_sets::State) -> bool) {
    let mut changes = sets.changes();
    tokio::time::timeout(TIMEOUT, async {
        while !is(&sets.state(uri)) {
            changes.changed().await.unwrap();
        }
    })
    .await
    .unwrap();
}

/// A connection to the controller, and its other end, which serves it until it is dropped.
async fn connection(sets: &KeySets) -> SendRequest<Body> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let sets = sets.clone();
    tokio::spawn(async move {
        let answer = service_fn(|request: http::Request<hyper::body::Incoming>| {
            let sets = sets.clone();
            async move {
                assert_eq!(request.uri().path(), WATCH_KEY_SETS);
                assert_eq!(request.headers()["authorization"], "Bearer token");
                Ok::<_, std::convert::Infallible>(sets.serve(request).await)
            }
        });
        // Its end is the client's affair.
        let _ = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(far), answer).await;
    });
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(near)).await.unwrap();
    tokio::spawn(connection);
    sender
}

#[tokio::test]
async fn sets_are_fetched_as_the_configuration_names_them() {
    let server = Server::start().await;
    let (one, two) = (server.url("/one"), server.url("/two"));
    server.answer("/one", 200, &keys("one"));
    server.answer("/two", 503, "");
    let sets = KeySets::default();
    let (configuration, snapshots) = watch::channel(snapshot(&[one.clone(), two.clone()], None));
    let following = tokio::spawn({
        let sets = sets.clone();
        async move { sets.follow(fetcher(), snapshots).await }
    });
    until(&sets, &one, |state| same(state.keys.as_ref(), &keys("one")) && state.trouble.is_none()).await;
    until(&sets, &two, |state| state.keys.is_none() && state.trouble.is_some()).await;
    // It is tried again, though nobody says so.
    server.answer("/two", 200, &keys("two"));
    until(&sets, &two, |state| same(state.keys.as_ref(), &keys("two")) && state.trouble.is_none()).await;
    // What nothing names any more is forgotten, and not fetched.
    configuration.send_replace(snapshot(std::slice::from_ref(&two), None));
    until(&sets, &one, |state| state.keys.is_none() && state.trouble.is_none()).await;
    assert!(sets.state(&two).keys.is_some());
    drop(configuration);
    following.await.unwrap();
}

#[tokio::test]
async fn the_last_good_set_is_kept_while_fetching_fails() {
    let sets = KeySets::default();
    let uri: Arc<str> = "https://issuer/keys".into();
    let good = || Ok(Arc::new(crate::state::snapshot::KeySet::parse(&keys("one")).unwrap()));
    sets.learn(&uri, good(), TIMEOUT);
    sets.learn(&uri, Err("no answer".to_owned()), TIMEOUT);
    let state = sets.state(&uri);
    assert!(same(state.keys.as_ref(), &keys("one")) && state.trouble.as_deref() == Some("no answer"));
    sets.learn(&uri, good(), TIMEOUT);
    assert_eq!(sets.state(&uri).trouble, None);
}

/// Waits until the agent has a set of this name.
async fn has(snapshot: &Snapshot, uri: &str, name: &str) {
    let there = async {
        while !same(snapshot.key_sets[uri].get().as_ref(), &keys(name)) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(TIMEOUT, there).await.unwrap();
}

#[tokio::test]
async fn agents_are_told_what_there_is_and_what_changes() {
    let sets = KeySets::default();
    let learn = |uri: &str, name: &str| {
        let keys = crate::state::snapshot::KeySet::parse(&keys(name)).unwrap();
        sets.learn(&uri.into(), Ok(Arc::new(keys)), TIMEOUT);
    };
    let uris = ["https://a/keys".to_owned(), "https://b/keys".to_owned()];
    learn(&uris[0], "one");
    let first = snapshot(&uris[..1], None);
    let (configuration, snapshots) = watch::channel(Arc::clone(&first));
    let running = tokio::spawn({
        let sets = sets.clone();
        let connect = move || {
            let sets = sets.clone();
            async move { Ok((connection(&sets).await, "token".to_owned().into())) }
        };
        run(connect, snapshots)
    });
    has(&first, &uris[0], "one").await;
    learn(&uris[0], "two");
    has(&first, &uris[0], "two").await;
    // Told before the agent's own configuration names it, and used once that does.
    learn(&uris[1], "three");
    learn(&uris[0], "four");
    has(&first, &uris[0], "four").await;
    let second = snapshot(&uris, Some(&first));
    configuration.send_replace(Arc::clone(&second));
    has(&second, &uris[1], "three").await;
    // A failure takes nothing away.
    sets.learn(&uris[0].as_str().into(), Err("no answer".to_owned()), TIMEOUT);
    learn(&uris[1], "five");
    has(&second, &uris[1], "five").await;
    has(&second, &uris[0], "four").await;
    drop(configuration);
    running.await.unwrap();
}

#[tokio::test]
async fn an_agent_keeps_what_it_was_told_when_the_controller_goes() {
    let sets = KeySets::default();
    let uri: Arc<str> = "https://a/keys".into();
    let good = crate::state::snapshot::KeySet::parse(&keys("one")).unwrap();
    sets.learn(&uri, Ok(Arc::new(good)), TIMEOUT);
    let (mut told, first) = (Told::default(), snapshot(&[uri.to_string()], None));
    let (_configuration, mut snapshots) = watch::channel(Arc::clone(&first));
    let connected = connection(&sets).await;
    tokio::select! {
        ended = follow(connected, "token", &mut told, &mut snapshots) => panic!("{ended:?}"),
        () = has(&first, &uri, "one") => {}
    }
    // A controller that answers nothing: the call fails, and the set stays.
    let (near, far) = tokio::io::duplex(1 << 16);
    drop(far);
    let broken = handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(near)).await;
    if let Ok((sender, connection)) = broken {
        tokio::spawn(connection);
        assert!(follow(sender, "token", &mut told, &mut snapshots).await.is_err());
    }
    assert!(same(first.key_sets[&uri].get().as_ref(), &keys("one")));
    let bad = follow(connection(&sets).await, "to\nken", &mut told, &mut snapshots).await;
    assert!(bad.is_err_and(|status| status.code() == tonic::Code::Unauthenticated));
}
