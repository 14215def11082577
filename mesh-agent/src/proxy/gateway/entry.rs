//! What all requests of one connection to a gateway share, and how each of them comes in.
//!
//! Reads top to bottom: what the client may not say of itself goes and what the gateway says of it comes → the policies of the
//! gateway's own pod → the virtual host, in the configuration of now. Tested below, and in the lab.

use std::{borrow::Cow, sync::Arc};

use http::{
    HeaderMap, Request, StatusCode,
    request::Parts,
    uri::{Authority, Scheme},
};

use super::{Port, edge, tls};
use crate::{
    body::Body,
    drain::Drain,
    error::{Error, Kind, Result},
    proxy::{exchange::Exchange, outbound::Outbound, permits},
    route,
    state::snapshot::{
        HttpRoute, Redirect, Served, Snapshot, TlsAction, TlsServers, VirtualHost, VirtualHosts,
    },
    tunnel::OfClient,
    upstream::message,
};

/// A connection to a gateway whose requests are answered.
#[derive(Debug)]
pub struct Entry {
    outbound: Arc<Outbound>,
    port: u16,
    drain: Drain,
    /// The client, as far as TLS tells who it is.
    client: tls::Client,
    /// The name in its `ClientHello`, in small letters.
    name: Option<String>,
    /// It has come by TLS.
    secure: bool,
}

/// A request that has come in.
#[expect(clippy::large_enum_variant, reason = "made once for each request, and taken apart at once")]
pub enum Admitted {
    /// It is to come again by HTTPS, at this URL.
    ByHttps(String),
    /// It goes on by these routes.
    ToRoutes {
        /// As policies have left it.
        request: Request<Body>,
        /// The gateway's port, which routes may ask for.
        port: u16,
        /// The first that matches.
        routes: Arc<[Arc<HttpRoute>]>,
    },
}

impl Entry {
    pub(super) fn new(
        port: &Port,
        outbound: &Arc<Outbound>,
        client: tls::Client,
        name: Option<String>,
        secure: bool,
    ) -> Arc<Self> {
        let (outbound, drain) = (Arc::clone(outbound), port.drain.clone());
        Arc::new(Self { outbound, port: port.number, drain, client, name, secure })
    }

    /// The connection.
    pub(in crate::proxy) const fn outbound(&self) -> &Arc<Outbound> {
        &self.outbound
    }

    /// What has it end.
    pub(in crate::proxy) const fn drain(&self) -> &Drain {
        &self.drain
    }

    /// Says of a normalised request what the gateway knows of its client, in the place of what that says itself.
    pub(in crate::proxy) fn mark(&self, parts: &mut Parts) {
        let scheme = if self.secure { Scheme::HTTPS } else { Scheme::HTTP };
        let client = edge::Client {
            ip: self.outbound.ends.client.ip(),
            secure: self.secure,
            certificate: self.client.certificate.as_ref(),
        };
        edge::mark(&mut parts.headers, &client);
        message::set_scheme(&mut parts.uri, scheme);
        if let Some(certificate) = &self.client.certificate {
            parts.extensions.insert(OfClient(certificate.clone()));
        }
    }

