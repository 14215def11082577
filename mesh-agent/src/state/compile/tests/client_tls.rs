//! What `tls` comes to, and that it is never less than the rule says.

use super::*;
use crate::state::{
    resource::{Object, Resource, file_key},
    snapshot::Origination,
};

const SECRETS: &str = "---
{apiVersion: v1, kind: Secret, metadata: {name: full}, stringData: {tls.crt: one, tls.key: two, ca.crt: six}}
---
{apiVersion: v1, kind: Secret, metadata: {name: roots-cacert}, stringData: {cacert: six, ca.crl: ten}}
---
{apiVersion: v1, kind: Secret, metadata: {name: password}, stringData: {password: secret}}
";

fn text(tls: &str) -> String {
    let rule = format!("{{host: a, trafficPolicy: {{tls: {{{tls}}}}}}}");
    service("default", "a", "{port: 80}") + SECRETS + &istio("DestinationRule default/a", &rule)
}

fn of(snapshot: &Snapshot) -> Origination {
    snapshot.services[A].port_for("default", 80).unwrap().cluster.tls.clone()
}

#[test]
fn every_mode_comes_to_what_it_says() {
    let none = build(&service("default", "a", "{port: 80}")).0;
    assert!(matches!(of(&none), Origination::Plaintext));
    assert!(matches!(of(&build(&text("mode: DISABLE")).0), Origination::Plaintext));
    assert!(matches!(of(&build(&text("mode: ISTIO_MUTUAL")).0), Origination::MeshOnly));
    let (snapshot, problems) =
        build(&text("mode: MUTUAL, credentialName: full, sni: a.example, subjectAltNames: [b]"));
    assert_eq!(problems, []);
    let Origination::Tls(tls) = of(&snapshot) else { panic!("{:?}", of(&snapshot)) };
    let shows = tls.terms.shows.as_ref().unwrap();
    assert_eq!(
        (&*shows.chain, &*shows.key, tls.terms.roots.as_deref()),
        (&b"one"[..], &b"two"[..], Some(&b"six"[..]))
    );
    assert_eq!((&*tls.terms.server, tls.terms.names.concat()), ("a.example", "b".to_owned()));
    let Origination::Tls(tls) = of(&build(&text("mode: SIMPLE, credentialName: roots")).0) else {
        panic!("TLS")
    };
    assert_eq!((&*tls.terms.server, tls.terms.roots.as_deref()), (A, Some(&b"six"[..])));
    assert_eq!(tls.terms.revoked.as_deref(), Some(&b"ten"[..]));
    assert!(tls.terms.shows.is_none());
}

/// Compiles a rule in a mesh whose source has read these files.
fn with_files(
    tls: &str,
    files: &[(&str, Result<&str, &str>)],
    before: Option<&Snapshot>,
) -> (Snapshot, Vec<Problem>) {
    let (mut objects, refused) = read_text(&text(tls));
    assert_eq!(refused, [], "{tls}");
    for (path, content) in files {
        let content = content.map(|text| Arc::from(text.as_bytes())).map_err(str::to_owned);
        let object = Arc::new(Object { file: (*path).into(), resource: Resource::File(content) });
        objects.insert(file_key(path), object);
    }
    compile(&objects, before, &settings())
}

#[test]
fn files_come_in_the_place_of_a_secret() {
    let written = "clientCertificate: a, privateKey: b, caCertificates: c, caCrl: d";
    let mutual = format!("mode: MUTUAL, {written}");
    let files = [("a", Ok("one")), ("b", Ok("two")), ("c", Ok("six")), ("d", Ok("ten"))];
    let (before, problems) = with_files(&mutual, &files, None);
    assert_eq!(problems, []);
    let Origination::Tls(tls) = of(&before) else { panic!("{:?}", of(&before)) };
    let shows = tls.terms.shows.as_ref().unwrap();
    assert_eq!((&*shows.chain, &*shows.key), (&b"one"[..], &b"two"[..]));
    let believed = (tls.terms.roots.as_deref(), tls.terms.revoked.as_deref());
    assert_eq!(believed, (Some(&b"six"[..]), Some(&b"ten"[..])));

    // What they say later holds for new connections, and for none that are there.
    let Origination::Tls(same) = of(&with_files(&mutual, &files, Some(&before)).0) else { panic!("TLS") };
    assert!(Arc::ptr_eq(&same, &tls));
    let renewed = [("a", Ok("new")), ("b", Ok("two")), ("c", Ok("six")), ("d", Ok("ten"))];
    let Origination::Tls(other) = of(&with_files(&mutual, &renewed, Some(&before)).0) else { panic!("TLS") };
    assert!(other.id != tls.id && &*other.terms.shows.as_ref().unwrap().chain == b"new");

    // Without MUTUAL nothing is shown, nor asked for.
    let simple = format!("mode: SIMPLE, {written}");
    let (snapshot, problems) = with_files(&simple, &[("c", Ok("six")), ("d", Ok("ten"))], None);
    assert_eq!(problems, []);
    assert!(matches!(of(&snapshot), Origination::Tls(tls) if tls.terms.shows.is_none()));
}

