//! TLS and TCP routes of a port.

use super::*;

/// Names of the stream routes of a port, each with its number of matches.
fn streams(snapshot: &Snapshot, port: u16) -> Vec<(String, usize)> {
    let port = snapshot.services[A].port_for("default", port).unwrap();
    port.streams.iter().map(|route| (route.name.to_string(), route.matches.len())).collect()
}

#[test]
fn those_of_the_port_and_the_mesh_in_order() {
    let to = "route: [{destination: {host: a, port: {number: 80}}}]";
    let spec = format!(
        "{{hosts: [a, x.example], gateways: [mesh, in], \
         tcp: [{{match: [{{port: 81}}], {to}}}, {{match: [{{gateways: [in]}}, {{}}], {to}}}, {{{to}}}], \
         tls: [{{match: [{{sniHosts: [x.example], gateways: [in]}}], {to}}}, \
         {{match: [{{sniHosts: [x.example], port: 80}}, {{sniHosts: [a]}}], {to}}}]}}"
    );
    let ports = "{name: x, port: 80}, {name: y, port: 81}";
    let text =
        service("default", "a", ports) + &istio("VirtualService default/a", &spec) + &super::gateways::bare();
    let (snapshot, problems) = build(&text);
    assert_eq!(problems, []);
    let named = |names: &[(&str, usize)]| -> Vec<(String, usize)> {
        names.iter().map(|(name, matches)| ((*name).to_owned(), *matches)).collect()
    };
    assert_eq!(streams(&snapshot, 80), named(&[("tls[1]", 2), ("tcp[1]", 1), ("tcp[2]", 0)]));
    assert_eq!(streams(&snapshot, 81), named(&[("tls[1]", 1), ("tcp[0]", 1), ("tcp[1]", 1), ("tcp[2]", 0)]));
    let route = &snapshot.services[A].port_for("default", 80).unwrap().streams[0];
    assert_eq!(&*route.origin, "VirtualService default/a");
    assert_eq!(routes(&snapshot, A, 80).len(), 1, "the default route of HTTP stays");
}

#[test]
fn a_destination_of_two_that_is_missing_is_a_problem_of_its_own() {
    let spec = "{hosts: [a], tcp: [{route: [{destination: {host: a}, weight: 0}, {destination: {host: b}, weight: 3}, \
                {destination: {host: a}, weight: 1}]}]}";
    let text = service("default", "a", "{port: 80}") + &istio("VirtualService default/a", spec);
    let (snapshot, problems) = build(&text);
    assert_problems(&problems, &["spec.tcp[0].route[1].destination.host: no Service has the host b.default"]);
    let backends = &snapshot.services[A].port_for("default", 80).unwrap().streams[0].backends;
    assert!(matches!(&backends[0].backend, Backend::Missing(_)));
    assert_eq!(backends.iter().map(|backend| backend.weight).collect::<Vec<_>>(), [3, 1]);
}
