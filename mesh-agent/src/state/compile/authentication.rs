//! Which `PeerAuthentication` holds for a pod, and for each of its ports.
//!
//! Port of the pod before the pod, before its namespace, before the mesh; the oldest of each; what is not set is
//! inherited. Tested in `tests/authentication.rs`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::api::core::v1::Pod;

use super::{Settings, endpoints::selects};
use crate::state::{
    resource::{ObjectKey, Objects, Resource, of_kind, peer_authentication::PeerAuthentication},
    snapshot::{Authentication, Mtls, MtlsMode},
};

/// All of them, by the scope that they are about; oldest first.
#[derive(Default)]
pub(super) struct Authentications<'a> {
    /// Those of the root namespace without a selector.
    mesh: Vec<&'a PeerAuthentication>,
    /// The others without one, by namespace.
    namespaces: HashMap<&'a str, Vec<&'a PeerAuthentication>>,
    /// Those with one, by namespace: a selector selects pods of its own.
    selecting: HashMap<&'a str, Vec<&'a PeerAuthentication>>,
}

impl<'a> Authentications<'a> {
    /// Looks through all of them.
    pub fn index(objects: &'a Objects, settings: &Settings) -> Self {
        let mut index = Self::default();
        for (key, object) in of_kind(objects, "PeerAuthentication") {
            let Resource::PeerAuthentication(written) = &object.resource else { continue };
            let scope = if !written.labels.is_empty() {
                index.selecting.entry(&key.namespace).or_default()
            } else if key.namespace == settings.root_namespace {
                &mut index.mesh
            } else {
                index.namespaces.entry(&key.namespace).or_default()
            };
            scope.push(written);
        }
        let scopes = index.namespaces.values_mut().chain(index.selecting.values_mut());
        for scope in scopes.chain([&mut index.mesh]) {
            scope.sort_by_key(|one| (one.created.is_none(), &one.created, &one.name));
        }
        index
    }

    /// What holds for a pod.
    pub fn of(&self, key: &ObjectKey, pod: &Pod) -> Authentication {
        let labels = pod.metadata.labels.as_ref();
        let first =
            |scope: Option<&Vec<&'a PeerAuthentication>>| scope.and_then(|scope| scope.first()).copied();
        let own = self.selecting.get(&*key.namespace).into_iter().flatten();
        let own = own.copied().find(|one| selects(&one.labels, labels));
        let scopes = [first(Some(&self.mesh)), first(self.namespaces.get(&*key.namespace)), own];
        let mut mtls = Mtls::default();
        for one in scopes.into_iter().flatten() {
            set(&mut mtls, one, one.mode);
        }
        let port = |one: &PeerAuthentication, (port, mode): (&u16, &Option<MtlsMode>)| {
            let mut own = mtls.clone();
            set(&mut own, one, *mode);
            (*port, own)
        };
        let ports: BTreeMap<u16, Mtls> =
            own.into_iter().flat_map(|one| one.ports.iter().map(move |entry| port(one, entry))).collect();
        Authentication { ports: ports.into_iter().collect(), mtls, ..Authentication::default() }
    }
}

fn set(mtls: &mut Mtls, by: &PeerAuthentication, mode: Option<MtlsMode>) {
    if let Some(mode) = mode {
        *mtls = Mtls { mode, by: Some(Arc::clone(&by.name)) };
    }
}
