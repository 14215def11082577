//! Probes and lifecycle hooks of a pod's containers, as the kubelet carries them out.
//!
//! Promises that what is listed is what the kubelet sends to this very pod: named ports are looked up in their own
//! container, a target is written as the kubelet writes it, and what goes to another `host` is not listed. What cannot be
//! understood makes no pod invalid: it is left out, and named with its field. Tested below.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use k8s_openapi::{
    api::core::v1::{Container, HTTPGetAction, LifecycleHandler, PodSpec, Probe, TCPSocketAction},
    apimachinery::pkg::util::intstr::IntOrString,
};
use mesh_common::maps::{PROBE_PORTS_OF_A_POD, port};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, percent_encode};

use super::field::FieldError;
use crate::state::snapshot::{ProbePort, ProbeRequest};

/// What the kubelet may ask of a pod with these addresses, by port, and what was left out.
pub fn declared(spec: &PodSpec, ips: &[IpAddr]) -> (Vec<ProbePort>, Vec<FieldError>) {
    let mut found = Found { ips, ports: BTreeMap::new(), left_out: BTreeSet::new(), problems: Vec::new() };
    for (i, container) in spec.containers.iter().enumerate() {
        found.container(container, &format!("spec.containers[{i}]"));
    }
    for (i, container) in spec.init_containers.iter().flatten().enumerate() {
        // Sidecars alone have probes.
        if container.restart_policy.as_deref() == Some("Always") {
            found.container(container, &format!("spec.initContainers[{i}]"));
        }
    }
    // Where only TCP probes are listed the kernel lets no byte of the kubelet's through: not where it is to send others.
    let Found { left_out, ports, .. } = &mut found;
    ports.retain(|port, requests| !requests.is_empty() || !left_out.contains(port));
    if found.ports.len() > PROBE_PORTS_OF_A_POD {
        let message = format!(
            "probes of {} ports: those beyond the first {PROBE_PORTS_OF_A_POD} have no privilege",
            found.ports.len()
        );
        found.problems.push(FieldError::new("spec.containers", message));
    }
    let ports = found.ports.into_iter().take(PROBE_PORTS_OF_A_POD);
    (ports.map(|(port, requests)| ProbePort { port, requests }).collect(), found.problems)
}

struct Found<'a> {
    ips: &'a [IpAddr],
    ports: BTreeMap<u16, Vec<ProbeRequest>>,
    /// Ports with a probe that has no privilege.
    left_out: BTreeSet<u16>,
    problems: Vec<FieldError>,
}

impl Found<'_> {
    fn container(&mut self, container: &Container, path: &str) {
        let probes = [
            ("livenessProbe", &container.liveness_probe),
            ("readinessProbe", &container.readiness_probe),
            ("startupProbe", &container.startup_probe),
        ];
        for (name, probe) in probes {
            if let Some(probe) = probe {
                self.probe(container, probe, &format!("{path}.{name}"));
            }
        }
        let Some(lifecycle) = &container.lifecycle else { return };
        for (name, hook) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
            if let Some(hook) = hook {
                self.hook(container, hook, &format!("{path}.lifecycle.{name}"));
            }
        }
    }

    fn probe(&mut self, container: &Container, probe: &Probe, path: &str) {
        if let Some(get) = &probe.http_get {
            self.http(container, get, &format!("{path}.httpGet"));
        }
        if let Some(socket) = &probe.tcp_socket {
            self.tcp(container, socket, &format!("{path}.tcpSocket"));
        }
        if let Some(grpc) = &probe.grpc {
            self.declare(number(grpc.port), Some(ProbeRequest::GrpcHealth), &format!("{path}.grpc"));
        }
    }

    fn hook(&mut self, container: &Container, hook: &LifecycleHandler, path: &str) {
        if let Some(get) = &hook.http_get {
            self.http(container, get, &format!("{path}.httpGet"));
        }
        if let Some(socket) = &hook.tcp_socket {
            self.tcp(container, socket, &format!("{path}.tcpSocket"));
        }
    }

    fn http(&mut self, container: &Container, get: &HTTPGetAction, path: &str) {
        if !self.is_own(get.host.as_deref()) {
            return;
        }
        let scheme = get.scheme.as_deref().filter(|scheme| !scheme.is_empty()).unwrap_or("HTTP");
        if !scheme.eq_ignore_ascii_case("HTTP") {
            let message = format!(
                "a probe by {scheme} has no privilege, for its path cannot be seen: where plaintext is refused it fails; \
                 probe by HTTP, TCP or gRPC, or exclude the port (mesh.io/exclude-inbound-ports)"
            );
            self.problems.push(FieldError::new(format!("{path}.scheme"), message));
            self.left_out.extend(resolve(container, &get.port));
            return;
        }
        let written = get.path.as_deref().unwrap_or_default();
        let Some(target) = target(written) else {
            let message = format!("{written:?} is no path: the probe has no privilege");
            self.problems.push(FieldError::new(format!("{path}.path"), message));
            self.left_out.extend(resolve(container, &get.port));
            return;
        };
        let request = ProbeRequest::Get(target.into());
        self.declare(resolve(container, &get.port), Some(request), path);
    }

    fn tcp(&mut self, container: &Container, socket: &TCPSocketAction, path: &str) {
        if self.is_own(socket.host.as_deref()) {
            self.declare(resolve(container, &socket.port), None, path);
        }
    }

    fn declare(&mut self, port: Option<u16>, request: Option<ProbeRequest>, path: &str) {
        let problem = match port {
            Some(number) if port::ALL.contains(&number) => format!("{number} is a port of the mesh itself"),
            Some(number) => {
                let requests = self.ports.entry(number).or_default();
                if let Some(request) = request.filter(|request| !requests.contains(request)) {
                    requests.push(request);
                }
                return;
            }
            None => "neither a port (1 to 65535) nor the name of one of its container".to_owned(),
        };
        let message = format!("{problem}: the probe has no privilege");
        self.problems.push(FieldError::new(format!("{path}.port"), message));
    }

    /// Whether the kubelet goes to this pod: no `host` means the pod.
    fn is_own(&self, host: Option<&str>) -> bool {
        let Some(host) = host.filter(|host| !host.is_empty()) else { return true };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host.parse::<IpAddr>().is_ok_and(|ip| self.ips.contains(&ip.to_canonical()))
    }
}

