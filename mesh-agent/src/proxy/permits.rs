//! Asking policy, at the end of the destination's pod: for a connection, and for each request.
//!
//! Whatever way a connection or request comes to a pod of this node, one of these is asked before the app is dialled.
//! What policy has judged of a path is what the app is given. With each permit at a pod of this node goes what is asked
//! again when the pod's policies change.

use std::{net::SocketAddr, sync::Arc};

use http::{
    Request, Uri,
    uri::{Parts, PathAndQuery},
};

use super::{
    Mesh,
    cut::{self, Standing, What},
    external::{self, Approved},
    guards::{self, Ticket},
    inbound::Inbound,
};
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    identity::SpiffeId,
    policy::{self, Asked, Head, Open, Permit, Ruling, jwt},
    route,
    state::snapshot::{Endpoint, Workload},
    upstream::{Pod, Via, message},
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
    let asked = Asked { workload: &workload, destination: endpoint.address, source, client, approved: &[] };
    let ruling = policy::connection(&asked, &mesh.reporter)?;
    Ok((unless_read(mesh, endpoint.address, ruling), Some(standing)))
}

/// Whether a request may go to an endpoint, as far as that is this node's to say. May ask external authorizers, who may
/// change its headers.
pub(super) async fn request_to(
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
    // What it says of its sender itself is not what policies go by.
    message::client_certificate(request.headers_mut(), source, &workload.identity);
    let asked = Asked { workload: &workload, destination: endpoint.address, source, client, approved: &[] };
    let (permit, what, approved, ticket) = of_request(mesh, pod, &asked, request).await?;
    Ok((permit, Some(standing.known_as(what).approved_by(approved).admitted(ticket))))
}

/// Whether a question to an external authorizer may go to an endpoint of it. No authorizer is asked about that: where one
/// would have to be, the question is refused.
pub(super) fn question_to(
    mesh: &Mesh,
    from: From<'_>,
    via: &Via,
    endpoint: &Endpoint,
    request: &mut Request<Body>,
) -> Result<Permit> {
    let Via::Local(pod) = via else {
        return policy::outbound(endpoint.workload.as_deref(), endpoint.address);
    };
    let workload = pod.workload();
    let From { identity: source, client } = from;
    let asked = Asked { workload: &workload, destination: endpoint.address, source, client, approved: &[] };
    if workload.authorization.reads_paths {
        settle_path(mesh, request.uri_mut())?;
    }
    let tokens = &workload.authentication.tokens;
    let claims = jwt::settle(tokens, endpoint.address.port(), request, jwt::now())?;
    let claims = claims.as_ref();
    if policy::authorizer(&asked, Open::Request(head(request, claims))).is_some() {
        let text = "a CUSTOM policy selects the authorizer itself: exclude its pods or its port";
        return Err(Error::new(Kind::Denied, text));
    }
    policy::request(&asked, &head(request, claims), &mesh.reporter)
}

/// Whether a request may come in at a gateway, as the policies of the gateway's own pod say. May ask external authorizers, who may
/// change its headers. `at`: the gateway's address that the client has dialled.
pub(super) async fn at_gateway(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    from: From<'_>,
    at: SocketAddr,
    request: &mut Request<Body>,
) -> Result<Box<Standing>> {
    let standing = Standing::new(pod, from, at, What::Connection);
    let workload = pod.workload();
    let From { identity: source, client } = from;
    let asked = Asked { workload: &workload, destination: at, source, client, approved: &[] };
    let (_permit, what, approved, ticket) = of_request(mesh, pod, &asked, request).await?;
    Ok(standing.known_as(what).approved_by(approved).admitted(ticket))
}

/// The same for a connection that carries no requests, and the server name that it asks for.
pub(super) async fn bytes_at_gateway(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    from: From<'_>,
    at: SocketAddr,
    server_name: Option<&str>,
) -> Result<Box<Standing>> {
    let standing = Standing::new(pod, from, at, What::Opaque(server_name.map(str::to_owned)));
    let workload = pod.workload();
    let From { identity: source, client } = from;
    let asked = Asked { workload: &workload, destination: at, source, client, approved: &[] };
    let mut approved = Approved::default();
    if !workload.authorization.custom.is_empty() {
        approved = external::connection(mesh, pod, &asked, server_name).await?;
    }
    let asked = Asked { approved: &approved.by, ..asked };
    let _permit = policy::opaque(&asked, server_name, &mesh.reporter)?;
    Ok(standing.approved_by(approved))
}

