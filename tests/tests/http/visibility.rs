//! Rules hold for the clients they are there for: `exportTo`, and rules in the client's own namespace.

use anyhow::{Result, ensure};
use lab::{Pair, Pod, apps, require_root};

use crate::world::{counted, logged_times};

const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web-for-blue, namespace: blue }
spec:
  hosts: [web.default.svc.cluster.local]
  exportTo: ['.']
  http: [{ name: of-blue, route: [{ destination: { host: web.default.svc.cluster.local, subset: v1 } }] }]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  subsets: [{ name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } }]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web-for-red, namespace: red }
spec:
  host: web.default.svc.cluster.local
  subsets: [{ name: v1, labels: { version: v2 } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web-for-red, namespace: red }
spec:
  hosts: [web.default.svc.cluster.local]
  exportTo: [red]
  http: [{ name: of-red, route: [{ destination: { host: web.default.svc.cluster.local, subset: v1 } }] }]
";

#[tokio::test]
async fn each_namespace_has_its_own_view() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("views").await?;
    for (node, version) in [(&pair.a, "v1"), (&pair.b, "v2")] {
        let pod = node.pod(&format!("web-{version}")).labels([("app", "web"), ("version", version)]);
        pod.start().await?.serve(apps::http(8080)).await?;
    }
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    let (blue, red) =
        (pair.a.pod("blue").ns("blue").start().await?, pair.a.pod("red").ns("red").start().await?);
    pair.apply("rules.yaml", RULES).await?;
    for pod in [&blue, &red] {
        pod.enrolled().await?;
    }
    let seen = async |from: &Pod| {
        let tally = from.get(service.url(80, "/")).many(30, 3, None).await?;
        ensure!(tally.statuses.get(&200) == Some(&30), "{tally:?}");
        anyhow::Ok(tally.pods.into_keys().collect::<Vec<_>>())
    };
    ensure!(seen(&blue).await? == ["web-v1"]);
    ensure!(seen(&red).await? == ["web-v2"], "its own rule defines the subset");
    ensure!(seen(&pair.client).await? == ["web-v1", "web-v2"]);
    // Figures and log tell whose rule it was, and where it led.
    let cluster = "outbound|80|v1|web.default.svc.cluster.local";
    for (from, version) in [("blue", "web-v1"), ("red", "web-v2")] {
        let labels = [("reporter", "source"), ("source_workload", from), ("destination_workload", version)];
        counted(&pair.agent_a, "istio_requests_total", &labels, 30).await?;
        let route = format!("of-{from}");
        counted(&pair.agent_a, "mesh_route_requests_total", &[("route", &*route)], 30).await?;
        let line = [("src.namespace", from), ("route", &*route), ("cluster", cluster), ("status", "200")];
        let line = [&line[..], &[("dst.workload", version), ("reporter", "source")]].concat();
        logged_times(&pair.agent_a, &line, 30).await?;
    }
    let whole = [("cluster", "outbound|80||web.default.svc.cluster.local"), ("src.namespace", "default")];
    logged_times(&pair.agent_a, &[&whole[..], &[("reporter", "source")]].concat(), 30).await?;
    pair.finish().await
}
