//! TLS that ends at a gateway: certificates from Secrets and files, and servers that have none.

use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair, SerialNumber};

use super::*;
use crate::state::{
    resource::{Object, Resource, file_key},
    snapshot::{ServerTls, ServerTlsMode},
};

/// A certificate that is its own authority, its key, and its list of what is revoked, in PEM.
fn pem() -> [String; 3] {
    let key = KeyPair::generate().unwrap();
    let text = key.serialize_pem();
    let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, key).unwrap();
    let now = time::OffsetDateTime::now_utc();
    let list = rcgen::CertificateRevocationListParams {
        this_update: now,
        next_update: now + time::Duration::days(1),
        crl_number: SerialNumber::from_slice(&[1]),
        issuing_distribution_point: None,
        revoked_certs: Vec::new(),
        key_identifier_method: rcgen::KeyIdMethod::Sha256,
    };
    [issuer.pem(), text, list.signed_by(&issuer).unwrap().pem().unwrap()]
}

fn secret(namespace: &str, name: &str, fields: &[(&str, &str)]) -> String {
    let fields =
        fields.iter().map(|(field, text)| format!("{field}: {text:?}")).collect::<Vec<_>>().join(", ");
    format!(
        "---\n{{apiVersion: v1, kind: Secret, metadata: {{name: {name}, namespace: {namespace}}}, stringData: {{{fields}}}}}\n"
    )
}

fn with_tls(protocol: &str, tls: &str) -> String {
    let server =
        format!("{{port: {{number: 443, name: p, protocol: {protocol}}}, hosts: ['*'], tls: {{{tls}}}}}");
    world() + &written("one", &server)
}

fn action(gateway: &Gateway) -> TlsAction {
    match &gateway.port(443).unwrap().serves {
        Served::Tls(servers) => servers.find(None).unwrap().action.clone(),
        other => panic!("{other:?}"),
    }
}

fn ended(gateway: &Gateway) -> Arc<ServerTls> {
    Arc::clone(action(gateway).tls().unwrap())
}

#[test]
fn every_mode_shows_and_asks_what_it_says() {
    let [certificate, key, list] = pem();
    let full = [("tls.crt", &*certificate), ("tls.key", &*key)];
    let roots = [("ca.crt", &*certificate), ("ca.crl", &*list)];
    let generic = [("cert", &*certificate), ("key", &*key), ("cacert", &*certificate)];
    let secrets =
        secret("edge", "c", &full) + &secret("edge", "c-cacert", &roots) + &secret("edge", "g", &generic);
    // Mode, Secret, whether roots are read, and lists.
    for (mode, name, asks, lists, expected) in [
        ("SIMPLE", "c", false, 0, ServerTlsMode::Simple),
        ("MUTUAL", "c", true, 1, ServerTlsMode::Mutual),
        ("OPTIONAL_MUTUAL", "g", true, 0, ServerTlsMode::OptionalMutual),
    ] {
        let gateway =
            served(&(with_tls("HTTPS", &format!("mode: {mode}, credentialName: {name}")) + &secrets));
        let tls = ended(&gateway);
        let read = tls.read.as_ref().unwrap();
        assert_eq!(tls.terms.mode, expected);
        assert_eq!(read.certified.as_ref().unwrap().cert.len(), 1, "{mode}");
        assert_eq!(read.roots.as_ref().map(|roots| roots.len()), asks.then_some(1), "{mode}");
        assert_eq!(read.revoked.len(), lists, "{mode}");
        assert!(matches!(action(&gateway), TlsAction::Http(..)));
    }
    let gateway = served(&with_tls("TLS", "mode: ISTIO_MUTUAL"));
    let tls = ended(&gateway);
    let read = tls.read.as_ref().unwrap();
    assert!(read.certified.is_none() && read.roots.is_none(), "its own, which the mesh gives it");
    assert!(matches!(action(&gateway), TlsAction::Stream(..)));
    assert!(!format!("{tls:?}").contains("BEGIN"), "{tls:?}");
}

#[test]
fn files_come_in_the_place_of_a_secret() {
    let [certificate, key, list] = pem();
    let text =
        with_tls("TLS", "mode: MUTUAL, serverCertificate: a, privateKey: b, caCertificates: c, caCrl: d");
    let files = [("a", &certificate), ("b", &key), ("c", &certificate), ("d", &list)];
    let compiled = |files: &[(&str, &String)]| {
        let (mut objects, _) = read_text(&text);
        for (path, content) in files {
            let resource = Resource::File(Ok(content.as_bytes().into()));
            objects.insert(file_key(path), Arc::new(Object { file: (*path).into(), resource }));
        }
        let (snapshot, problems) = compile(&objects, None, &of_pod("in"));
        (ended(&snapshot.gateway.unwrap()), problems)
    };
    let (tls, problems) = compiled(&files);
    assert_eq!(problems, []);
    let read = tls.read.as_ref().unwrap();
    assert_eq!((read.roots.as_ref().unwrap().len(), read.revoked.len()), (1, 1));
    let (tls, problems) = compiled(&files[..3]);
    assert_problems(
        &problems,
        &["spec.servers[0].tls.caCrl: files are read where the configuration is a directory"],
    );
    assert!(tls.read.is_err());
}