impl Inbound {
    /// Whether a connection may go to this address of the pod.
    pub(super) fn may_connect(&self, app: SocketAddr) -> Result<(Ruling, Box<Standing>)> {
        let standing = self.standing(app);
        self.is_believed()?;
        let workload = self.pod.workload();
        let ruling = policy::connection(&self.asked(&workload, app), &self.mesh.reporter)?;
        // What the kubelet asks for is not held up.
        let ruling = if self.probe { ruling } else { unless_read(&self.mesh, app, ruling) };
        Ok((ruling, standing))
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
    pub(super) async fn may_pass(
        &self,
        app: SocketAddr,
        server_name: Option<&str>,
    ) -> Result<(Permit, Approved)> {
        if self.probe
            && let (Ruling::Permitted(permit), _) = self.may_connect(app)?
        {
            return Ok((permit, Approved::default()));
        }
        self.is_believed()?;
        let workload = self.pod.workload();
        let mut approved = Approved::default();
        if !workload.authorization.custom.is_empty() {
            let asked = self.asked(&workload, app);
            // Boxed: rare, and over soon.
            approved = Box::pin(external::connection(&self.mesh, &self.pod, &asked, server_name)).await?;
        }
        let asked = Asked { approved: &approved.by, ..self.asked(&workload, app) };
        let permit = policy::opaque(&asked, server_name, &self.mesh.reporter)?;
        Ok((permit, approved))
    }

    /// Whether bytes of this connection are read for nothing but tokens.
    pub(super) fn reads_for_tokens_alone(&self, app: SocketAddr) -> bool {
        let workload = self.pod.workload();
        !self.probe && policy::read_for_tokens_alone(&self.asked(&workload, app))
    }

    /// Whether a request may go to this address of the pod. May ask external authorizers, who may change its headers.
    pub(super) async fn may_request(
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
        self.is_believed()?;
        let workload = self.pod.workload();
        let asked = self.asked(&workload, app);
        let (permit, what, approved, ticket) = of_request(&self.mesh, &self.pod, &asked, request).await?;
        Ok((permit, standing.known_as(what).approved_by(approved).admitted(ticket)))
    }

    fn standing(&self, app: SocketAddr) -> Box<Standing> {
        let from = From { identity: self.source.identity.as_ref(), client: self.ends.client };
        let mut standing = Standing::new(&self.pod, from, app, What::Connection);
        standing.shown.clone_from(&self.shown);
        standing
    }

    /// Whether what the other end has proved itself with still stands.
    fn is_believed(&self) -> Result<()> {
        cut::still_believed(self.shown.as_deref(), self.ends.client)
    }

    /// What is asked of the policies of now, however old the connection is.
    fn asked<'a>(&'a self, workload: &'a Workload, app: SocketAddr) -> Asked<'a> {
        let (source, client) = (self.source.identity.as_ref(), self.ends.client);
        Asked { workload, destination: app, source, client, approved: &[] }
    }
}

async fn of_request(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    asked: &Asked<'_>,
    request: &mut Request<Body>,
) -> Result<(Permit, What, Approved, Ticket)> {
    let settled = asked.workload.authorization.reads_paths || guards::reads_paths(mesh, asked.destination);
    if settled {
        settle_path(mesh, request.uri_mut())?;
    }
    let now = jwt::now();
    // As it came: it is judged anew with its tokens.
    let what = What::request(request, (!settled).then(|| mesh.path_form()), now);
    let tokens = &asked.workload.authentication.tokens;
    let claims = jwt::settle(tokens, asked.destination.port(), request, now)?;
    let mut approved = Approved::default();
    if !asked.workload.authorization.custom.is_empty() {
        // Boxed: rare, and over soon.
        approved = Box::pin(external::request(mesh, pod, asked, request, claims.as_ref())).await?;
    }
    let asked = Asked { approved: &approved.by, ..*asked };
    let head = head(request, claims.as_ref());
    let permit = policy::request(&asked, &head, &mesh.reporter)?;
    let ticket = guards::admit(mesh, &asked, &head)?;
    Ok((permit, what, approved, ticket))
}

/// What may pass unread is read all the same where the requests in it are held to limits.
fn unless_read(mesh: &Mesh, app: SocketAddr, ruling: Ruling) -> Ruling {
    match ruling {
        Ruling::Permitted(_) if guards::reads_requests(mesh, app) => Ruling::BytesDecide,
        ruling => ruling,
    }
}

/// What policies see of a request.
pub(super) fn head<'a, B>(request: &'a Request<B>, claims: Option<&'a jwt::Claims>) -> Head<'a> {
    Head {
        method: route::method(request.method(), request.extensions()),
        authority: request.uri().authority().map_or("", |authority| authority.as_str()),
        path: request.uri().path(),
        headers: request.headers(),
        claims,
    }
}

/// Brings the path into the form in which routes and policies are asked about it, and in which the app gets it.
pub(super) fn settle_path(mesh: &Mesh, uri: &mut Uri) -> Result<()> {
    let bad = |why: String| Error::new(Kind::BadRequest, why);
    let path = uri.path();
    let normal = policy::normalise(path, mesh.path_form()).map_err(|malformed| bad(malformed.to_string()))?;
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
