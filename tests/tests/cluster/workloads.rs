//! Workloads as clusters have them: STRICT mutual TLS with the kubelet's probes green, apps that are rolled out anew under load, init
//! containers and Jobs.

use anyhow::{Context as _, Result, ensure};
use lab::cluster::{Cluster, Namespace};
use serde_json::json;

use crate::{
    installed::{Mesh, enrolled, meshed},
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

/// A name for the service, and a pod of the node's own network: nobody's address but the node's.
const OTHERS: &str = "
apiVersion: v1
kind: Service
metadata: { name: alias }
spec: { type: ExternalName, externalName: server.strict.svc.cluster.local }
---
apiVersion: v1
kind: Pod
metadata: { name: host }
spec:
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  terminationGracePeriodSeconds: 0
  containers:
    - { name: client, image: @IMAGE@, imagePullPolicy: Never, command: [sleep, infinity] }
";

/// A pod that the kubelet makes of a file: the API server hears of it later, and under another UID.
fn static_pod(cluster: &Cluster, namespace: &Namespace, node: &str) -> Result<()> {
    const DIR: &str = "/var/lib/kubelet/manifests";
    let container = json!({
        "name": "c", "image": cluster.client_image(), "imagePullPolicy": "Never", "command": ["sleep", "infinity"],
    });
    let manifest = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": { "name": "fixed", "namespace": namespace.name() },
        "spec": { "terminationGracePeriodSeconds": 0, "containers": [container] },
    });
    cluster.on_node(node, &format!("cat > {DIR}/fixed.json <<'END'\n{manifest}\nEND"))?;
    let pod = format!("pod/fixed-{node}");
    let started = ["--for=create", "--for=condition=Ready"]
        .iter()
        .try_for_each(|what| namespace.kubectl(&["wait", what, &pod, "--timeout=120s"]).map(drop));
    let is_in = enrolled(namespace);
    cluster.on_node(node, &format!("rm {DIR}/fixed.json"))?;
    started.context("a static pod in a namespace that is in the mesh")?;
    ensure!(!is_in?.iter().any(|pod| pod.starts_with("fixed")), "a static pod is in the mesh");
    namespace.kubectl(&["wait", "--for=delete", &pod, "--timeout=120s"]).map(drop)
}

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
        strict.apply(&OTHERS.replace("@IMAGE@", cluster.client_image()))?;
        strict.kubectl(&["wait", "--for=condition=Ready", "pod/host", "--timeout=120s"])?;
        ensure!(
            status(&strict, "host", server)? == "200",
            "a pod of the host's network is a stranger, as any"
        );
        ensure!(!enrolled(&strict)?.contains("host"), "a pod of the host's network is in the mesh");
        ensure!(status(&strict, node, "http://alias/passwd")? == "200", "a name that stands for the service");
        strict.apply(STRICT)?;
        let mut refused = String::new();
        for _ in 0..50 {
            refused = status(&plain, "stranger", server)?;
            if refused == "000" {
                break;
            }
        }
        ensure!(refused == "000", "plaintext is still answered: {refused}");
        ensure!(
            status(&strict, "host", server)? == "000",
            "plaintext of a pod of the host's network is answered"
        );
        ensure!(status(&strict, node, "http://alias/passwd")? == "200", "a name that stands for the service");
        // New pods become ready, so their probes pass; and nobody in the mesh notices.
        strict.kubectl(&["rollout", "restart", "deployment/server"])?;
        strict.kubectl(&["rollout", "status", "deployment/server", "--timeout=120s"])?;
        for node in &nodes {
            let answers = load::end(&strict, node)?;
            let failed = answers.iter().filter(|(_, status)| status != "200").count();
            ensure!(failed == 0 && answers.len() > 100, "{failed} of {} of {node} failed", answers.len());
        }
        static_pod(&cluster, &strict, node)?;
        strict.apply(&JOB.replace("@IMAGE@", cluster.client_image()))?;
        strict.kubectl(&["wait", "--for=condition=Complete", "job/asks", "--timeout=120s"])?;
        Ok(())
    })();
    rolled_out.with_context(|| mesh.said())
}