/// The port of a probe: a number, the name of a port of its own container, or a number written as text.
fn resolve(container: &Container, port: &IntOrString) -> Option<u16> {
    match port {
        IntOrString::Int(port) => number(*port),
        IntOrString::String(name) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_deref() == Some(name)).map(|port| port.container_port);
            number(named.or_else(|| name.parse().ok())?)
        }
    }
}

fn number(port: i32) -> Option<u16> {
    u16::try_from(port).ok().filter(|port| *port != 0)
}

/// The target of the request that the kubelet makes of a `path` (Go's `url.Parse` and `URL.String`): escaped where it has
/// to be, without a fragment, the query as it is written. `None` where Go would find a host or scheme in it.
fn target(path: &str) -> Option<String> {
    let whole = path;
    let (path, _) = path.split_once('#').unwrap_or((path, ""));
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    let malformed = || whole.bytes().any(|b| b.is_ascii_control()) || decoded(path).is_none();
    let target = if malformed() {
        // What is no URL is a path, whatever is in it.
        escaped(whole.as_bytes())
    } else {
        let path = if path.bytes().all(may_stand) { path.to_owned() } else { escaped(&decoded(path)?) };
        query.map_or(path.clone(), |query| format!("{path}?{query}"))
    };
    let target = if target.starts_with('/') { target } else { format!("/{target}") };
    let first = whole.split(['/', '?', '#']).next().unwrap_or_default();
    (!target.starts_with("//") && !first.contains(':')).then_some(target)
}

/// Bytes that a path keeps as they are written (Go's `validEncoded`).
fn may_stand(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~!$&'()*+,;=:@[]%/".contains(&byte)
}

