//! Kinds that come, change their versions, and go.

use super::*;

fn rule() -> Value {
    json!({"metadata": {"name": "v", "namespace": "default"},
           "spec": {"hosts": ["a"], "http": [{"name": "r", "route": [{"destination": {"host": "a"}}]}]}})
}

#[tokio::test]
async fn a_kind_that_nobody_has_installed_is_no_failure_and_is_followed_from_when_it_is() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    let mut source = start(&fake).await;
    assert_eq!(names(&source.snapshots.borrow()), ["a"]);
    assert_eq!(fake.asked("istio.io").len(), 0, "what is not there is not asked for");
    fake.define(ISTIO, "virtualservices", &["v1", "v1beta1"]);
    fake.put(ISTIO, "virtualservices", rule());
    source.snapshots.wait_for(|snapshot| named_routes(snapshot) == 1).await.unwrap();
    assert!(!fake.asked("/apis/networking.istio.io/v1/virtualservices").is_empty());
    assert_eq!(fake.asked("/apis/networking.istio.io/v1beta1/virtualservices").len(), 0, "v1 is the best");
    // With its definition its objects go, however they are deleted.
    fake.delete(
        "apiextensions.k8s.io",
        "customresourcedefinitions",
        "",
        "virtualservices.networking.istio.io",
    );
    source.snapshots.wait_for(|snapshot| named_routes(snapshot) == 0).await.unwrap();
}

#[tokio::test]
async fn of_the_served_versions_the_best_is_watched_and_another_one_when_that_is_served() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    fake.define(ISTIO, "virtualservices", &["v1beta1", "v1alpha3"]);
    fake.put(ISTIO, "virtualservices", rule());
    let mut source = start(&fake).await;
    assert_eq!(named_routes(&source.snapshots.borrow_and_update()), 1);
    assert!(!fake.asked("/apis/networking.istio.io/v1beta1/virtualservices").is_empty());
    assert_eq!(fake.asked("v1alpha3/virtualservices").len(), 0);
    fake.define(ISTIO, "virtualservices", &["v1"]);
    fake.until_asked("/apis/networking.istio.io/v1/virtualservices?allowWatchBookmarks", 1).await;
    fake.delete(ISTIO, "virtualservices", "default", "v");
    source.snapshots.wait_for(|snapshot| named_routes(snapshot) == 0).await.unwrap();
}

#[tokio::test]
async fn a_definition_that_is_not_served_yet_is_asked_about_until_it_is() {
    let fake = Fake::start().await;
    put_service(&fake, "a");
    fake.define(ISTIO, "virtualservices", &[]);
    fake.put(ISTIO, "virtualservices", rule());
    let mut source = start(&fake).await;
    fake.until_asked("GET /apis/networking.istio.io/v1?", 3).await;
    fake.serve(ISTIO, "virtualservices", &["v1"]);
    source.snapshots.wait_for(|snapshot| named_routes(snapshot) == 1).await.unwrap();
    let asked = fake.asked("GET /apis/networking.istio.io/v1?").len();
    put_service(&fake, "b");
    until_names(&mut source, &["a", "b"]).await;
    assert_eq!(
        fake.asked("GET /apis/networking.istio.io/v1?").len(),
        asked,
        "what is known is not asked again"
    );
}
