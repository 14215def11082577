//! Asking policy, at the end of the destination's pod: for a connection, and for each request.
//!
//! Whatever way a connection or request comes to a pod of this node, one of these is asked before the app is dialled.
//! What policy has judged of a path is what the app is given. With each permit at a pod of this node goes what is asked
//! again when the pod's policies change.

use std::net::SocketAddr;

use http::{
    Request, Uri,
    uri::{Parts, PathAndQuery},
};

use super::{
    Mesh,
    cut::{self, Standing, What},
    inbound::Inbound,
};
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    identity::SpiffeId,
    policy::{self, Asked, Head, Permit, Ruling},
    route,
    state::snapshot::Endpoint,
    upstream::Via,
};

/// Who asks, from where.
#[derive(Debug, Clone, Copy)]
pub(super) struct From<'a> {
    pub identity: Option<&'a SpiffeId>,
    pub client: SocketAddr,
}

/// What stands open at a pod of this node, once it is permitted.
pub(super) type Stands = Option<Box<Standing>>;

/// Whether a connection may go to an endpoint, as far as that is this node's to say.
pub(super) fn connection_to(
    mesh: &Mesh,
    from: From<'_>,
    via: &Via,
    endpoint: &Endpoint,
) -> Result<(Ruling, Stands)> {
    let Via::Local(pod) = via else {
        let permit = policy::outbound(endpoint.workload.as_deref(), endpoint.address)?;
        return Ok((Ruling::Permitted(permit), None));
    };
    let standing = Standing::new(pod, from, endpoint.address, What::Connection);
    let workload = pod.workload();
    let From { identity: source, client } = from;
    let asked = Asked { workload: &workload, destination: endpoint.address, source, client };
    Ok((policy::connection(&asked, &mesh.reporter)?, Some(standing)))
}

/// Whether a request may go to an endpoint, as far as that is this node's to say.
pub(super) fn request_to(
    mesh: &Mesh,
    from: From<'_>,
    via: &Via,
    endpoint: &Endpoint,
    request: &mut Request<Body>,
) -> Result<(Permit, Stands)> {
    let Via::Local(pod) = via else {
        return Ok((policy::outbound(endpoint.workload.as_deref(), endpoint.address)?, None));
    };
    let standing = Standing::new(pod, from, endpoint.address, What::Connection);
    let workload = pod.workload();
    let From { identity: source, client } = from;
    let asked = Asked { workload: &workload, destination: endpoint.address, source, client };
    let (permit, what) = of_request(mesh, &asked, request)?;
    Ok((permit, Some(standing.known_as(what))))
}

impl Inbound {
    /// Whether a connection may go to this address of the pod.
    pub(super) fn may_connect(&self, app: SocketAddr) -> Result<(Ruling, Box<Standing>)> {
        let standing = self.standing(app);
        Ok((self.ask(app, |asked| policy::connection(asked, &self.mesh.reporter))?, standing))
    }

    /// The same for a connection in plaintext. The kubelet's is let in where it would be refused, for the requests in it that
    /// the pod declares; each of the others is refused.
    pub(super) fn may_begin(&self, app: SocketAddr) -> Result<(Ruling, Box<Standing>)> {
        match self.may_connect(app) {
            Err(error) if self.probe && cut::is_cut(&error) => Ok((Ruling::BytesDecide, self.standing(app))),
            ruling => ruling,
        }
    }

    /// The same for a connection that carries no requests.
    pub(super) fn may_pass(&self, app: SocketAddr, server_name: Option<&str>) -> Result<Permit> {
        if self.probe
            && let (Ruling::Permitted(permit), _) = self.may_connect(app)?
        {
            return Ok(permit);
        }
        self.ask(app, |asked| policy::opaque(asked, server_name, &self.mesh.reporter))
    }

    /// Whether a request may go to this address of the pod.
    pub(super) fn may_request(
        &self,
        app: SocketAddr,
        request: &mut Request<Body>,
    ) -> Result<(Permit, Box<Standing>)> {
        let standing = self.standing(app);
        if self.probe {
            if let Some(permit) = policy::probes::declared(&self.pod.workload(), app, request) {
                return Ok((permit, standing.known_as(What::Probe)));
            }
            // What refuses the connection has not kept it out.
            if let (Ruling::Permitted(permit), standing) = self.may_connect(app)? {
                return Ok((permit, standing));
            }
        }
        let (permit, what) = self.ask(app, |asked| of_request(&self.mesh, asked, request))?;
        Ok((permit, standing.known_as(what)))
    }

    fn standing(&self, app: SocketAddr) -> Box<Standing> {
        let from = From { identity: self.source.identity.as_ref(), client: self.ends.client };
        Standing::new(&self.pod, from, app, What::Connection)
    }

    /// The policies are those of now, however old the connection is.
    fn ask<T>(&self, app: SocketAddr, ask: impl FnOnce(&Asked<'_>) -> Result<T>) -> Result<T> {
        let workload = self.pod.workload();
        let (source, client) = (self.source.identity.as_ref(), self.ends.client);
        ask(&Asked { workload: &workload, destination: app, source, client })
    }
}

fn of_request(mesh: &Mesh, asked: &Asked<'_>, request: &mut Request<Body>) -> Result<(Permit, What)> {
    let settled = asked.workload.authorization.reads_paths;
    if settled {
        settle_path(mesh, request.uri_mut())?;
    }
    let head = Head {
        method: route::method(request.method(), request.extensions()),
        authority: request.uri().authority().map_or("", |authority| authority.as_str()),
        path: request.uri().path(),
        headers: request.headers(),
    };
    let permit = policy::request(asked, &head, &mesh.reporter)?;
    Ok((permit, What::request(request, (!settled).then_some(mesh.path_normalization))))
}

/// Brings the path into the form in which routes and policies are asked about it, and in which the app gets it.
pub(super) fn settle_path(mesh: &Mesh, uri: &mut Uri) -> Result<()> {
    let bad = |why: String| Error::new(Kind::BadRequest, why);
    let path = uri.path();
    let normal =
        policy::normalise(path, mesh.path_normalization).map_err(|malformed| bad(malformed.to_string()))?;
    if *normal == *path {
        return Ok(());
    }
    let target = match uri.query() {
        Some(query) => format!("{normal}?{query}"),
        None => normal.into_owned(),
    };
    let target = PathAndQuery::try_from(target).map_err(|error| bad(format!("the path: {error}")))?;
    let mut parts: Parts = std::mem::take(uri).into_parts();
    parts.path_and_query = Some(target);
    *uri = Uri::from_parts(parts).map_err(|error| bad(format!("the path: {error}")))?;
    Ok(())
}
