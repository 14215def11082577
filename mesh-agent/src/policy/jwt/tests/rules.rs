//! What authorization policies see of tokens.

use std::net::SocketAddr;

use super::*;
use crate::{
    policy::{self, Asked, Head, Ruling},
    report::Reporter,
};

const PLACE: &str = "10.0.0.9:80";

fn policy(action: &str, rule: &str) -> String {
    format!(
        "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: p, namespace: app}}, \
         spec: {{action: {action}, rules: [{rule}]}}}}"
    )
}

/// Whether a request with this token, or none, is permitted.
fn permitted(policy: &str, payload: Option<&Value>) -> bool {
    let snapshot =
        compiled(&[json!({"issuer": "https://issuer", "spaceDelimitedClaims": ["roles"]})], policy);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    let mut request =
        payload.map_or_else(|| Request::get("/").body(()).unwrap(), |payload| bearer(&token(payload)));
    let claims = settle(tokens(&snapshot), 80, &mut request, NOW).unwrap();
    let client: SocketAddr = "10.0.0.1:1".parse().unwrap();
    let asked = Asked { workload, destination: PLACE.parse().unwrap(), source: None, client, approved: &[] };
    let (method, headers) = (request.method(), request.headers());
    let head = Head { method, authority: "app", path: "/", headers, claims: claims.as_ref() };
    policy::request(&asked, &head, &Reporter::default()).is_ok()
}

#[test]
fn policies_ask_for_what_tokens_say() {
    let alice = json!({
        "iss": "https://issuer", "sub": "alice", "aud": ["app", "web"], "azp": "portal",
        "groups": ["dev", "ops"], "team": "red", "scope": "read write", "roles": "one two", "level": 7,
        "org": {"unit": {"name": "mesh"}, "tags": ["x", "y"]}, "admin": true, "empty": "",
        "https://claims.example/role": "lead",
    });
    let nobody = json!({"iss": "https://issuer"});
    let from = |source: &str| format!("{{from: [{{source: {{{source}}}}}]}}");
    let when = |key: &str, values: &str| format!("{{when: [{{key: '{key}', {values}}}]}}");
    let claim = |path: &str, value: &str| {
        when(&format!("request.auth.claims{path}"), &format!("values: ['{value}']"))
    };
    // The rule, and whether it holds for Alice, for a token that says nothing, and without a token.
    let table = [
        (from("requestPrincipals: ['*']"), [true, false, false]),
        (from("requestPrincipals: ['https://issuer/alice']"), [true, false, false]),
        (from("requestPrincipals: ['https://issuer/bob']"), [false, false, false]),
        (from("requestPrincipals: ['https://issuer/*']"), [true, false, false]),
        (from("requestPrincipals: ['https://issuer/al*']"), [true, false, false]),
        (from("requestPrincipals: ['*/alice']"), [true, false, false]),
        (from("requestPrincipals: ['*ice']"), [true, false, false]),
        (from("requestPrincipals: ['alice']"), [false, false, false]),
        (from("notRequestPrincipals: ['*']"), [false, true, true]),
        (from("notRequestPrincipals: ['https://issuer/alice']"), [false, true, true]),
        (from("notRequestPrincipals: ['https://issuer/bob']"), [true, true, true]),
        (from("requestPrincipals: ['*'], notRequestPrincipals: ['*/bob']"), [true, false, false]),
        (when("request.auth.principal", "values: ['https://issuer/alice']"), [true, false, false]),
        (when("request.auth.principal", "notValues: ['https://issuer/alice']"), [false, true, true]),
        (when("request.auth.principal", "values: ['*']"), [true, false, false]),
        (when("request.auth.audiences", "values: [web]"), [true, false, false]),
        (when("request.auth.audiences", "values: ['*']"), [true, false, false]),
        (when("request.auth.audiences", "values: ['we*']"), [true, false, false]),
        (when("request.auth.audiences", "values: [other]"), [false, false, false]),
        (when("request.auth.audiences", "notValues: [web]"), [false, true, true]),
        (when("request.auth.presenter", "values: [portal]"), [true, false, false]),
        (when("request.auth.presenter", "values: ['*tal']"), [true, false, false]),
        (when("request.auth.presenter", "notValues: [portal]"), [false, true, true]),
        (claim("[team]", "red"), [true, false, false]),
        (claim("[team]", "r*"), [true, false, false]),
        (claim("[team]", "*d"), [true, false, false]),
        (claim("[team]", "*"), [true, false, false]),
        (claim("[team]", "RED"), [false, false, false]),
        (claim("[groups]", "ops"), [true, false, false]),
        (claim("[groups]", "o*"), [true, false, false]),
        (claim("[groups]", "admin"), [false, false, false]),
        (when("request.auth.claims[groups]", "notValues: [ops]"), [false, true, true]),
        (when("request.auth.claims[groups]", "notValues: [admin]"), [true, true, true]),
        (when("request.auth.claims[groups]", "values: [dev], notValues: [ops]"), [false, false, false]),
        (claim("[scope]", "write"), [true, false, false]),
        (claim("[scope]", "read write"), [false, false, false]),
        (claim("[roles]", "two"), [true, false, false]),
        (claim("[org][unit][name]", "mesh"), [true, false, false]),
        (claim("[org][tags]", "y"), [true, false, false]),
        (claim("[org][unit]", "mesh"), [false, false, false]),
        (claim("[org][unit][name][more]", "mesh"), [false, false, false]),
        (claim("[team][name]", "red"), [false, false, false]),
        (claim("[org.unit.name]", "mesh"), [false, false, false]),
        (claim("[https://claims.example/role]", "lead"), [true, false, false]),
        (claim("[level]", "7"), [false, false, false]),
        (claim("[admin]", "true"), [false, false, false]),
        (claim("[empty]", "*"), [false, false, false]),
        (claim("[sub]", "alice"), [true, false, false]),
        (claim("[iss]", "https://issuer"), [true, true, false]),
    ];
    for (rule, expected) in table {
        let (allow, deny) = (policy("ALLOW", &rule), policy("DENY", &rule));
        let asked = [Some(&alice), Some(&nobody), None];
        assert_eq!(asked.map(|payload| permitted(&allow, payload)), expected, "ALLOW {rule}");
        assert_eq!(asked.map(|payload| !permitted(&deny, payload)), expected, "DENY {rule}");
    }
}

