//! Requests from every node to one service, one after another, while something happens to the cluster.

use anyhow::{Context as _, Result};
use lab::cluster::{Cluster, Namespace};

/// Servers of some bytes, behind a service. They go on for a moment when they are told to stop, as whoever is behind a balancer
/// should: others may not have heard of it yet.
const SERVICE: &str = "
apiVersion: apps/v1
kind: Deployment
metadata:
  name: server
spec:
  replicas: 2
  selector: { matchLabels: { app: server } }
  strategy: { rollingUpdate: { maxUnavailable: 0, maxSurge: 1 } }
  template:
    metadata:
      labels: { app: server }
    spec:
      terminationGracePeriodSeconds: 5
      containers:
        - name: server
          image: @IMAGE@
          imagePullPolicy: Never
          command: [\"busybox\", \"httpd\", \"-f\", \"-p\", \"8080\", \"-h\", \"/etc\"]
          lifecycle: { preStop: { exec: { command: [\"sleep\", \"3\"] } } }
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
                    curl -s -o /dev/null -w '%{http_code}\\n' @ASKED@; \
                    done > /tmp/answers 2>&1 &";

/// Starts the servers, and the load from each node once it has had its first answer, which says that the node knows the service.
/// The pods that ask are called as their nodes, whose names are returned.
pub fn begin(cluster: &Cluster, namespace: &Namespace) -> Result<Vec<String>> {
    serve(cluster, namespace)?;
    let nodes = cluster.nodes()?;
    for node in &nodes {
        namespace.client(node, node)?;
        begin_from(namespace, node, "http://server/passwd")?;
    }
    Ok(nodes)
}

/// Starts the load from a pod, once it has had its first answer. `asked`: what curl is told.
pub fn begin_from(namespace: &Namespace, pod: &str, asked: &str) -> Result<()> {
    let first = format!("until curl -sf -o /dev/null --max-time 5 {asked}; do :; done");
    namespace.exec(pod, &["timeout", "120", "sh", "-c", &first])?;
    namespace.exec(pod, &["sh", "-c", &LOAD.replace("@ASKED@", asked)]).map(drop)
}

/// Starts the servers alone.
pub fn serve(cluster: &Cluster, namespace: &Namespace) -> Result<()> {
    namespace.apply(&SERVICE.replace("@IMAGE@", cluster.client_image()))?;
    namespace.deployed()
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

/// Waits until a node has sent a request at this time or later, in seconds since 1970.
pub fn goes_on_until(namespace: &Namespace, node: &str, time: u64) -> Result<()> {
    let script = format!(
        "until [ \"$(tail -n 1 /tmp/answers | cut -d ' ' -f 1)\" -ge {time} ] 2>/dev/null; do sleep 0.2; done"
    );
    namespace.exec(node, &["timeout", "120", "sh", "-c", &script]).map(drop)
}
