//! Tokens: whatever a client puts where one is looked for, it is refused or passed over, and never believed.

use std::{net::IpAddr, sync::LazyLock};

use http::{HeaderValue, Request};
use mesh_agent::{
    policy::jwt::settle,
    source::read_text,
    state::{
        compile::{Settings, compile},
        snapshot::Snapshot,
    },
};

/// A pod whose rules look everywhere. Nobody has the private halves of these keys, which are but numbers.
static RULES: LazyLock<Snapshot> = LazyLock::new(|| {
    let x = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc";
    let n = "9".repeat(342);
    let jwks = format!(
        r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{x}"}},{{"kty":"RSA","kid":"rsa","n":"{n}","e":"AQAB"}},
        {{"kty":"EC","crv":"P-256","x":"{x}","y":"{x}"}}]}}"#
    );
    let text = format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: pod}}, status: {{podIP: 10.0.0.9}}}}\n---\n\
         {{apiVersion: security.istio.io/v1, kind: RequestAuthentication, metadata: {{name: a}}, spec: {{jwtRules: [{{\
         issuer: a, jwks: '{jwks}', fromHeaders: [{{name: authorization, prefix: 'Bearer '}}, {{name: x-token, prefix: t}}], \
         fromParams: [t], fromCookies: [c], outputPayloadToHeader: x-payload, \
         outputClaimToHeaders: [{{header: x-sub, claim: sub}}]}}]}}}}\n"
    );
    let (objects, problems) = read_text(&text);
    assert_eq!(problems, []);
    compile(&objects, None, &Settings::default()).0
});

/// Puts the bytes where tokens are looked for, in turn.
///
/// # Panics
/// Where what the module promises does not hold.
pub fn run(input: &[u8]) {
    let address = IpAddr::from([10, 0, 0, 9]);
    let Some(pod) = RULES.workload_at(address) else { panic!("the pod is there") };
    let tokens = &pod.authentication.tokens;
    for (name, before) in [("authorization", "Bearer "), ("x-token", "t"), ("cookie", "c="), ("cookie", "")] {
        let Ok(value) = HeaderValue::from_bytes(&[before.as_bytes(), input].concat()) else { break };
        let Ok(mut request) = Request::get("/").header(name, value).header("x-sub", "root").body(()) else {
            return;
        };
        let settled = settle(tokens, 80, &mut request, 1_800_000_000);
        assert!(!matches!(settled, Ok(Some(_))), "{name}: believed");
        assert_eq!(
            settled.is_ok(),
            !request.headers().contains_key("x-sub"),
            "{name}: what is the rules' to write"
        );
    }
    let Ok(text) = str::from_utf8(input) else { return };
    for target in [format!("/?t={text}"), format!("/?{text}")] {
        let Ok(mut request) = Request::get(target).body(()) else { continue };
        assert!(!matches!(settle(tokens, 80, &mut request, 0), Ok(Some(_))), "{text}: believed");
    }
}
