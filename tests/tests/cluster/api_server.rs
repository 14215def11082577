//! The API server may be away: what runs goes on meanwhile, and afterwards everything is as before. Tests of the mesh under
//! the same conditions stand on this one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use lab::cluster::Cluster;

/// A server of some bytes, behind a service.
pub const SERVICE: &str = "
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
pub const LOAD: &str = "while [ ! -e /tmp/stop ]; do \
                    date +%s | tr '\\n' ' '; \
                    curl -s -o /dev/null -w '%{http_code}\\n' http://server/passwd; \
                    done > /tmp/answers 2>&1 &";

fn now() -> Result<Duration> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?)
}

#[test]
fn pods_go_on_while_the_api_server_is_away() -> Result<()> {
    let Some(cluster) = Cluster::alone()? else { return Ok(()) };
    let namespace = cluster.namespace("api-server")?;
    namespace.apply(&SERVICE.replace("@IMAGE@", cluster.client_image()))?;
    namespace.kubectl(&["wait", "--for=condition=Ready", "pod/server", "--timeout=120s"])?;
    for node in cluster.nodes()? {
        namespace.client(&node, &node)?;
        // The first answer says that kube-proxy of this node knows the service.
        let first = "until curl -sf -o /dev/null --max-time 5 http://server/passwd; do :; done";
        namespace.exec(&node, &["timeout", "60", "sh", "-c", first])?;
        namespace.exec(&node, &["sh", "-c", LOAD])?;
    }
    cluster.stop("kube-apiserver")?;
    let gone = now()?;
    ensure!(cluster.kubectl(["get", "--raw", "/readyz"]).is_err(), "it answers, though it has ended");
    cluster.start("kube-apiserver")?;
    let back = now()?;
    for node in cluster.nodes()? {
        namespace.exec(&node, &["touch", "/tmp/stop"])?;
        let answers = namespace.exec(&node, &["cat", "/tmp/answers"])?;
        // The last line may not be whole yet.
        let whole = answers.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines: Vec<_> = whole.lines().filter_map(|line| line.split_once(' ')).collect();
        ensure!(
            lines.iter().all(|(_, status)| *status == "200"),
            "all requests of {node} succeed: {answers}"
        );
        let meanwhile = lines.iter().filter_map(|(sent, _)| sent.parse::<u64>().ok());
        let count = meanwhile.filter(|sent| (gone.as_secs()..=back.as_secs()).contains(sent)).count();
        ensure!(count > 0, "{node} sent requests while there was no API server: {answers}");
    }
    Ok(())
}