#[test]
fn files_that_are_not_there_come_to_no_connection() {
    /// The fields, what is in the files they name, the field that is wrong, and why.
    type Row<'t> = (&'t str, &'t [(&'t str, Result<&'t str, &'t str>)], &'t str, &'t str);
    let gone = [("c", Err("the file is not there"))];
    let table: [Row<'_>; 3] = [
        // Where nobody reads files: in a cluster.
        ("mode: SIMPLE, caCertificates: c", &[], "tls.caCertificates", "name that by credentialName"),
        ("mode: SIMPLE, caCrl: c", &gone, "tls.caCrl", "is not there"),
        (
            "mode: MUTUAL, clientCertificate: a, privateKey: c",
            &[("a", Ok("one"))],
            "tls.privateKey",
            "directory",
        ),
    ];
    for (tls, files, field, expected) in table {
        let (snapshot, problems) = with_files(tls, files, None);
        assert_problems(&problems, &[expected]);
        assert!(texts(&problems)[0].contains(field), "{problems:?}");
        let Origination::Broken(why) = of(&snapshot) else { panic!("{tls}: {:?}", of(&snapshot)) };
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn what_is_not_there_is_said_and_comes_to_no_connection() {
    let table = [
        ("mode: SIMPLE, credentialName: none", "there is no Secret default/none"),
        ("mode: SIMPLE, credentialName: password", "has no certificate of an authority"),
        ("mode: MUTUAL, credentialName: roots", "has no certificate and key"),
    ];
    for (tls, expected) in table {
        let (snapshot, problems) = build(&text(tls));
        assert_problems(&problems, &[expected]);
        assert!(texts(&problems)[0].contains("spec.trafficPolicy.tls.credentialName"), "{problems:?}");
        let Origination::Broken(why) = of(&snapshot) else { panic!("{tls}: {:?}", of(&snapshot)) };
        assert!(why.contains(expected), "{why}");
    }
}

#[test]
fn what_stays_the_same_keeps_what_was_made_of_it() {
    let same = |tls: &str, then: &str| {
        let (before, _) = build(&text(tls));
        let (after, _) = build_on(&text(then), Some(&before));
        let (Origination::Tls(before), Origination::Tls(after)) = (of(&before), of(&after)) else {
            panic!("TLS")
        };
        (Arc::ptr_eq(&before, &after), before.id == after.id)
    };
    assert_eq!(same("mode: SIMPLE", "mode: SIMPLE"), (true, true));
    assert_eq!(same("mode: SIMPLE", "mode: SIMPLE, sni: b.example"), (false, false));
}

#[test]
fn a_rule_is_told_that_the_mesh_has_its_own_tls() {
    let enrolled = "---\n{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {app: a, mesh.io/dataplane-mode: node}, \
                    annotations: {mesh.io/netns: /run/netns/a}}, spec: {nodeName: n}, status: {podIP: 10.0.0.1}}\n";
    for (tls, told) in [("mode: DISABLE", 1), ("mode: SIMPLE", 1), ("mode: ISTIO_MUTUAL", 0)] {
        let (_, problems) = build(&(text(tls) + enrolled));
        let said = texts(&problems).into_iter().filter(|text| text.contains("mutual TLS")).count();
        assert_eq!(said, told, "{tls}: {problems:?}");
    }
}
