//! Workloads as clusters have them: STRICT mutual TLS with the kubelet's probes green, apps that are rolled out anew under load, init
//! containers and Jobs.

use anyhow::{Context as _, Result, ensure};
use lab::cluster::{Cluster, Namespace};

use crate::{
    installed::{Mesh, meshed},
    load,
};

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default }
spec: { mtls: { mode: STRICT } }
";

/// Asks before it starts, and when it has; then it is done.
const JOB: &str = "
apiVersion: batch/v1
kind: Job
metadata: { name: asks }
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      initContainers:
        - { name: first, image: @IMAGE@, imagePullPolicy: Never, command: [curl, -sf, -o, /dev/null, http://server/passwd] }
      containers:
        - { name: then, image: @IMAGE@, imagePullPolicy: Never, command: [curl, -sf, -o, /dev/null, http://server/passwd] }
";

/// The status that a client sees; 000 where there is no answer.
fn status(namespace: &Namespace, client: &str, url: &str) -> Result<String> {
    let ask = format!("curl -s -o /dev/null -w '%{{http_code}}' --max-time 10 {url} || true");
    namespace.exec(client, &["sh", "-c", &ask])
}

#[test]
fn apps_are_rolled_out_under_strict_mutual_tls_and_no_request_fails() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let mesh = Mesh::install(&cluster)?;
    let (strict, plain) = (meshed(&cluster, "strict")?, cluster.namespace("plain")?);
    let rolled_out = (|| {
        let nodes = load::begin(&cluster, &strict)?;
        let node = nodes.first().context("a node")?;
        plain.client("stranger", node)?;
        let server = "http://server.strict/passwd";
        ensure!(
            status(&plain, "stranger", server)? == "200",
            "plaintext is taken as long as nothing forbids it"
        );
        strict.apply(STRICT)?;
        let mut refused = String::new();
        for _ in 0..50 {
            refused = status(&plain, "stranger", server)?;
            if refused == "000" {
                break;
            }
        }
        ensure!(refused == "000", "plaintext is still answered: {refused}");
        // New pods become ready, so their probes pass; and nobody in the mesh notices.
        strict.kubectl(&["rollout", "restart", "deployment/server"])?;
        strict.kubectl(&["rollout", "status", "deployment/server", "--timeout=120s"])?;
        for node in &nodes {
            let answers = load::end(&strict, node)?;
            let failed = answers.iter().filter(|(_, status)| status != "200").count();
            ensure!(failed == 0 && answers.len() > 100, "{failed} of {} of {node} failed", answers.len());
        }
        strict.apply(&JOB.replace("@IMAGE@", cluster.client_image()))?;
        strict.kubectl(&["wait", "--for=condition=Complete", "job/asks", "--timeout=120s"])?;
        Ok(())
    })();
    rolled_out.with_context(|| mesh.said())
}