#[test]
fn a_server_without_its_certificate_is_told_and_the_others_stand() {
    let ([certificate, key, _], [_, other, _]) = (pem(), pem());
    let secrets = secret("edge", "c", &[("tls.crt", &certificate), ("tls.key", &key)])
        + &secret("default", "elsewhere", &[("tls.crt", &certificate), ("tls.key", &key)])
        + &secret("edge", "half", &[("tls.crt", &certificate)])
        + &secret("edge", "mixed", &[("tls.crt", &certificate), ("tls.key", &other)])
        + &secret("edge", "broken", &[("tls.crt", "one"), ("tls.key", &key)])
        + &secret("edge", "roots", &[("tls.crt", &certificate), ("tls.key", &key), ("ca.crt", "one")])
        + &secret(
            "edge",
            "list",
            &[("tls.crt", &certificate), ("tls.key", &key), ("ca.crt", &certificate), ("ca.crl", "one")],
        );
    let missing = crate::state::Cause::NotFound("Secret");
    for (mode, name, why, cause) in [
        ("SIMPLE", "none", "there is no Secret edge/none", missing),
        ("SIMPLE", "elsewhere", "there is no Secret edge/elsewhere", missing),
        ("SIMPLE", "half", "has no certificate and key (tls.crt, tls.key)", missing),
        ("MUTUAL", "c", "has no certificate of an authority (ca.crt), nor has edge/c-cacert", missing),
        (
            "SIMPLE",
            "mixed",
            "the key (tls.key): it is not the key of the certificate",
            crate::state::Cause::NoEffect,
        ),
        (
            "SIMPLE",
            "broken",
            "the certificate (tls.crt): there is no certificate",
            crate::state::Cause::NoEffect,
        ),
        (
            "MUTUAL",
            "roots",
            "the certificates of authorities (ca.crt): there is no certificate",
            crate::state::Cause::NoEffect,
        ),
        (
            "MUTUAL",
            "list",
            "the lists of what is revoked (ca.crl): there is no list",
            crate::state::Cause::NoEffect,
        ),
    ] {
        let stands = "{port: {number: 443, name: q, protocol: HTTPS}, hosts: [b.example], tls: {mode: SIMPLE, credentialName: c}}";
        let text = with_tls("HTTPS", &format!("mode: {mode}, credentialName: {name}"))
            + &written("two", stands)
            + &secrets;
        let (gateway, problems) = serve(&text);
        assert_problems(&problems, &[why]);
        assert_eq!(
            (problems[0].field.as_deref(), problems[0].cause),
            (Some("spec.servers[0].tls.credentialName"), cause)
        );
        let tls = ended(&gateway);
        assert!(tls.read.as_ref().unwrap_err().contains(why), "{name}: {tls:?}");
        let Served::Tls(servers) = &gateway.port(443).unwrap().serves else { panic!("TLS") };
        assert!(servers.find(Some("b.example")).unwrap().action.tls().unwrap().read.is_ok());
    }
}

#[test]
fn what_stays_the_same_keeps_what_was_made_of_it() {
    let ([certificate, key, _], [renewed, new, _]) = (pem(), pem());
    let tls = |certificate: &str, key: &str| {
        with_tls("HTTPS", "mode: SIMPLE, credentialName: c")
            + &secret("edge", "c", &[("tls.crt", certificate), ("tls.key", key)])
    };
    let (before, _) = serve_on(&tls(&certificate, &key), None);
    let of = |snapshot: &Snapshot| ended(snapshot.gateway.as_ref().unwrap());
    let (same, _) = serve_on(&tls(&certificate, &key), Some(&before));
    assert!(Arc::ptr_eq(&of(&before), &of(&same)));
    let (other, _) = serve_on(&tls(&renewed, &new), Some(&same));
    assert!(!Arc::ptr_eq(&of(&before), &of(&other)) && of(&other).read.is_ok());
    // It goes, and comes again.
    let (gone, _) = serve_on(&with_tls("HTTPS", "mode: SIMPLE, credentialName: c"), Some(&other));
    assert!(of(&gone).read.is_err());
    assert!(of(&serve_on(&tls(&renewed, &new), Some(&gone)).0).read.is_ok());
}

#[test]
fn only_a_gateway_reads_what_its_servers_show() {
    let named = |text: &str, settings: &Settings| {
        let (objects, refused) = read_text(text);
        assert_eq!(refused, []);
        let named = crate::state::compile::named_secrets(&objects, settings).into_iter();
        named.map(|(namespace, name)| format!("{namespace}/{name}")).collect::<Vec<_>>().join(" ")
    };
    let simple = with_tls("HTTPS", "mode: SIMPLE, credentialName: c");
    assert_eq!(named(&simple, &settings()), "", "neither an agent nor the controller");
    assert_eq!(named(&simple, &of_pod("in")), "edge/c");
    assert_eq!(named(&simple, &of_pod("away")), "", "whose labels are not known");
    let mutual = with_tls("HTTPS", "mode: MUTUAL, credentialName: c");
    assert_eq!(named(&mutual, &of_pod("in")), "edge/c edge/c-cacert");
    assert_eq!(named(&mutual.replace("istio: in}, servers", "istio: out}, servers"), &of_pod("in")), "");
    let rule = istio(
        "DestinationRule default/d",
        "{host: a, trafficPolicy: {tls: {mode: SIMPLE, credentialName: d}}}",
    );
    assert_eq!(named(&(rule + &simple), &of_pod("in")), "default/d default/d-cacert edge/c");
}
