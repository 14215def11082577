//! Secrets that rules name, and no others.

use super::*;
use crate::state::compile::GatewayPod;

fn rule(credential: &str) -> Value {
    json!({
        "metadata": {"name": "d", "namespace": "default"},
        "spec": {"host": "a", "trafficPolicy": {"tls": {"mode": "SIMPLE", "credentialName": credential}}},
    })
}

fn secret(namespace: &str, name: &str) -> Value {
    // base64 of "roots"
    json!({"metadata": {"name": name, "namespace": namespace}, "type": "Opaque", "data": {"ca.crt": "cm9vdHM="}})
}

/// Which were asked for, by path and selector.
fn asked_for(fake: &Fake) -> BTreeSet<String> {
    let one = |asked: &String| {
        let path = asked.split(['?', ' ']).nth(1).unwrap().to_owned();
        let selector =
            asked.split(['?', '&']).find(|part| part.starts_with("fieldSelector=")).unwrap_or("all");
        format!("{path} {selector}")
    };
    fake.asked("secrets").iter().map(one).collect()
}

#[tokio::test]
async fn only_what_rules_name_is_asked_for_and_only_for_as_long() {
    let fake = Fake::start().await;
    fake.define(ISTIO, "destinationrules", &["v1"]);
    put_service(&fake, "a");
    fake.put("", "secrets", secret("default", "one"));
    fake.put("", "secrets", secret("default", "unnamed"));
    fake.put("", "secrets", secret("other", "one"));
    fake.put(ISTIO, "destinationrules", rule("one"));
    let mut source = start(&fake).await;
    assert_eq!(
        source.problems.borrow().len(),
        0,
        "it is there from the start: {:?}",
        source.problems.borrow()
    );
    let of = |name: &str| format!("/api/v1/namespaces/default/secrets fieldSelector=metadata.name={name}");
    assert_eq!(asked_for(&fake), [of("one"), of("one-cacert")].into());
    // Another one, which comes later.
    fake.put(ISTIO, "destinationrules", rule("two"));
    until_problem(&mut source, "there is no Secret default/two").await;
    fake.put("", "secrets", secret("default", "two"));
    source.problems.wait_for(|problems| problems.is_empty()).await.unwrap();
    fake.forget_asked();
    fake.cut();
    fake.until(|fake| asked_for(fake).len() == 2).await;
    assert_eq!(asked_for(&fake), [of("two"), of("two-cacert")].into(), "the first are not watched any more");
    fake.delete("", "secrets", "default", "two");
    until_problem(&mut source, "there is no Secret default/two").await;
}

fn gateway(credential: &str) -> Value {
    json!({
        "metadata": {"name": "g", "namespace": "shop"},
        "spec": {"selector": {"app": "a"}, "servers": [{
            "port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["*"],
            "tls": {"mode": "SIMPLE", "credentialName": credential},
        }]},
    })
}

/// Those of the gateway's own namespace, whoever wrote the `Gateway`; and nobody else asks for them.
#[tokio::test]
async fn what_a_gateway_shows_is_read_by_its_own_process_alone() {
    let fake = Fake::start().await;
    fake.define(ISTIO, "gateways", &["v1"]);
    fake.put("", "pods", pod("in", "here", "10.0.0.1"));
    fake.put(ISTIO, "gateways", gateway("one"));
    let _agent = start(&fake).await;
    assert_eq!(asked_for(&fake), BTreeSet::new());
    let own = GatewayPod { namespace: "default".into(), name: "in".into() };
    let settings = Settings { node: None, gateway: Some(own), ..settings() };
    let mut source = follow(&fake.cluster(), settings, &Sandboxes::default(), patience()).await.unwrap();
    until_problem(&mut source, "there is no Secret default/one").await;
    let of = |name: &str| format!("/api/v1/namespaces/default/secrets fieldSelector=metadata.name={name}");
    assert_eq!(asked_for(&fake), [of("one")].into());
    fake.put(ISTIO, "gateways", gateway("two"));
    until_problem(&mut source, "there is no Secret default/two").await;
    // Its own labels say which Gateways it serves.
    let mut other = pod("in", "here", "10.0.0.1");
    other["metadata"]["labels"]["app"] = json!("b");
    fake.put("", "pods", other);
    source.problems.wait_for(|problems| problems.is_empty()).await.unwrap();
    fake.forget_asked();
    fake.cut();
    fake.until(|fake| !fake.asked("/pods").is_empty()).await;
    assert_eq!(asked_for(&fake), BTreeSet::new(), "none is watched any more");
}
