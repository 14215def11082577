//! What tests of the mesh take for granted of the cluster's nodes: pods with the host's paths, network and namespaces see
//! their own node and no other; pods reach one another across nodes by the addresses they have; the API server can be
//! reached from pods, and identifies them.

use anyhow::{Context as _, Result, ensure};
use lab::cluster::Cluster;
use serde_json::Value;

/// A pod on a node's own network, with its cgroups and its BPF file system, as the mesh's DaemonSet will have them.
fn host_pod(name: &str, node: &str, image: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: {name}
spec:
  nodeName: {node}
  hostNetwork: true
  hostPID: true
  terminationGracePeriodSeconds: 0
  containers:
    - name: host
      image: {image}
      imagePullPolicy: Never
      command: [\"sleep\", \"infinity\"]
      securityContext:
        privileged: true
      volumeMounts:
        - {{ name: bpf, mountPath: /host/bpf, mountPropagation: Bidirectional }}
        - {{ name: cgroup, mountPath: /host/cgroup }}
        - {{ name: plugins, mountPath: /host/plugins }}
  volumes:
    - {{ name: bpf, hostPath: {{ path: /sys/fs/bpf, type: Directory }} }}
    - {{ name: cgroup, hostPath: {{ path: /sys/fs/cgroup, type: Directory }} }}
    - {{ name: plugins, hostPath: {{ path: /opt/cni/bin, type: Directory }} }}
"
    )
}

#[test]
fn pods_of_the_host_see_their_own_node_alone() -> Result<()> {
    let Some(cluster) = Cluster::given()? else { return Ok(()) };
    let namespace = cluster.namespace("host-pods")?;
    let nodes = cluster.nodes()?;
    for node in &nodes {
        namespace.apply(&host_pod(node, node, cluster.client_image()))?;
    }
    for node in &nodes {
        namespace.kubectl(&["wait", "--for=condition=Ready", &format!("pod/{node}"), "--timeout=120s"])?;
    }
    for node in &nodes {
        assert_eq!(namespace.exec(node, &["hostname"])?.trim(), node);
        namespace.exec(node, &["mkdir", &format!("/host/bpf/{node}")])?;
        namespace.exec(node, &["touch", &format!("/host/plugins/of-{node}")])?;
    }
    for node in &nodes {
        let pinned = namespace.exec(node, &["ls", "/host/bpf"])?;
        // The kernel has entries of its own beside it.
        let own: Vec<_> =
            pinned.split_whitespace().filter(|name| nodes.iter().any(|node| node == name)).collect();
        assert_eq!(own, [node], "pins of {node}");
        let plugins = namespace.exec(node, &["ls", "/host/plugins"])?;
        let own: Vec<_> = plugins.split_whitespace().filter(|name| name.starts_with("of-")).collect();
        assert_eq!(own, [format!("of-{node}")], "plugins of {node}");
        // Its own cgroup is the root of what it sees, and pods are below it.
        let pods = namespace.exec(node, &["find", "/host/cgroup", "-maxdepth", "2", "-name", "kubepods"])?;
        ensure!(!pods.trim().is_empty(), "{node} has its pods in its cgroups");
        let strangers = namespace.exec(node, &["find", "/host/cgroup", "-name", "mesh-k8s*"])?;
        ensure!(strangers.trim().is_empty(), "{node} sees cgroups of other nodes: {strangers}");
        namespace.exec(node, &["rmdir", &format!("/host/bpf/{node}")])?;
        namespace.exec(node, &["rm", &format!("/host/plugins/of-{node}")])?;
    }
    Ok(())
}

#[test]
fn pods_keep_their_addresses_across_nodes_and_reach_the_api_server() -> Result<()> {
    let Some(cluster) = Cluster::given()? else { return Ok(()) };
    let namespace = cluster.namespace("addresses")?;
    let nodes = cluster.nodes()?;
    for node in &nodes {
        namespace.client(node, node)?;
    }
    let (first, last) = (&nodes[0], &nodes[nodes.len() - 1]);
    let address = |pod: &str| -> Result<String> {
        let pod = namespace.get(&["pod", pod])?;
        Ok(pod["status"]["podIP"].as_str().context("the pod has an address")?.to_owned())
    };
    let server = "nc -lp 7000 -e sh -c 'netstat -tn | grep :7000' >/dev/null 2>&1 &";
    namespace.exec(last, &["sh", "-c", server])?;
    let call = format!("until echo | nc {} 7000 2>/dev/null; do :; done", address(last)?);
    let seen = namespace.exec(first, &["timeout", "120", "sh", "-c", &call])?;
    ensure!(seen.contains(&address(first)?), "{last} sees the address of {first}: {seen}");
    // By its service, with the certificate and the token that every pod is given.
    let script = "cd /var/run/secrets/kubernetes.io/serviceaccount && curl -sS --cacert ca.crt \
                  -H \"Authorization: Bearer $(cat token)\" -H 'Content-Type: application/json' \
                  -d '{\"apiVersion\":\"authentication.k8s.io/v1\",\"kind\":\"SelfSubjectReview\"}' \
                  https://kubernetes.default.svc/apis/authentication.k8s.io/v1/selfsubjectreviews";
    let review: Value = serde_json::from_str(&namespace.exec(first, &["sh", "-c", script])?)?;
    assert_eq!(
        review["status"]["userInfo"]["username"], "system:serviceaccount:addresses:default",
        "{review}"
    );
    Ok(())
}
