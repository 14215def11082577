//! What a gateway serves: the ports of the `Gateway`s that select its pod, and what becomes of what comes there.
//!
//! Everything is shared: whoever serves a connection holds what it needs of one revision and copies none of it. Keys are here as
//! they were read, and are never shown. Tested below (names), and through `compile/tests/gateways.rs`.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock},
};

use rustls::{RootCertStore, ServerConfig, SupportedCipherSuite, sign::CertifiedKey};
use rustls_pki_types::CertificateRevocationListDer;

use super::{Cluster, HttpRoute, StreamRoute, Workload, led_to};

/// What the pod of a gateway serves.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// The pod itself: its identity, its labels, its namespace.
    pub workload: Arc<Workload>,
    /// By their numbers, each once.
    pub ports: Vec<Arc<GatewayPort>>,
}

impl Gateway {
    /// The port with this number.
    pub fn port(&self, number: u16) -> Option<&Arc<GatewayPort>> {
        let at = self.ports.binary_search_by_key(&number, |port| port.number).ok()?;
        self.ports.get(at)
    }

    /// Every cluster that it leads to; those that are led to in several ways, several times.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<Cluster>> {
        self.ports.iter().flat_map(|port| -> Box<dyn Iterator<Item = &Arc<Cluster>>> {
            match &port.serves {
                Served::Http(hosts) => of_hosts(hosts),
                Served::Tcp(routes) => Box::new(led_to(&[], routes)),
                Served::Tls(servers) => Box::new(servers.values().flat_map(|server| server.clusters())),
            }
        })
    }
}

/// A port that is listened on.
#[derive(Debug, Clone)]
pub struct GatewayPort {
    /// Its number.
    pub number: u16,
    /// What is spoken there.
    pub serves: Served,
}

impl GatewayPort {
    /// For logs: who asks for it, each once.
    pub fn origins(&self) -> Vec<&str> {
        let mut origins: Vec<&str> = match &self.serves {
            Served::Http(hosts) => hosts.values().map(|host| &*host.origin).collect(),
            Served::Tls(servers) => servers.values().map(|server| &*server.origin).collect(),
            Served::Tcp(routes) => routes.iter().map(|route| &*route.origin).collect(),
        };
        origins.sort_unstable();
        origins.dedup();
        origins
    }
}

/// What is spoken on a port.
#[derive(Debug, Clone)]
pub enum Served {
    /// HTTP of either version, in the clear (`HTTP`, `HTTP2`, `GRPC`).
    Http(Arc<VirtualHosts>),
    /// TLS (`HTTPS`, `TLS`): by the name that the `ClientHello` has. What has none of these names is refused.
    Tls(Arc<TlsServers>),
    /// Bytes (`TCP`): the first that matches; none: the connection is closed.
    Tcp(Arc<[Arc<StreamRoute>]>),
}

/// The servers of a TLS port, by the names they are asked for.
pub type TlsServers = ByHost<Arc<TlsServer>>;

/// The virtual hosts of a server or of a plain port, by their domains. The name that is looked up has no port and is in small
/// letters.
pub type VirtualHosts = ByHost<Arc<VirtualHost>>;

/// One server of a TLS port.
#[derive(Debug, Clone)]
pub struct TlsServer {
    /// For logs: who wrote it, for example `Gateway istio-system/edge: spec.servers[0]`.
    pub origin: Arc<str>,
    /// What becomes of its connections.
    pub action: TlsAction,
}

impl TlsServer {
    fn clusters(&self) -> Box<dyn Iterator<Item = &Arc<Cluster>> + '_> {
        match &self.action {
            TlsAction::Http(_, hosts) => of_hosts(hosts),
            TlsAction::PassThrough(routes) | TlsAction::Stream(_, routes) => Box::new(led_to(&[], routes)),
        }
    }
}

fn of_hosts(hosts: &VirtualHosts) -> Box<dyn Iterator<Item = &Arc<Cluster>> + '_> {
    Box::new(hosts.values().flat_map(|host| led_to(&host.routes, &[])))
}

