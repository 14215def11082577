//! What a gateway serves, with the endpoints of some services anew. What is the same for several stays one.
//!
//! Tested in `tests/incremental.rs`.

use std::{collections::HashMap, sync::Arc};

use super::{Renewal, shared};
use crate::state::snapshot::{
    ByHost, Gateway, GatewayPort, HttpRoute, Served, TlsAction, TlsServer, VirtualHost, VirtualHosts,
};

/// What tables of routes have become, by where they were.
type Tables = HashMap<*const Arc<HttpRoute>, Arc<[Arc<HttpRoute>]>>;

impl Renewal<'_, '_> {
    /// What it serves now.
    pub(super) fn gateway(&mut self, before: &Arc<Gateway>) -> Arc<Gateway> {
        let mut tables = Tables::new();
        let ports = before.ports.iter().map(|port| {
            let serves = match &port.serves {
                Served::Http(hosts) => Served::Http(self.virtual_hosts(hosts, &mut tables)),
                Served::Tcp(routes) => Served::Tcp(shared(routes, |route| self.stream(route))),
                Served::Tls(servers) => {
                    Served::Tls(renewed(servers, |server| self.tls_server(server, &mut tables)))
                }
            };
            Arc::new(GatewayPort { number: port.number, serves })
        });
        Arc::new(Gateway { workload: Arc::clone(&before.workload), ports: ports.collect() })
    }

    fn tls_server(&mut self, before: &Arc<TlsServer>, tables: &mut Tables) -> Arc<TlsServer> {
        let mut streams = |routes: &Arc<[_]>| {
            let after = shared(routes, |route| self.stream(route));
            (!Arc::ptr_eq(&after, routes)).then_some(after)
        };
        let action = match &before.action {
            TlsAction::PassThrough(routes) => streams(routes).map(TlsAction::PassThrough),
            TlsAction::Stream(tls, routes) => {
                streams(routes).map(|routes| TlsAction::Stream(Arc::clone(tls), routes))
            }
            TlsAction::Http(tls, hosts) => {
                let after = self.virtual_hosts(hosts, tables);
                (!Arc::ptr_eq(&after, hosts)).then(|| TlsAction::Http(Arc::clone(tls), after))
            }
        };
        match action {
            Some(action) => Arc::new(TlsServer { origin: Arc::clone(&before.origin), action }),
            None => Arc::clone(before),
        }
    }

    fn virtual_hosts(&mut self, before: &Arc<VirtualHosts>, tables: &mut Tables) -> Arc<VirtualHosts> {
        renewed(before, |host| {
            let made = || shared(&host.routes, |route| self.route(route));
            let routes = Arc::clone(tables.entry(host.routes.as_ptr()).or_insert_with(made));
            if Arc::ptr_eq(&routes, &host.routes) {
                return Arc::clone(host);
            }
            Arc::new(VirtualHost { routes, ..VirtualHost::clone(host) })
        })
    }
}

/// The same table where each of its items is the same.
fn renewed<T>(before: &Arc<ByHost<Arc<T>>>, mut renew: impl FnMut(&Arc<T>) -> Arc<T>) -> Arc<ByHost<Arc<T>>> {
    let mut as_before = true;
    let after = before.map(|old| {
        let new = renew(old);
        as_before &= Arc::ptr_eq(old, &new);
        new
    });
    if as_before { Arc::clone(before) } else { Arc::new(after) }
}
