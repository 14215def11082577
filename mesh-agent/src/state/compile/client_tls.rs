//! What the `tls` of a rule comes to: Secrets are looked up, in the rule's own namespace, and files, where the source has
//! read any; what is not there is said.
//!
//! Promises that a rule which asks for TLS never comes to plaintext. Tested in `tests/client_tls.rs`.

use std::{collections::BTreeSet, sync::Arc};

use super::{Problems, Settings, gateways, services::Definitions};
use crate::state::{
    resource::{
        ObjectKey, Objects, Resource,
        client_tls::{Credential, Terms, Tls},
        destination_rule::{Blocks, DestinationRule, TrafficPolicy},
        file_key, of_kind,
    },
    snapshot::{ClientCertificate, ClientTls, Origination, TlsTerms},
};

/// How connections to a service outside the mesh are protected. What is the same as before stays the same, with what has
/// been made of it.
pub(super) fn originate(
    objects: &Objects,
    namespace: &str,
    host: &Arc<str>,
    tls: Option<&Tls>,
    before: Option<&Origination>,
) -> Origination {
    let (terms, shows) = match tls {
        None | Some(Tls::Disable) => return Origination::Plaintext,
        Some(Tls::Mesh) => return Origination::MeshOnly,
        Some(Tls::Simple(terms)) => (terms, false),
        Some(Tls::Mutual(terms)) => (terms, true),
    };
    let credential = match credential(objects, namespace, terms, shows) {
        Ok(credential) => credential,
        Err((_, why)) => return Origination::Broken(why.into()),
    };
    let shown = credential.certificate.zip(credential.key).filter(|_| shows);
    let terms = TlsTerms {
        server: terms.sni.as_deref().map_or_else(|| Arc::clone(host), Arc::from),
        names: terms.names.iter().map(|name| name.as_str().into()).collect(),
        roots: credential.roots,
        revoked: credential.revoked,
        anybody: terms.anybody,
        shows: shown.map(|(chain, key)| ClientCertificate { chain, key }),
    };
    match before {
        Some(Origination::Tls(before)) if before.terms == terms => Origination::Tls(Arc::clone(before)),
        _ => Origination::Tls(Arc::new(ClientTls::new(terms))),
    }
}

/// Namespace and name of each Secret that a rule names, or that the gateway's own process has to show: no other is asked for.
pub fn named_secrets(objects: &Objects, settings: &Settings) -> BTreeSet<(Arc<str>, Arc<str>)> {
    let mut named = gateways::named_secrets(objects, settings);
    for (_, object) in of_kind(objects, "DestinationRule") {
        let Resource::DestinationRule(rule) = &object.resource else { continue };
        let policies =
            rule.policy.iter().chain(rule.subsets.iter().filter_map(|subset| subset.policy.as_ref()));
        for (_, tls) in policies.flat_map(|policy| written("", policy)) {
            let (Tls::Simple(terms) | Tls::Mutual(terms)) = tls else { continue };
            let Some(name) = &terms.credential else { continue };
            for name in [name.as_str().into(), roots_alone(name).into()] {
                named.insert((Arc::clone(&rule.namespace), name));
            }
        }
    }
    named
}

/// Istio's name of the Secret that has the roots of another one.
pub(super) fn roots_alone(name: &str) -> String {
    format!("{name}-cacert")
}

