//! Bytes that come to a pod where policy asks for what only requests have: they are read as HTTP, and each request is
//! judged.
//!
//! Where only tokens are looked for, the app may speak first (`silence.rs`). Reads top to bottom: detect → HTTP: permit, hand over and report request by request → anything else: permit by what a
//! connection has, which refuses wherever requests decide, hand over, report. Plaintext, tunnels of other meshes and
//! connections between pods of one node alike. Tested in the lab (`tests/tests/authorization.rs`).

use std::{net::SocketAddr, pin::pin, sync::Arc};

use http::{HeaderMap, Request, Response, StatusCode};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use super::{
    cut::{Standing, What, unless_cut},
    downstream::{self, Server},
    exchange::{Client, Exchange},
    http::{self as requests, Answered, Made},
    inbound::{self, Inbound},
    silence::{self, Broken},
    unsent::Left,
    upgrade,
};
use crate::{
    body::Body,
    detect::{self, Prefixed},
    error::{Error, Kind, Result},
    http1::{Refusal, Turn},
    policy::Permit,
    state::snapshot::Protocol,
    tunnel,
    upstream::{Destination, Kept, Switch, Switched, Via, message},
};

/// Serves a connection to this address of the pod, until it ends.
pub(super) async fn serve<S>(
    inbound: Arc<Inbound>,
    client: S,
    left: Left<Prefixed<S>>,
    app: SocketAddr,
    standing: Box<Standing>,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let mut client = Prefixed::new(client);
    let mut standing = standing.known_as(if inbound.probe { What::Probe } else { What::Requests });
    if inbound.reads_for_tokens_alone(app) {
        let broken = unless_cut(Some(&mut standing), pin!(silence::broken(&inbound, &mut client, app))).await;
        match broken {
            Ok(Broken::ByClient) => {}
            Ok(Broken::ByServer(server, approved)) => {
                let standing = standing.known_as(What::Opaque(None)).approved_by(approved);
                inbound::copy_to_app(&inbound, client, server, app, standing).await;
                return;
            }
            Err(error) => return inbound.refused(Some(app), &error),
        }
    }
    let detected = unless_cut(Some(&mut standing), pin!(protocol(&inbound, &mut client, app))).await;
    // It was a question whether anybody listens.
    if inbound.probe && client.is_unread() {
        return;
    }
    let served = match detected {
        Ok(Protocol::Opaque) => opaque(&inbound, client, app, standing).await,
        Ok(version) => {
            let server = Server::Inbound(Arc::clone(&inbound), app);
            let serving = pin!(downstream::serve(server, client, left, version));
            unless_cut(Some(&mut standing), serving).await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        inbound.refused(Some(app), &error);
    }
}

/// Who says nothing for too long sends no requests.
async fn protocol<S>(inbound: &Inbound, client: &mut Prefixed<S>, app: SocketAddr) -> Result<Protocol>
where
    S: AsyncRead + Unpin,
{
    match timeout(inbound.mesh.limits.detection_timeout, detect::by_first_bytes(client)).await {
        Ok(Ok(protocol)) => Ok(protocol),
        Ok(Err(error)) => Err(gone(&error)),
        // It might still become a request, with what only the agent may say of tokens in it.
        Err(_) if inbound.pod.workload().authentication.tokens.reads(app.port()) => {
            let limit = inbound.mesh.limits.detection_timeout;
            let text =
                format!("nothing known within {limit:?}, on a port whose requests are looked at for tokens");
            Err(Error::new(Kind::BadRequest, text))
        }
        Err(_) => Ok(Protocol::Opaque),
    }
}

async fn opaque<S>(
    inbound: &Inbound,
    mut client: Prefixed<S>,
    app: SocketAddr,
    standing: Box<Standing>,
) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let limit = inbound.mesh.limits.detection_timeout;
    let name = match timeout(limit, detect::server_name(&mut client)).await {
        Ok(name) => name.map_err(|error| gone(&error))?,
        Err(_) => None,
    };
    let (permit, approved) = inbound.may_pass(app, name.as_deref()).await?;
    let server = inbound::hand_over(inbound, &permit, app).await?;
    inbound::copy_to_app(
        inbound,
        client,
        server,
        app,
        standing.known_as(What::Opaque(name)).approved_by(approved),
    )
    .await;
    Ok(())
}

fn gone(error: &std::io::Error) -> Error {
    Error::new(Kind::DownstreamReset, format!("client went away: {error}"))
}

