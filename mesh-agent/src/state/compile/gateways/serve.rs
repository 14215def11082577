//! Makes the ports of a gateway: virtual hosts, routes and TLS, each shared by all that come to the same.
//!
//! Tested in `tests/gateways.rs`.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use super::{
    Bindings, key_of_gateway,
    merge::At,
    name_of,
    routes::{self, Piece, Where},
    tls,
};
use crate::state::{
    compile::destinations::Destinations,
    resource::{
        Objects,
        gateway::{Serves, Terms},
    },
    snapshot::{
        Gateway, GatewayPort, HttpRoute, Served, ServerTls, StreamRoute, TlsAction, TlsServer, VirtualHost,
        VirtualHosts, Workload,
    },
};

/// A `VirtualService` by its place, at a gateway, on a port.
type Bind = (usize, String, u16);

/// Makes what is served, once for all that it is the same for.
pub(super) struct Serve<'m, 'a, 'c, 'd, 'p, 'o> {
    bindings: &'m Bindings<'a>,
    objects: &'m Objects,
    workload: &'m Workload,
    before: Option<&'m Gateway>,
    destinations: Destinations<'c, 'd, 'p, 'o>,
    /// The routes of single `VirtualService`s, and where they are.
    pieces: Vec<Piece>,
    piece_of: HashMap<Bind, usize>,
    /// The routes of several, by their places in `pieces`.
    tables: HashMap<Vec<usize>, Arc<[Arc<HttpRoute>]>>,
}

/// A virtual host while it is filled.
#[derive(Default)]
struct Filling {
    origin: String,
    redirects: bool,
    /// Places in `pieces`.
    pieces: Vec<usize>,
}

impl<'m, 'a, 'c, 'd, 'p, 'o> Serve<'m, 'a, 'c, 'd, 'p, 'o> {
    /// Nothing made yet.
    pub fn new(
        bindings: &'m Bindings<'a>,
        objects: &'m Objects,
        workload: &'m Workload,
        before: Option<&'m Gateway>,
        destinations: Destinations<'c, 'd, 'p, 'o>,
    ) -> Self {
        let (pieces, piece_of, tables) = (Vec::new(), HashMap::new(), HashMap::new());
        Self { bindings, objects, workload, before, destinations, pieces, piece_of, tables }
    }