    /// Lets a request in, if the policies of the gateway's pod do, and finds whose it is. `expects`: its client waits for a word
    /// before it sends the body.
    ///
    /// # Errors
    /// Those of policies; [`Kind::NoRoute`] where nobody has its host.
    pub(in crate::proxy) async fn admit(
        &self,
        exchange: &mut Exchange,
        parts: Parts,
        body: Body,
        expects: bool,
    ) -> Result<Admitted> {
        let mut request = Request::from_parts(parts, body);
        let Outbound { mesh, pod, ends, .. } = &*self.outbound;
        if expects && pod.workload().authorization.reads_bodies {
            // It is shown to an authorizer, and would not come before. Told twice is no harm (RFC 9110 section 15.2).
            exchange.client.inform.inform(StatusCode::CONTINUE, &HeaderMap::new());
        }
        let from = permits::From { identity: self.client.identity.as_ref(), client: ends.client };
        let permitted = permits::at_gateway(mesh, pod, from, ends.original_dst, &mut request).await;
        let mut standing = permitted?;
        standing.shown.clone_from(&self.client.shown);
        exchange.standing = Some(standing);

        let snapshot = mesh.snapshot();
        let host = host(exchange.authority.as_ref());
        let found = self.hosts(&snapshot, &host)?.and_then(|hosts| hosts.find(Some(&host)));
        let Some(found) = found else {
            let text = format!("no server of port {} has the host {host:?}", self.port);
            return Err(Error::new(Kind::NoRoute, text));
        };
        if found.https_redirect && !self.secure {
            return Ok(by_https(found, request));
        }
        Ok(Admitted::ToRoutes { request, port: self.port, routes: Arc::clone(&found.routes) })
    }

    /// The hosts that requests of the connection may be for, as they are now; `host`: the one that is asked for.
    fn hosts<'s>(&self, snapshot: &'s Snapshot, host: &str) -> Result<Option<&'s VirtualHosts>> {
        let port = snapshot.gateway.as_ref().and_then(|gateway| gateway.port(self.port));
        Ok(match port.map(|port| &port.serves) {
            Some(Served::Http(hosts)) if !self.secure => Some(hosts),
            Some(Served::Tls(servers)) if self.secure => self.of_server(servers, host)?,
            Some(Served::Http(_) | Served::Tls(_) | Served::Tcp(_)) | None => None,
        })
    }

    /// Those of the connection's own server. A host that another one has, by a narrower name, is not among them: who comes there
    /// may have to prove more.
    fn of_server<'s>(&self, servers: &'s TlsServers, host: &str) -> Result<Option<&'s VirtualHosts>> {
        let (Some(own), Some(of_host)) = (servers.find(self.name.as_deref()), servers.find(Some(host)))
        else {
            return Ok(None);
        };
        match &own.action {
            TlsAction::Http(tls, _) if !self.client.satisfies(tls) => {
                let text =
                    format!("{} asks for more than it did when the client came: connect anew", own.origin);
                Err(Error::new(Kind::Unauthenticated, text))
            }
            TlsAction::Http(_, hosts) if own.origin == of_host.origin => Ok(Some(hosts)),
            TlsAction::Http(..) | TlsAction::PassThrough(_) | TlsAction::Stream(..) => Ok(None),
        }
    }
}

/// The host that a request is for, without its port and in small letters; an IPv6 address keeps its brackets.
fn host(authority: Option<&Authority>) -> Cow<'_, str> {
    let host = authority.map_or("", Authority::host);
    if host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Cow::Owned(host.to_ascii_lowercase())
    } else {
        Cow::Borrowed(host)
    }
}

fn by_https(host: &VirtualHost, request: Request<Body>) -> Admitted {
    tracing::debug!(origin = %host.origin, "a request is told to come by HTTPS");
    let redirect = Redirect {
        uri: None,
        prefix: false,
        authority: None,
        port: None,
        scheme: Some(Scheme::HTTPS.to_string()),
        status: StatusCode::MOVED_PERMANENTLY,
    };
    let (parts, _) = request.into_parts();
    Admitted::ByHttps(route::location(&redirect, &parts, None, 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_no_port_and_no_capitals() {
        for (authority, expected) in [
            ("a.example", "a.example"),
            ("A.Example:8080", "a.example"),
            ("a.example:80", "a.example"),
            ("[FD00::1]:80", "[fd00::1]"),
            ("10.0.0.1:80", "10.0.0.1"),
        ] {
            let authority: Option<Authority> = authority.parse().ok();
            assert_eq!(host(authority.as_ref()), expected);
        }
        assert_eq!(host(None), "");
    }
}