/// Answers one request. `refused`: what the connection it came on found wrong with it.
pub(super) async fn answer(
    inbound: &Arc<Inbound>,
    app: SocketAddr,
    request: Box<Request<Body>>,
    client: Client,
    refused: Option<Refusal>,
) -> Answered {
    let mut exchange = inbound::begin(inbound, &request, app, client);
    let made = match refused {
        Some(refusal) => {
            exchange.unread();
            Err(Error::from(refusal))
        }
        None => forward(inbound, &mut exchange, request, app).await,
    };
    match made {
        Ok(Made::Response(response)) => {
            let (head, body) = response.into_parts();
            Answered::Response(exchange.respond(head, body))
        }
        Ok(Made::Switch(agreed)) => upgrade::carry(Arc::clone(inbound), &inbound.pod.drain, exchange, agreed),
        Err(error) => {
            let refused = exchange.client.turn.as_ref().and_then(Turn::body_refusal);
            Answered::Response(exchange.refuse(refused.map_or(error, Error::from)))
        }
    }
}

async fn forward(
    inbound: &Arc<Inbound>,
    exchange: &mut Exchange,
    mut request: Box<Request<Body>>,
    app: SocketAddr,
) -> Result<Made> {
    let (mut parts, body) = std::mem::take(&mut *request).into_parts();
    requests::within(&inbound.mesh.limits, &parts)?;
    // No probe needs another protocol.
    let (version, wanted) = (exchange.client.version, Switch::asked(&parts).filter(|_| !inbound.probe));
    let expects = message::expects_continue(version, &parts.headers);
    message::normalise(&mut parts, app)?;
    message::strip_hop_by_hop(&mut parts.headers);
    tunnel::strip_mesh_headers(&mut parts.headers);
    message::show_certificate(&mut parts.headers, inbound.certificate.as_ref());
    exchange.authority = parts.uri.authority().cloned();
    *request = Request::from_parts(parts, body.metered(Arc::clone(&exchange.request)));
    inbound.admit()?;
    // Who waits to be told before it sends a body that is to be shown.
    let shown = expects && inbound.pod.workload().authorization.reads_bodies;
    if shown {
        exchange.client.inform.inform(StatusCode::CONTINUE, &HeaderMap::new());
    }
    let (permit, mut standing) = inbound.may_request(app, &mut request).await?;
    if expects && !shown {
        exchange.client.inform.inform(StatusCode::CONTINUE, &HeaderMap::new());
    }
    let response = if let Some(wanted) = wanted {
        // Boxed: rare.
        let switching = Box::pin(switch(inbound, &permit, exchange, *request, app, &wanted));
        let switched = unless_cut(Some(&mut standing), pin!(switching)).await?;
        match switched {
            Made::Response(response) => response,
            switched @ Made::Switch(_) => {
                exchange.standing = Some(standing);
                return Ok(switched);
            }
        }
    } else {
        let sending = inbound::tries(inbound, &permit, exchange, request, app, version);
        let (response, lease) = unless_cut(Some(&mut standing), pin!(sending)).await?;
        exchange.lease = Some(lease);
        response
    };
    exchange.standing = Some(standing);
    let (mut head, body) = response.into_parts();
    message::for_client(&mut head.headers, head.status);
    tunnel::strip_mesh_headers(&mut head.headers);
    (head.version, head.extensions) = (http::Version::default(), http::Extensions::new());
    Ok(Made::Response(Response::from_parts(head, body)))
}

/// A request for another protocol; from the app's yes on there are only bytes.
async fn switch(
    inbound: &Inbound,
    _permit: &Permit,
    exchange: &mut Exchange,
    request: Request<Body>,
    app: SocketAddr,
    wanted: &Switch,
) -> Result<Made> {
    let key = request.headers().get(http::header::SEC_WEBSOCKET_KEY).cloned();
    let via = Via::Local(Arc::clone(&inbound.pod));
    let to = Destination {
        address: app,
        via: &via,
        protocol: exchange.client.version,
        connect_timeout: inbound::connect_timeout(exchange.cluster.as_deref()),
        kept: Kept::FREELY,
        flow: None,
    };
    let client = inbound.ends.client;
    match inbound.pod.switch_to_app(&to, request, wanted, client).await? {
        Switched::Answered(response) => Ok(Made::Response(response)),
        Switched::Agreed(head, bytes) => {
            Ok(Made::Switch(upgrade::agree(exchange, head, bytes, wanted, key.as_ref())))
        }
    }
}