/// What becomes of the connections of a TLS server.
#[derive(Debug, Clone)]
pub enum TlsAction {
    /// `PASSTHROUGH`: TLS stays as it is; the first that matches, none: the connection is closed.
    PassThrough(Arc<[Arc<StreamRoute>]>),
    /// TLS ends here, and what is inside is HTTP of either version.
    Http(Arc<ServerTls>, Arc<VirtualHosts>),
    /// TLS ends here, and what is inside are bytes.
    Stream(Arc<ServerTls>, Arc<[Arc<StreamRoute>]>),
}

impl TlsAction {
    /// TLS that ends here.
    pub fn tls(&self) -> Option<&Arc<ServerTls>> {
        match self {
            Self::PassThrough(_) => None,
            Self::Http(tls, _) | Self::Stream(tls, _) => Some(tls),
        }
    }
}

/// What the requests for one domain go by.
#[derive(Debug, Clone)]
pub struct VirtualHost {
    /// The domain, in small letters: `a.example`, `*.example`, `*`.
    pub domain: Arc<str>,
    /// For logs: the `Gateway` (and its server) that has it.
    pub origin: Arc<str>,
    /// `httpsRedirect`: every request is told (301) to come again by HTTPS, whatever `routes` say.
    pub https_redirect: bool,
    /// The first that matches; none: 404.
    pub routes: Arc<[Arc<HttpRoute>]>,
}

/// The server's side of TLS.
pub struct ServerTls {
    /// What it comes from.
    pub terms: ServerTlsTerms,
    /// What was read of it; why it cannot be used, where that is so: every handshake fails then.
    pub read: Result<ServerTlsRead, Arc<str>>,
    /// What has been made of it. Of `ISTIO_MUTUAL` nothing is: the pod's own certificate is renewed while this stays.
    pub made: OnceLock<Result<Arc<ServerConfig>, String>>,
}

/// What the server shows and whom it believes, as it is written.
#[derive(Clone, PartialEq)]
pub struct ServerTlsTerms {
    /// `mode`.
    pub mode: ServerTlsMode,
    /// Its certificate with those above it, in PEM; `None`: that of the pod (`ISTIO_MUTUAL`), or there is none.
    pub chain: Option<Arc<[u8]>>,
    /// The key of it, in PEM.
    pub key: Option<Arc<[u8]>>,
    /// Certificates of the authorities of clients, in PEM.
    pub roots: Option<Arc<[u8]>>,
    /// Lists of what these authorities have revoked, in PEM; `None`: nothing is asked of any.
    pub revoked: Option<Arc<[u8]>>,
    /// `subjectAltNames`: a client has to prove one of these, where there are any.
    pub names: Vec<Arc<str>>,
    /// `minProtocolVersion`.
    pub least: TlsVersion,
    /// `maxProtocolVersion`.
    pub most: TlsVersion,
    /// `cipherSuites`, in the order of preference; none: those of the library.
    pub ciphers: Vec<SupportedCipherSuite>,
}

/// `mode` of a server where TLS ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerTlsMode {
    /// `SIMPLE`: clients are not asked who they are.
    Simple,
    /// `MUTUAL`: clients have to prove who they are.
    Mutual,
    /// `OPTIONAL_MUTUAL`: clients are asked, and may say nothing.
    OptionalMutual,
    /// `ISTIO_MUTUAL`: as between pods of the mesh: the pod's own certificate, and clients of the mesh alone.
    IstioMutual,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// `TLSV1_2`.
    V1_2,
    /// `TLSV1_3`.
    V1_3,
}

/// What was read of a server's TLS.
#[derive(Clone)]
pub struct ServerTlsRead {
    /// What is shown; `None`: the pod's own certificate (`ISTIO_MUTUAL`).
    pub certified: Option<Arc<CertifiedKey>>,
    /// Whose clients are believed; `None` where they are not asked, or the mesh's are believed.
    pub roots: Option<Arc<RootCertStore>>,
    /// What is revoked; none: nobody is asked.
    pub revoked: Arc<[CertificateRevocationListDer<'static>]>,
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let broken = self.read.as_ref().err();
        f.debug_struct("ServerTls")
            .field("terms", &self.terms)
            .field("broken", &broken)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ServerTlsTerms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mode, names, least, most, ciphers, .. } = self;
        let mut shown = f.debug_struct("ServerTlsTerms");
        shown.field("mode", mode).field("names", names).field("least", least).field("most", most);
        shown.field("ciphers", ciphers).finish_non_exhaustive()
    }
}

