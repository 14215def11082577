//! The chart's gateway: who is outside the mesh comes in by Istio's objects, over HTTP and HTTPS with the certificate of a Secret, to
//! pods that take mutual TLS alone; and nobody notices when the gateway, or its certificate, is replaced.

use anyhow::{Context as _, Result, ensure};
use lab::{
    cluster::{Cluster, Namespace},
    pki,
};
use serde_json::json;

use crate::{
    installed::{Mesh, SYSTEM, meshed},
    load,
};

const EDGE: &str = "
apiVersion: networking.istio.io/v1
kind: Gateway
metadata: { name: edge }
spec:
  selector: { istio: ingressgateway }
  servers:
    - { port: { number: 80, name: http, protocol: HTTP }, hosts: [shop.example] }
    - { port: { number: 443, name: https, protocol: HTTPS }, hosts: [shop.example], tls: { mode: SIMPLE, credentialName: shop-tls } }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: edge }
spec:
  hosts: [shop.example]
  gateways: [edge]
  http:
    - match: [{ uri: { prefix: /passwd } }]
      route: [{ destination: { host: server } }]
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default }
spec: { mtls: { mode: STRICT } }
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: from-the-gateway }
spec:
  selector: { matchLabels: { app: server } }
  rules: [{ from: [{ source: { principals: [cluster.local/ns/mesh-system/sa/mesh-gateway] } }] }]
";

/// By its name in the cluster, as one who knows it by DNS.
const BY_HTTP: &str = "-H 'Host: shop.example' http://mesh-gateway.mesh-system/passwd";
const BY_HTTPS: &str = "--cacert /tmp/ca.pem --connect-to shop.example:443:mesh-gateway.mesh-system:443 https://shop.example/passwd";

/// A Secret as `kubectl create secret tls` makes it.
fn secret(certificate: &pki::Authority) -> String {
    let data = json!({ "tls.crt": certificate.certificate, "tls.key": certificate.key });
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "stringData": data,
        "metadata": { "name": "shop-tls", "namespace": SYSTEM },
    });
    secret.to_string()
}

/// What the client believes from now on.
fn believes(outside: &Namespace, client: &str, certificate: &pki::Authority) -> Result<()> {
    let script = format!("cat > /tmp/ca.pem <<'END'\n{}\nEND", certificate.certificate);
    outside.exec(client, &["sh", "-c", &script]).map(drop)
}

/// Asks until there is an answer of this status.
fn until(outside: &Namespace, client: &str, asked: &str, status: &str) -> Result<()> {
    let one = format!("curl -s -o /dev/null --max-time 5 -w '%{{http_code}}' {asked}");
    let script = format!("until [ \"$({one})\" = {status} ]; do sleep 0.1; done");
    let answered = outside.exec(client, &["timeout", "60", "sh", "-c", &script]);
    answered.map(drop).with_context(|| format!("{client} is never answered {status} by {asked}"))
}

#[test]
fn who_is_outside_comes_in_by_the_gateway_which_is_replaced_under_load() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install_with(&cluster, &["gateway.enabled=true", "gateway.credentials={shop-tls}"])?;
    let came_in = (|| {
        let (shop, outside) = (meshed(&cluster, "shop")?, cluster.namespace("outside")?);
        load::serve(&cluster, &shop)?;
        let (first, second) = (pki::server(&["shop.example"])?, pki::server(&["shop.example"])?);
        shop.apply(EDGE)?;
        cluster.apply(&secret(&first))?;
        let nodes = cluster.nodes()?;
        let rolled = |what: &[&str]| {
            let arguments =
                [&["rollout"], what, &["deployment/mesh-gateway", "--namespace", SYSTEM]].concat();
            cluster.kubectl(arguments)
        };
        rolled(&["status", "--timeout=120s"])?;
        for node in &nodes {
            outside.client(node, node)?;
            believes(&outside, node, &first)?;
            until(&outside, node, BY_HTTP, "200")?;
            until(&outside, node, BY_HTTPS, "200")?;
        }
        let client = nodes.first().context("a node")?;
        for (asked, status) in [
            ("-H 'Host: other.example' http://mesh-gateway.mesh-system/passwd", "404"),
            ("-H 'Host: shop.example' http://mesh-gateway.mesh-system/group", "404"),
            // Past the gateway nobody comes in.
            ("http://server.shop/passwd", "000"),
        ] {
            until(&outside, client, asked, status)?;
        }
        for (node, asked) in nodes.iter().zip([BY_HTTP, BY_HTTPS]) {
            load::begin_from(&outside, node, asked)?;
        }
        rolled(&["restart"])?;
        rolled(&["status", "--timeout=180s"])?;
        for node in &nodes {
            let answers = load::end(&outside, node)?;
            let failed = answers.iter().filter(|(_, status)| status != "200").count();
            ensure!(failed == 0 && answers.len() > 100, "{failed} of {} of {node} failed", answers.len());
        }
        cluster.apply(&secret(&second))?;
        believes(&outside, client, &second)?;
        until(&outside, client, BY_HTTPS, "200")
    })();
    came_in.with_context(|| mesh.said())
}
