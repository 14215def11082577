//! An API server that restarts, forgets, refuses, and a network that is cut.

use super::*;

const LIST: &str = "GET /api/v1/services?limit";
const WATCH: &str = "GET /api/v1/services?allowWatchBookmarks";

#[tokio::test]
async fn a_watch_that_is_cut_goes_on_from_the_last_event() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let mut source = start(&fake).await;
    fake.until_asked(WATCH, 1).await;
    put_service(&fake, "b");
    until_names(&mut source, &["a", "b"]).await;
    fake.forget();
    fake.forget_asked();
    fake.cut();
    fake.until_asked(WATCH, 1).await;
    put_service(&fake, "c");
    until_names(&mut source, &["a", "b", "c"]).await;
    assert_eq!(fake.asked(LIST), [""; 0], "it was listed anew");
}

#[tokio::test]
async fn a_watch_that_ends_goes_on_from_the_last_bookmark() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let mut source = start(&fake).await;
    fake.until_asked(WATCH, 1).await;
    // Of another kind: nothing but the bookmark tells the watch of services how far the world is.
    fake.put("", "nodes", json!({"metadata": {"name": "n"}}));
    fake.bookmark();
    fake.forget();
    fake.forget_asked();
    fake.end_watches();
    fake.until_asked(WATCH, 1).await;
    put_service(&fake, "b");
    until_names(&mut source, &["a", "b"]).await;
    assert_eq!(fake.asked(LIST), [""; 0], "it was listed anew");
}

#[tokio::test]
async fn what_was_forgotten_is_listed_anew_and_what_has_gone_meanwhile_goes() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    put_service(&fake, "b");
    let mut source = start(&fake).await;
    fake.until_asked(WATCH, 1).await;
    fake.stop().await;
    fake.delete("", "services", "default", "a");
    put_service(&fake, "c");
    fake.forget();
    assert_eq!(names(&source.snapshots.borrow()), ["a", "b"], "the last snapshot stays in force");
    fake.forget_asked();
    fake.go_on().await;
    until_names(&mut source, &["b", "c"]).await;
    assert!(!fake.asked(LIST).is_empty());
}

#[tokio::test]
async fn an_api_server_that_restarts_is_followed_again_without_a_list() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let mut source = start(&fake).await;
    fake.until_asked(WATCH, 1).await;
    fake.stop().await;
    put_service(&fake, "b");
    fake.forget_asked();
    fake.go_on().await;
    until_names(&mut source, &["a", "b"]).await;
    assert_eq!(fake.asked(LIST), [""; 0]);
}

#[tokio::test]
async fn a_part_of_the_configuration_is_none() {
    let fake = Fake::start().await;
    fake.define("security.istio.io", "authorizationpolicies", &["v1"]);
    fake.forbid("authorizationpolicies", true);
    let bound = Patience { first_lists: Duration::from_millis(300), ..patience() };
    let refused = follow(&fake.cluster(), settings(), &Sandboxes::default(), bound)
        .await
        .map(drop)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("authorizationpolicies (authorizationpolicies is forbidden: its role"),
        "{refused}"
    );
    // It is waited for.
    let (cluster, sandboxes) = (fake.cluster(), Sandboxes::default());
    let (waiting, allowed) = tokio::join!(follow(&cluster, settings(), &sandboxes, patience()), async {
        fake.forget_asked();
        fake.until_asked("authorizationpolicies?", 2).await;
        fake.forbid("authorizationpolicies", false);
    });
    let ((), source) = (allowed, waiting.unwrap());
    assert_eq!(source.snapshots.borrow().revision, 1);
}

#[tokio::test]
async fn what_is_forbidden_later_stays_as_it_was() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let mut source = start(&fake).await;
    fake.forbid("services", true);
    fake.until_asked(WATCH, 1).await;
    fake.forget_asked();
    fake.cut();
    fake.until_asked(WATCH, 2).await;
    put_service(&fake, "b");
    assert_eq!(names(&source.snapshots.borrow()), ["a"]);
    fake.forbid("services", false);
    until_names(&mut source, &["a", "b"]).await;
}

#[tokio::test]
async fn a_hangup_lists_everything_anew() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let mut source = start(&fake).await;
    fake.until_asked(WATCH, 1).await;
    fake.forget_asked();
    source.reread.reread();
    fake.until_asked(LIST, 1).await;
    put_service(&fake, "b");
    until_names(&mut source, &["a", "b"]).await;
}

#[tokio::test]
async fn nothing_is_asked_while_nothing_happens_and_nothing_when_nobody_listens() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let source = start(&fake).await;
    // Every kind is watched: what is asked from here on is asked because of something.
    for path in
        ["namespaces", "nodes", "services", "endpointslices", "configmaps", "customresourcedefinitions"]
    {
        fake.until_asked(&format!("/{path}?allowWatchBookmarks"), 1).await;
    }
    fake.until_asked("/pods?allowWatchBookmarks", 2).await;
    fake.forget_asked();
    let mut source = source;
    put_service(&fake, "b");
    until_names(&mut source, &["a", "b"]).await;
    assert_eq!(fake.asked(""), [""; 0]);
    drop(source);
    // Its watches end with it: the server sees the connections go.
    fake.until_unused().await;
}
