//! Which mode holds for which pod and port, and by whom.

use super::*;

/// A `PeerAuthentication`: `namespace/name [created]`.
fn peers(place: &str, spec: &str) -> String {
    istio(&format!("PeerAuthentication {place}"), spec).replace("networking.", "security.")
}

/// The mode of a port of the pod at this address, and who has set it.
fn of(snapshot: &Snapshot, ip: &str, port: u16) -> String {
    let workload = snapshot.workload_at(ip.parse().unwrap()).unwrap();
    let mtls = workload.authentication.of(port);
    format!("{} {}", mtls.mode.word(), mtls.by.as_deref().unwrap_or("-"))
}

const STRICT: &str = "{mtls: {mode: STRICT}}";
const PERMISSIVE: &str = "{mtls: {mode: PERMISSIVE}}";
const DISABLE: &str = "{mtls: {mode: DISABLE}}";
const UNSET: &str = "{mtls: {mode: UNSET}}";
const WEB: &str = "selector: {matchLabels: {app: web}}";

#[test]
fn the_narrowest_that_says_something_holds() {
    let workload = |mode: &str| peers("app/web", &format!("{{{WEB}, mtls: {{mode: {mode}}}}}"));
    let port = |ports: &str| peers("app/web", &format!("{{{WEB}, portLevelMtls: {{{ports}}}}}"));
    let both = peers(
        "app/web",
        &format!("{{{WEB}, mtls: {{mode: STRICT}}, portLevelMtls: {{80: {{mode: DISABLE}}}}}}"),
    );
    let mesh = |spec| peers("istio-system/mesh", spec);
    let namespace = |spec| peers("app/all", spec);
    // What is written, and what holds for ports 80 and 90 of app/web.
    for (written, expected) in [
        (vec![], ["PERMISSIVE -"; 2]),
        (vec![mesh(STRICT)], ["STRICT istio-system/mesh"; 2]),
        (vec![mesh(UNSET)], ["PERMISSIVE -"; 2]),
        (vec![mesh(STRICT), namespace(PERMISSIVE)], ["PERMISSIVE app/all"; 2]),
        (vec![mesh(STRICT), namespace(UNSET)], ["STRICT istio-system/mesh"; 2]),
        (vec![mesh(STRICT), namespace("{}")], ["STRICT istio-system/mesh"; 2]),
        (vec![mesh(PERMISSIVE), namespace(STRICT)], ["STRICT app/all"; 2]),
        (vec![namespace(STRICT), workload("PERMISSIVE")], ["PERMISSIVE app/web"; 2]),
        (vec![namespace(STRICT), workload("DISABLE")], ["PERMISSIVE app/web"; 2]),
        (vec![namespace(STRICT), workload("UNSET")], ["STRICT app/all"; 2]),
        (vec![namespace(DISABLE), workload("STRICT")], ["STRICT app/web"; 2]),
        (vec![port("80: {mode: STRICT}")], ["STRICT app/web", "PERMISSIVE -"]),
        (
            vec![mesh(STRICT), port("80: {mode: PERMISSIVE}")],
            ["PERMISSIVE app/web", "STRICT istio-system/mesh"],
        ),
        (vec![mesh(STRICT), port("80: {mode: UNSET}")], ["STRICT istio-system/mesh"; 2]),
        (vec![mesh(STRICT), port("80: null, 90: {}")], ["STRICT istio-system/mesh"; 2]),
        (vec![mesh(PERMISSIVE), both], ["PERMISSIVE app/web", "STRICT app/web"]),
    ] {
        let (snapshot, problems) =
            build(&[vec![pod("app", "web", "v1", "10.0.0.1")], written.clone()].concat().concat());
        assert_problems(&problems, &[]);
        assert_eq!([80, 90].map(|port| of(&snapshot, "10.0.0.1", port)), expected, "{written:#?}");
    }
}

#[test]
fn a_scope_is_its_own_namespaces_and_the_root_namespaces_is_the_mesh() {
    let text = [
        pod("app", "web", "v1", "10.0.0.1"),
        pod("app", "db", "v1", "10.0.0.2"),
        pod("other", "web", "v1", "10.0.0.3"),
        pod("istio-system", "web", "v1", "10.0.0.4"),
        peers("app/web", &format!("{{{WEB}, mtls: {{mode: STRICT}}}}")),
        peers("other/all", DISABLE),
        // A selector selects pods of its own namespace, in the root namespace too.
        peers("istio-system/web", &format!("{{{WEB}, mtls: {{mode: PERMISSIVE}}}}")),
        peers("istio-system/mesh", STRICT),
    ]
    .concat();
    let (snapshot, _) = build(&text);
    let all =
        |snapshot: &Snapshot| ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"].map(|ip| of(snapshot, ip, 80));
    let mesh = "STRICT istio-system/mesh";
    assert_eq!(
        all(&snapshot),
        ["STRICT app/web", mesh, "PERMISSIVE other/all", "PERMISSIVE istio-system/web"]
    );

    // Another root namespace, another mesh.
    let (objects, _) = read_text(&text);
    let settings = Settings { root_namespace: "other".into(), ..settings() };
    let (snapshot, _) = compile(&objects, None, &settings);
    let mesh = "PERMISSIVE other/all";
    assert_eq!(all(&snapshot), ["STRICT app/web", mesh, mesh, "PERMISSIVE istio-system/web"]);
}

#[test]
fn the_oldest_of_a_scope_holds_then_the_first_by_name() {
    let (new, old) = ("2026-02-02T00:00:00Z", "2026-01-01T00:00:00Z");
    for (first, second, expected) in [
        (format!("app/a {new}"), format!("app/b {old}"), "PERMISSIVE app/b"),
        (format!("app/a {old}"), format!("app/b {new}"), "STRICT app/a"),
        (format!("app/b {old}"), format!("app/a {old}"), "PERMISSIVE app/a"),
        // What has no date comes from no cluster, and counts as the youngest.
        ("app/a".to_owned(), format!("app/b {new}"), "PERMISSIVE app/b"),
        ("app/b".to_owned(), "app/a".to_owned(), "PERMISSIVE app/a"),
    ] {
        for selector in ["", "selector: {matchLabels: {app: web}}, "] {
            let spec = |mode: &str| format!("{{{selector}mtls: {{mode: {mode}}}}}");
            let written = peers(&first, &spec("STRICT")) + &peers(&second, &spec("PERMISSIVE"));
            let (snapshot, _) = build(&(pod("app", "web", "v1", "10.0.0.1") + &written));
            assert_eq!(of(&snapshot, "10.0.0.1", 80), expected, "{written}");
        }
    }
}