/// Connections are read where requests in them may have tokens, and only there.
#[test]
fn connections_are_read_where_tokens_are_looked_for() {
    let service = "{apiVersion: v1, kind: Service, metadata: {name: s, namespace: app}, spec: {selector: {app: pod}, \
                   ports: [{name: tcp-a, port: 7000}, {name: http-b, port: 80}, {name: tcp-c, port: 1, targetPort: 80}, \
                   {name: c, port: 9000}]}}";
    let reporter = Reporter::default();
    let snapshot = compiled(&[json!({"issuer": "https://issuer"})], service);
    let workload = snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap();
    // Whether it is read, and whether what turns out to be no request passes.
    for (port, read, passes) in
        [(7000, false, true), (80, true, false), (9000, true, true), (5000, true, true)]
    {
        let destination = SocketAddr::new("10.0.0.9".parse().unwrap(), port);
        let asked = Asked {
            workload,
            destination,
            source: None,
            client: "10.0.0.1:1".parse().unwrap(),
            approved: &[],
        };
        let ruling = policy::connection(&asked, &reporter);
        assert_eq!(matches!(ruling, Ok(Ruling::BytesDecide)), read, "{port}: {ruling:?}");
        assert_eq!(policy::opaque(&asked, None, &reporter).is_ok(), passes, "{port}");
        let open = policy::stands(&asked, policy::Open::Connection);
        assert_eq!(
            open.is_ok(),
            !read,
            "{port}: a connection that passed unread is cut where it would be read"
        );
        assert!(policy::stands(&asked, policy::Open::Requests).is_ok());
    }
}
