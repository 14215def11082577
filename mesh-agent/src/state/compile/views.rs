//! For clients of which namespaces a service is not what it is for everybody.
//!
//! `exportTo` and the rules of a client's own namespace make the picture depend on who looks. Only namespaces that
//! something names, and that have a pod to look from, get a view of their own, and so do those of their pods that rules select;
//! the work grows with what is written, not with services times namespaces. Tested in `tests/views.rs` and
//! `tests/workload_selector.rs` beside it.

use std::collections::{BTreeSet, HashMap};

use super::{
    clients::{Client, Clients},
    destination_rules::DestinationRules,
    services::{Definition, Definitions},
    virtual_services::{Routed, VirtualServices},
    workloads::Pods,
};

/// Clients, by name, by the services that are special to them.
pub(super) struct Views<'a> {
    by_host: HashMap<&'a str, BTreeSet<&'a str>>,
    clients: &'a Clients<'a>,
}

impl<'a> Views<'a> {
    /// Looks through all services.
    pub fn index(
        definitions: &'a Definitions<'_>,
        rules: &DestinationRules<'a>,
        clients: &'a Clients<'a>,
        pods: &Pods<'a>,
    ) -> Self {
        let mut by_host = HashMap::new();
        for definition in definitions.iter() {
            let mut special = rules.special(&definition.host, &definition.key.namespace);
            special.extend(definition.visible.named().iter().map(|namespace| &**namespace));
            special.retain(|namespace| pods.by_namespace.contains_key(namespace));
            let selected = clients.selected().filter(|client| rules.select(*client, &definition.host));
            special.extend(selected.map(|client| client.name));
            if !special.is_empty() {
                by_host.insert(&*definition.host, special);
            }
        }
        Self { by_host, clients }
    }

    /// As whom these clients choose the endpoints of a service: as themselves, as all of their namespace, or as everybody.
    pub fn of_endpoints<'c>(&'c self, host: &str, client: Client<'c>) -> Option<Client<'c>> {
        let special = self.by_host.get(host)?;
        if special.contains(client.name) {
            Some(client)
        } else {
            special.contains(client.namespace).then(|| self.clients.named(client.namespace))
        }
    }

    /// The clients of this name.
    pub fn named<'c>(&'c self, name: &'c str) -> Client<'c> {
        self.clients.named(name)
    }

    /// The clients, by name, that may see other routes of a service than everybody does.
    pub fn of<'s>(
        &'s self,
        definition: &Definition<'_>,
        virtual_services: &'s VirtualServices<'a>,
        pods: &Pods<'_>,
    ) -> BTreeSet<&'s str> {
        let default = virtual_services.find(&definition.host, None);
        let mut clients: BTreeSet<&str> = BTreeSet::new();
        for routed in virtual_services.candidates(&definition.host) {
            let named = routed.service.visible.named().iter().map(|client| &**client);
            clients.extend(named.filter(|client| pods.by_namespace.contains_key(client)));
            clients.extend(self.special_to(&definition.host, Some(routed)));
        }
        clients.extend(self.special_to(&definition.host, None));
        clients.retain(|client| {
            let own = virtual_services.find(&definition.host, Some(self.named(client).namespace));
            let same = match (own, default) {
                (Some(own), Some(default)) => std::ptr::eq(own, default),
                (own, default) => own.is_none() && default.is_none(),
            };
            !same || self.special_to(&definition.host, own).any(|special| special == *client)
        });
        clients
    }

    /// The clients to whom a service is special, or any that its routes lead to.
    fn special_to<'s>(
        &'s self,
        host: &'s str,
        routed: Option<&'s Routed<'a>>,
    ) -> impl Iterator<Item = &'a str> + 's {
        let leads_to = routed.into_iter().flat_map(|routed| &routed.leads_to).map(String::as_str);
        let hosts = std::iter::once(host).chain(leads_to);
        hosts.filter_map(|host| self.by_host.get(host)).flatten().copied()
    }
}