impl fmt::Debug for ServerTlsRead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTlsRead").finish_non_exhaustive()
    }
}

/// Things by host: a name, `*.` before the rest of one, or `*`.
#[derive(Debug, Clone)]
pub struct ByHost<T> {
    exact: HashMap<Box<str>, T>,
    /// What follows the `*`, longest first.
    below: Vec<(Box<str>, T)>,
    any: Option<T>,
}

impl<T> Default for ByHost<T> {
    fn default() -> Self {
        Self { exact: HashMap::new(), below: Vec::new(), any: None }
    }
}

impl<T> FromIterator<(String, T)> for ByHost<T> {
    /// Of one host twice the last stays.
    fn from_iter<I: IntoIterator<Item = (String, T)>>(all: I) -> Self {
        let mut by_host = Self::default();
        for (mut host, item) in all {
            host.make_ascii_lowercase();
            match host.strip_prefix('*') {
                None => drop(by_host.exact.insert(host.into(), item)),
                Some("") => by_host.any = Some(item),
                Some(rest) => match by_host.below.iter_mut().find(|(other, _)| **other == *rest) {
                    Some((_, place)) => *place = item,
                    None => by_host.below.push((rest.into(), item)),
                },
            }
        }
        by_host.below.sort_by(|(a, _), (b, _)| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        by_host
    }
}

impl<T> ByHost<T> {
    /// What is there for a name in small letters: that of the name itself, else of the longest wildcard above it. Without a name,
    /// what is there for every one.
    pub fn find(&self, name: Option<&str>) -> Option<&T> {
        let named = name.and_then(|name| {
            let above =
                || self.below.iter().find(|(rest, _)| name.len() > rest.len() && name.ends_with(&**rest));
            self.exact.get(name).or_else(|| above().map(|(_, item)| item))
        });
        named.or(self.any.as_ref())
    }

    /// The same hosts with something else for each.
    pub fn map<U>(&self, mut of: impl FnMut(&T) -> U) -> ByHost<U> {
        ByHost {
            exact: self.exact.iter().map(|(host, item)| (host.clone(), of(item))).collect(),
            below: self.below.iter().map(|(rest, item)| (rest.clone(), of(item))).collect(),
            any: self.any.as_ref().map(of),
        }
    }

    /// All of them with their hosts; names first and in their order, then wildcards from the longest on.
    pub fn entries(&self) -> impl Iterator<Item = (String, &T)> {
        let mut exact: Vec<(&Box<str>, &T)> = self.exact.iter().collect();
        exact.sort_by_key(|(host, _)| *host);
        let exact = exact.into_iter().map(|(host, item)| (host.to_string(), item));
        let below = self.below.iter().map(|(rest, item)| (format!("*{rest}"), item));
        exact.chain(below).chain(self.any.iter().map(|item| ("*".to_owned(), item)))
    }

    /// All of them; those of names first, then wildcards from the longest on.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.exact.values().chain(self.below.iter().map(|(_, item)| item)).chain(&self.any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_host_has_a_name() {
        let hosts = ["*", "*.c", "a.b.c", "*.b.c", "X.c", "*.Y.c"];
        let by_host: ByHost<&str> = hosts.iter().map(|host| ((*host).to_owned(), *host)).collect();
        let table = [
            (Some("a.b.c"), "a.b.c"),
            (Some("d.b.c"), "*.b.c"),
            (Some("e.d.b.c"), "*.b.c"),
            (Some("b.c"), "*.c"),
            (Some("x.c"), "X.c"),
            (Some("z.y.c"), "*.Y.c"),
            (Some("c"), "*"),
            (Some(".c"), "*"),
            (Some("elsewhere"), "*"),
            (None, "*"),
        ];
        for (name, expected) in table {
            assert_eq!(by_host.find(name), Some(&expected), "{name:?}");
        }
        assert_eq!(by_host.values().count(), hosts.len());
        let few: ByHost<u8> =
            [("*.c".to_owned(), 1), ("a.c".to_owned(), 2), ("*.c".to_owned(), 3)].into_iter().collect();
        assert_eq!(
            [Some("a.c"), Some("b.c"), Some("c"), None].map(|name| few.find(name).copied()),
            [Some(2), Some(3), None, None]
        );
    }
}
