//! Bookinfo as it is usually written, in all API versions: jason sees v2, everybody else v3.

use http::Request;

use super::*;
use crate::route;

const NAMESPACE: &str = "
apiVersion: v1
kind: Namespace
metadata:
  name: default
  labels: {mesh.io/dataplane-mode: node}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: bookinfo-reviews
";

fn app_service((app, vip): (&str, &str)) -> String {
    format!(
        "
---
apiVersion: v1
kind: Service
metadata:
  name: {app}
  labels: {{app: {app}, service: {app}}}
spec:
  clusterIP: {vip}
  ports:
  - port: 9080
    name: http
  selector:
    app: {app}
"
    )
}

fn app_pod(node: &str, app: &str, version: &str, ip: &str) -> String {
    format!(
        "
---
apiVersion: v1
kind: Pod
metadata:
  name: {app}-{version}
  labels: {{app: {app}, version: {version}}}
  annotations: {{mesh.io/netns: /run/netns/{app}-{version}}}
spec:
  serviceAccountName: bookinfo-{app}
  nodeName: {node}
  containers:
  - name: {app}
    ports:
    - containerPort: 9080
status:
  podIP: {ip}
"
    )
}

const RULES: &str = "
---
apiVersion: networking.istio.io/VERSION
kind: DestinationRule
metadata:
  name: reviews
spec:
  host: reviews
  subsets:
  - name: v1
    labels:
      version: v1
  - name: v2
    labels:
      version: v2
  - name: v3
    labels:
      version: v3
---
apiVersion: networking.istio.io/VERSION
kind: VirtualService
metadata:
  name: reviews
spec:
  hosts:
  - reviews
  http:
  - match:
    - headers:
        end-user:
          exact: jason
    route:
    - destination:
        host: reviews
        subset: v2
  - route:
    - destination:
        host: reviews
        subset: v3
";

fn bookinfo(version: &str) -> String {
    let services = [("productpage", "10.96.0.1"), ("reviews", "10.96.0.2"), ("ratings", "10.96.0.3")];
    let pods = [
        app_pod("node-0", "productpage", "v1", "10.0.0.1"),
        app_pod("node-1", "reviews", "v1", "10.0.0.2"),
        app_pod("node-0", "reviews", "v2", "10.0.0.3"),
        app_pod("node-1", "reviews", "v3", "10.0.0.4"),
        app_pod("node-0", "ratings", "v1", "10.0.0.5"),
    ];
    let rules = RULES.replace("VERSION", version);
    [NAMESPACE, &services.map(app_service).concat(), &pods.concat(), &rules].concat()
}

#[test]
fn jason_sees_v2_and_everybody_else_v3() {
    for version in ["v1alpha3", "v1beta1", "v1"] {
        let (snapshot, problems) = build(&bookinfo(version));
        assert_eq!(problems, [], "{version}");
        let service = snapshot.service_at("10.96.0.2".parse().unwrap(), "default").unwrap();
        let source = snapshot.workload_at("10.0.0.1".parse().unwrap()).unwrap();
        let endpoints = |user: Option<&str>| {
            let mut request = Request::builder().uri("/reviews/0").header("host", "reviews:9080");
            if let Some(user) = user {
                request = request.header("end-user", user);
            }
            let request = request.body(()).unwrap().into_parts().0;
            let routes = &service.port_for("default", 9080).unwrap().routes;
            let (found, _) = route::find(routes, &request, 9080, source).unwrap();
            let RouteAction::Forward(backends) = &found.action else { panic!("a route") };
            let Backend::Cluster(cluster) = &route::draw(backends).backend else { panic!("a cluster") };
            addresses(cluster)
        };
        assert_eq!(endpoints(Some("jason")), ["10.0.0.3:9080"], "{version}");
        for user in [None, Some("Jason"), Some("jason2"), Some("")] {
            assert_eq!(endpoints(user), ["10.0.0.4:9080"], "{version} {user:?}");
        }
        assert_eq!(service.ports[0].cluster.endpoints.len(), 3);
    }
}

#[test]
fn the_pods_are_enrolled_with_their_own_identity() {
    let (snapshot, _) = build(&bookinfo("v1"));
    let workload = snapshot.workload_at("10.0.0.3".parse().unwrap()).unwrap();
    assert_eq!(workload.identity.to_string(), "spiffe://cluster.local/ns/default/sa/bookinfo-reviews");
    assert_eq!(workload.netns.as_deref(), Some(std::path::Path::new("/run/netns/reviews-v2")));
    assert!(workload.enrolled);
    assert_eq!((workload.node.as_deref(), &*workload.canonical_revision), (Some("node-0"), "v2"));
}
