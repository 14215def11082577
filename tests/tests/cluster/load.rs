//! Requests from every node to one server, one after another, while something happens to the cluster.

use anyhow::{Context as _, Result};
use lab::cluster::{Cluster, Namespace};

/// A server of some bytes, behind a service.
const SERVICE: &str = "
apiVersion: v1
kind: Pod
metadata:
  name: server
  labels: { app: server }
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: server
      image: @IMAGE@
      imagePullPolicy: Never
      command: [\"busybox\", \"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/etc\"]
      readinessProbe:
        httpGet: { path: /passwd, port: 8080 }
        periodSeconds: 1
---
apiVersion: v1
kind: Service
metadata:
  name: server
spec:
  selector: { app: server }
  ports: [{ name: http, port: 80, targetPort: 8080 }]
";

/// Each line: when the request was sent, in seconds since 1970, and the status of its answer.
const LOAD: &str = "while [ ! -e /tmp/stop ]; do \
                    date +%s | tr '\\n' ' '; \
                    curl -s -o /dev/null -w '%{http_code}\\n' http://server/passwd; \
                    done > /tmp/answers 2>&1 &";

/// Starts the server, and the load from each node once it has had its first answer, which says that the node knows the service.
/// The pods that ask are called as their nodes, whose names are returned.
pub fn begin(cluster: &Cluster, namespace: &Namespace) -> Result<Vec<String>> {
    namespace.apply(&SERVICE.replace("@IMAGE@", cluster.client_image()))?;
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod/server", "--timeout=120s"])?;
    let nodes = cluster.nodes()?;
    for node in &nodes {
        namespace.client(node, node)?;
        let first = "until curl -sf -o /dev/null --max-time 5 http://server/passwd; do :; done";
        namespace.exec(node, &["timeout", "60", "sh", "-c", first])?;
        namespace.exec(node, &["sh", "-c", LOAD])?;
    }
    Ok(nodes)
}

/// Ends the load from a node: when each of its requests was sent, in seconds since 1970, and the status of its answer.
pub fn end(namespace: &Namespace, node: &str) -> Result<Vec<(u64, String)>> {
    namespace.exec(node, &["touch", "/tmp/stop"])?;
    let answers = namespace.exec(node, &["cat", "/tmp/answers"])?;
    // The last line may not be whole yet.
    let whole = answers.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let read = |line: &str| {
        let (sent, status) = line.split_once(' ')?;
        Some((sent.parse().ok()?, status.to_owned()))
    };
    whole.lines().map(|line| read(line).with_context(|| format!("{node} says {line:?}"))).collect()
}
