//! What the tests of both protocols share: a question of a client about a pod.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    source::read_text,
    state::compile::{Settings, compile},
};

/// Calls `ask` with a question of `app/client` at 10.0.0.1 to pod `app/pod`.
pub(super) fn with_question<T>(what: Subject<'_>, ask: impl FnOnce(&Question<'_>) -> T) -> T {
    let pod = "{apiVersion: v1, kind: Pod, metadata: {name: pod, namespace: app, labels: {app: pod}}, \
               spec: {serviceAccountName: server}, status: {podIP: 10.0.0.9}}\n";
    let (objects, _) = read_text(pod);
    let snapshot = compile(&objects, None, &Settings::default()).0;
    let client = "spiffe://cluster.local/ns/app/sa/client".parse().unwrap();
    let asked = Asked {
        workload: snapshot.workload_at("10.0.0.9".parse().unwrap()).unwrap(),
        destination: "10.0.0.9:8080".parse().unwrap(),
        source: Some(&client),
        client: "10.0.0.1:4000".parse().unwrap(),
        approved: &[],
    };
    ask(&Question { asked: &asked, source: None, what })
}

pub(super) fn request(method: &str, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
    let request = Request::builder().method(method).uri(uri);
    headers.iter().fold(request, |request, (name, value)| request.header(*name, *value)).body(()).unwrap()
}

/// A body of which this much is shown; the whole has 9 bytes.
pub(super) fn shown(body: Option<&'static str>, partial: bool) -> Shown {
    Shown { body: body.map(|text| Bytes::from_static(text.as_bytes())), partial, size: Some(9) }
}