    /// One port with its servers, which are spoken in one way.
    pub fn port(&mut self, number: u16, servers: &[At<'_>]) -> GatewayPort {
        let serves = match servers.first().map(|at| &at.server.serves) {
            Some(Serves::Http { .. }) => Served::Http(Arc::new(self.virtual_hosts(servers))),
            Some(Serves::Tcp) | None => Served::Tcp(self.streams(servers, false)),
            Some(Serves::Https(_) | Serves::Tls(_) | Serves::PassThrough) => {
                let mut by_name = Vec::new();
                for at in servers {
                    let server = Arc::new(self.tls_server(at));
                    by_name.extend(at.hosts.iter().map(|host| (host.name.clone(), Arc::clone(&server))));
                }
                Served::Tls(Arc::new(by_name.into_iter().collect()))
            }
        };
        GatewayPort { number, serves }
    }

    fn tls_server(&mut self, at: &At<'_>) -> TlsServer {
        let own = std::slice::from_ref(at);
        let action = match &at.server.serves {
            Serves::Https(terms) => TlsAction::Http(self.tls(at, terms), Arc::new(self.virtual_hosts(own))),
            Serves::Tls(terms) => TlsAction::Stream(self.tls(at, terms), self.streams(own, false)),
            Serves::PassThrough | Serves::Http { .. } | Serves::Tcp => {
                TlsAction::PassThrough(self.streams(own, true))
            }
        };
        TlsServer { origin: at.origin().into(), action }
    }

    fn tls(&mut self, at: &At<'_>, terms: &Terms) -> Arc<ServerTls> {
        let origin = at.origin();
        let before = self.before.and_then(|before| match &before.port(at.server.port)?.serves {
            Served::Tls(servers) => servers.values().find(|server| *server.origin == *origin)?.action.tls(),
            Served::Http(_) | Served::Tcp(_) => None,
        });
        let (tls, wrong) = tls::of(self.objects, &self.workload.namespace, terms, before);
        if let Some(tls::Wrong { field, missing, why }) = wrong {
            let key = key_of_gateway(at.gateway);
            let field = format!("spec.servers[{}].tls.{field}", at.index);
            let why = format!("{why}; TLS of this server is refused");
            match missing {
                Some(kind) => self.destinations.problems.not_found(&key, &field, kind, why),
                None => self.destinations.problems.add(&key, &field, why),
            }
        }
        tls
    }

    /// The virtual hosts of servers that are one.
    fn virtual_hosts(&mut self, servers: &[At<'_>]) -> VirtualHosts {
        let mut hosts: BTreeMap<String, Filling> = BTreeMap::new();
        let bindings = self.bindings;
        for at in servers {
            let redirects = matches!(at.server.serves, Serves::Http { redirects: true });
            let gateway = name_of(at.gateway);
            let mut fill = |host: &str, piece: Option<usize>| {
                let new = || Filling { origin: at.origin(), ..Filling::default() };
                let filling = hosts.entry(host.to_owned()).or_insert_with(new);
                filling.redirects |= redirects;
                // The same twice takes nothing the second time.
                filling.pieces.extend(piece.filter(|piece| !filling.pieces.contains(piece)));
            };
            for (place, bound) in bindings.of(&gateway, &self.workload.namespace) {
                let shared = bound.shared(at.hosts.iter().copied());
                if shared.is_empty() {
                    continue;
                }
                let Some(piece) = self.piece((place, gateway.clone(), at.server.port)) else { continue };
                for host in &shared {
                    fill(host, Some(piece));
                }
            }
            if redirects {
                for host in &at.hosts {
                    fill(&host.name, None);
                }
            }
        }
        let made = hosts.into_iter().map(|(host, filling)| {
            let host = VirtualHost {
                domain: host.into(),
                origin: filling.origin.into(),
                https_redirect: filling.redirects,
                routes: self.table(filling.pieces),
            };
            (host.domain.to_string(), Arc::new(host))
        });
        made.collect()
    }

    /// The routes of one `VirtualService`; `None` where it has none for requests there.
    fn piece(&mut self, bind: Bind) -> Option<usize> {
        let known = self.piece_of.get(&bind).copied();
        let place = known.unwrap_or(self.pieces.len());
        if known.is_none() {
            let at = Where { gateway: &bind.1, port: bind.2, workload: self.workload };
            let bound = self.bindings.all.get(bind.0)?;
            self.pieces.push(routes::http(&mut self.destinations, bound, &at));
            self.piece_of.insert(bind, place);
        }
        self.pieces.get(place).filter(|piece| !piece.is_empty()).map(|_| place)
    }

    /// The routes of several, in this order: those that ask for something, then the first that takes everything.
    fn table(&mut self, pieces: Vec<usize>) -> Arc<[Arc<HttpRoute>]> {
        if let Some(made) = self.tables.get(&pieces) {
            return Arc::clone(made);
        }
        let all = || pieces.iter().filter_map(|place| self.pieces.get(*place));
        let asking = all().flat_map(|piece| &piece.asking);
        let rest = all().find_map(|piece| piece.rest.as_ref());
        let table: Arc<[Arc<HttpRoute>]> = asking.chain(rest).cloned().collect();
        self.tables.insert(pieces, Arc::clone(&table));
        table
    }

    /// The routes of connections that are not read as HTTP; `passing`: of TLS that stays as it is.
    fn streams(&mut self, servers: &[At<'_>], passing: bool) -> Arc<[Arc<StreamRoute>]> {
        let mut found = Vec::new();
        let bindings = self.bindings;
        for at in servers {
            let gateway = name_of(at.gateway);
            for (_, bound) in bindings.of(&gateway, &self.workload.namespace) {
                if bound.shared(at.hosts.iter().copied()).is_empty() {
                    continue;
                }
                let at = Where { gateway: &gateway, port: at.server.port, workload: self.workload };
                let service = bound.service;
                let rules = if passing { ("tls", &service.tls[..]) } else { ("tcp", &service.tcp[..]) };
                found.extend(routes::streams(&mut self.destinations, bound, rules, &at));
            }
        }
        let found = if passing { routes::by_name(found) } else { found };
        found.into_iter().map(Arc::new).collect()
    }
}