/// The path without its escapes; `None` where one is broken.
fn decoded(path: &str) -> Option<Vec<u8>> {
    let whole = |escape: &str| {
        escape.as_bytes().first_chunk::<2>().is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    path.split('%').skip(1).all(whole).then(|| percent_decode_str(path).collect())
}

/// What Go's escaping of a path encodes: all but letters, digits and these.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~')
    .remove(b'$')
    .remove(b'&')
    .remove(b'+')
    .remove(b',')
    .remove(b'/')
    .remove(b':')
    .remove(b';')
    .remove(b'=')
    .remove(b'@');

fn escaped(path: &[u8]) -> String {
    percent_encode(path, ESCAPED).to_string()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(spec: Value) -> (Vec<ProbePort>, Vec<FieldError>) {
        let spec: PodSpec = serde_json::from_value(spec).unwrap();
        declared(&spec, &["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()])
    }

    /// The probes of one container, all declared.
    fn of(probe: &Value) -> Vec<ProbePort> {
        let (ports, problems) = read(json!({ "containers": [{ "name": "app", "livenessProbe": probe }] }));
        assert_eq!(problems, []);
        ports
    }

    fn port(port: u16, requests: &[ProbeRequest]) -> ProbePort {
        ProbePort { port, requests: requests.to_vec() }
    }

    fn get(target: &str) -> ProbeRequest {
        ProbeRequest::Get(target.into())
    }

    #[test]
    fn every_kind_of_probe_and_hook_is_found() {
        let http = |path: &str, port: Value| json!({ "httpGet": { "path": path, "port": port } });
        let spec = json!({
            "containers": [
                {
                    "name": "app",
                    "ports": [{ "name": "web", "containerPort": 8080 }],
                    "livenessProbe": http("/live", json!("web")),
                    "readinessProbe": http("/ready?full=1", json!(8080)),
                    "startupProbe": { "tcpSocket": { "port": "8080" } },
                    "lifecycle": { "postStart": http("/started", json!(8081)), "preStop": { "tcpSocket": { "port": 7 } } },
                },
                { "name": "rpc", "livenessProbe": { "grpc": { "port": 9000, "service": "x" } } },
            ],
            "initContainers": [
                { "name": "side", "restartPolicy": "Always", "readinessProbe": { "tcpSocket": { "port": 99 } } },
                { "name": "once", "readinessProbe": { "tcpSocket": { "port": 98 } } },
            ],
        });
        let expected = [
            port(7, &[]),
            port(99, &[]),
            port(8080, &[get("/live"), get("/ready?full=1")]),
            port(8081, &[get("/started")]),
            port(9000, &[ProbeRequest::GrpcHealth]),
        ];
        assert_eq!(read(spec), (expected.to_vec(), Vec::new()));
    }

    #[test]
    fn only_what_goes_to_the_pod_itself_is_its_own() {
        for host in ["", "10.0.0.1", "fd00::1", "[fd00::1]", "::ffff:10.0.0.1"] {
            assert_eq!(of(&json!({ "tcpSocket": { "host": host, "port": 80 } })), [port(80, &[])], "{host}");
        }
        for host in ["10.0.0.2", "127.0.0.1", "localhost", "app.default.svc"] {
            assert_eq!(of(&json!({ "httpGet": { "host": host, "port": 80 } })), [], "{host}");
        }
    }

    #[test]
    fn what_cannot_be_understood_has_no_privilege_and_is_named() {
        let table = [
            (json!({ "httpGet": { "port": "web" } }), "httpGet.port", "nor the name"),
            (json!({ "tcpSocket": { "port": 0 } }), "tcpSocket.port", "1 to 65535"),
            (json!({ "grpc": { "port": 70_000 } }), "grpc.port", "1 to 65535"),
            (json!({ "tcpSocket": { "port": 15_008 } }), "tcpSocket.port", "of the mesh"),
            (json!({ "httpGet": { "port": 443, "scheme": "HTTPS" } }), "httpGet.scheme", "HTTPS"),
            (json!({ "httpGet": { "port": 80, "path": "//host/x" } }), "httpGet.path", "is no path"),
            (json!({ "httpGet": { "port": 80, "path": "http://host/x" } }), "httpGet.path", "is no path"),
        ];
        for (probe, field, says) in table {
            let (ports, problems) =
                read(json!({ "containers": [{ "name": "app", "livenessProbe": probe }] }));
            assert_eq!(ports, [], "{probe}");
            assert_eq!(problems[0].field, format!("spec.containers[0].livenessProbe.{field}"));
            assert!(problems[0].message.contains(says), "{}", problems[0].message);
        }
        let many: Vec<_> = (1..=PROBE_PORTS_OF_A_POD + 1)
            .map(|port| json!({ "name": "app", "livenessProbe": { "tcpSocket": { "port": port } } }))
            .collect();
        let (ports, problems) = read(json!({ "containers": many }));
        assert_eq!((ports.len(), problems.len()), (PROBE_PORTS_OF_A_POD, 1));
    }

    #[test]
    fn a_probe_without_privilege_is_not_kept_away_by_a_bare_one_on_its_port() {
        for other in [json!({ "port": 443, "scheme": "HTTPS" }), json!({ "port": 443, "path": "//host/x" })] {
            let (ports, problems) = read(json!({ "containers": [
                { "name": "app", "livenessProbe": { "tcpSocket": { "port": 443 } } },
                { "name": "side", "readinessProbe": { "httpGet": other }, "startupProbe": { "tcpSocket": { "port": 80 } } },
            ]}));
            assert_eq!(ports, [port(80, &[])], "the kernel would drop the bytes of {other}");
            assert_eq!(problems.len(), 1);
        }
        let declared = json!({ "httpGet": { "port": 443 } });
        let (ports, _) = read(json!({ "containers": [
            { "name": "app", "livenessProbe": declared, "readinessProbe": { "httpGet": { "port": 443, "scheme": "HTTPS" } } },
        ]}));
        assert_eq!(ports, [port(443, &[get("/")])], "what is declared of it stays");
    }

    #[test]
    fn targets_are_written_as_the_kubelet_writes_them() {
        for (path, expected) in [
            ("", "/"),
            ("/", "/"),
            ("/health", "/health"),
            ("health", "/health"),
            ("/a/../b//c", "/a/../b//c"),
            ("/x?y=1&z=a b", "/x?y=1&z=a b"),
            ("/x?", "/x?"),
            ("?x=1", "/?x=1"),
            ("/x#y?z", "/x"),
            ("/a b", "/a%20b"),
            ("/%7euser", "/%7euser"),
            ("/%7e user", "/~%20user"),
            ("/ü", "/%C3%BC"),
            ("/50%?x", "/50%25%3Fx"),
            ("/a:b@c;d=e", "/a:b@c;d=e"),
        ] {
            assert_eq!(target(path).as_deref(), Some(expected), "{path}");
        }
    }
}