/// What is named and not there: the field, and a sentence.
type Missing = (&'static str, String);

/// What the rule names for TLS.
fn credential(objects: &Objects, namespace: &str, terms: &Terms, shows: bool) -> Result<Credential, Missing> {
    match &terms.credential {
        Some(name) => secret(objects, namespace, name, shows).map_err(|why| ("credentialName", why)),
        None => files(objects, terms, shows),
    }
}

/// What the named files have. Without `MUTUAL` a certificate of the client's is not asked for (as in Istio).
fn files(objects: &Objects, terms: &Terms, shows: bool) -> Result<Credential, Missing> {
    let mut found = Credential::default();
    for (field, path) in terms.files.named() {
        let place = match field {
            "clientCertificate" | "privateKey" if !shows => continue,
            "clientCertificate" => &mut found.certificate,
            "privateKey" => &mut found.key,
            "caCertificates" => &mut found.roots,
            _ => &mut found.revoked,
        };
        *place = Some(file(objects, path).map_err(|why| (field, why))?);
    }
    Ok(found)
}

/// What is in a file that is named.
pub(super) fn file(objects: &Objects, path: &str) -> Result<Arc<[u8]>, String> {
    match objects.get(&file_key(path)).map(|object| &object.resource) {
        Some(Resource::File(Ok(bytes))) => Ok(Arc::clone(bytes)),
        Some(Resource::File(Err(why))) => Err(why.clone()),
        _ => {
            let why = "files are read where the configuration is a directory; put what is in it into a Secret, and \
                       name that by credentialName";
            Err(why.to_owned())
        }
    }
}

/// What the named Secret has, and that of the same name with `-cacert` behind (Istio's, for what is believed).
pub(super) fn secret_of(objects: &Objects, namespace: &str, name: &str) -> Result<Credential, String> {
    let find = |name: &str| match objects.get(&ObjectKey::new("Secret", namespace, name)).map(|o| &o.resource)
    {
        Some(Resource::Secret(credential)) => Some(Credential::clone(credential)),
        _ => None,
    };
    let (found, roots) = (find(name), find(&roots_alone(name)));
    if found.is_none() && roots.is_none() {
        return Err(format!("there is no Secret {namespace}/{name}"));
    }
    let found = found.unwrap_or_default();
    let apart = roots.unwrap_or_default();
    let (roots, revoked) = (apart.roots.or(found.roots), apart.revoked.or(found.revoked));
    Ok(Credential { roots, revoked, ..found })
}

/// What a client has of the named Secret: a certificate to show, or whom to believe.
fn secret(objects: &Objects, namespace: &str, name: &str, shows: bool) -> Result<Credential, String> {
    let found = secret_of(objects, namespace, name)?;
    if shows && (found.certificate.is_none() || found.key.is_none()) {
        return Err(format!("Secret {namespace}/{name} has no certificate and key (tls.crt, tls.key)"));
    }
    if !shows && found.roots.is_none() {
        return Err(format!("Secret {namespace}/{name} has no certificate of an authority (ca.crt)"));
    }
    Ok(found)
}

/// Says what of a rule's `tls` is not there, and where it does not hold.
pub(super) fn report(
    rule: &DestinationRule,
    host: &str,
    objects: &Objects,
    services: &Definitions<'_>,
    problems: &mut Problems<'_>,
) {
    let key = ObjectKey::new("DestinationRule", &rule.namespace, &rule.name);
    let top = rule.policy.iter().map(|policy| ("spec.trafficPolicy".to_owned(), policy));
    let subsets = rule.subsets.iter().enumerate().filter_map(|(i, subset)| {
        Some((format!("spec.subsets[{i}].trafficPolicy"), subset.policy.as_ref()?))
    });
    for (field, tls) in top.chain(subsets).flat_map(|(field, policy)| written(&field, policy)) {
        let shows = matches!(tls, Tls::Mutual(_));
        if let Some(terms) = tls.terms()
            && let Err((of, why)) = credential(objects, &rule.namespace, terms, shows)
        {
            let kind = if terms.credential.is_some() { "Secret" } else { "File" };
            problems.not_found(&key, &format!("{field}.{of}"), kind, why);
        }
        let enrolled = || {
            let ports = services.covered_by(host).flat_map(|service| &service.ports);
            let mut workloads =
                ports.flat_map(|port| &port.candidates).filter_map(|one| one.workload.as_ref());
            workloads.any(|workload| workload.enrolled)
        };
        if *tls != Tls::Mesh && enrolled() {
            let message =
                "holds for endpoints outside the mesh alone: those in it are reached by its mutual TLS";
            problems.add(&key, &format!("{field}.mode"), message.to_owned());
        }
    }
}

/// Every `tls` of a policy, and where it stands.
fn written<'a>(field: &str, policy: &'a TrafficPolicy) -> Vec<(String, &'a Tls)> {
    let of_port = |(port, blocks): (&u16, &'a Blocks)| {
        Some((format!("{field}.portLevelSettings[port.number={port}].tls"), blocks.tls.as_ref()?))
    };
    let top = policy.blocks.tls.iter().map(|tls| (format!("{field}.tls"), tls));
    top.chain(policy.ports.iter().filter_map(of_port)).collect()
}
